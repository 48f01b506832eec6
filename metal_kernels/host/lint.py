"""Rules of Metal's language that a C++ compiler does not check. A finding is a line of the header or of the body.

It sees tokens, not types: a pointer to a type it has not seen declared passes here, and the type check (typecheck.py)
is what catches it then.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import LintError
from .tokens import Token, tokenize

ADDRESS_SPACES = {"device", "threadgroup", "constant", "thread"}
_SCALARS = ["bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "bfloat", "float"]
TYPES = {
    *_SCALARS,
    *(scalar + str(width) for scalar in _SCALARS for width in (2, 3, 4)),
    *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("size_t", "ptrdiff_t", "float16_t", "bfloat16_t", "complex64_t"),
}
FORBIDDEN = {
    "double": "Metal has no double",
    "virtual": "Metal has no virtual functions",
    "new": "Metal has no dynamic memory",
    "delete": "Metal has no dynamic memory",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "dynamic_cast": "Metal has no run-time types",
    "typeid": "Metal has no run-time types",
    "goto": "Metal has no goto",
    "thread_local": "Metal has no thread_local",
    "asm": "Metal has no inline assembly",
    "std": "Metal's library is metal::, not std::",
    "printf": "Metal has no printf before 3.2",
    "memory_order_acquire": "Metal's atomics are relaxed only",
    "memory_order_release": "Metal's atomics are relaxed only",
    "memory_order_acq_rel": "Metal's atomics are relaxed only",
    "memory_order_seq_cst": "Metal's atomics are relaxed only",
    "atomic_ulong": "64-bit atomics exist on some GPUs only",
}


@dataclass(frozen=True)
class LintFinding:
    part: Literal["header", "source"]
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.part} line {self.line}: {self.message}"


def lint(header: str, source: str, type_names: Sequence[str] = ()) -> list[LintFinding]:
    """What is wrong with a kernel's header (its helpers) and source (its body); `type_names`: its template's types."""
    header_tokens = [token for token in tokenize(header) if token.is_code]
    source_tokens = [token for token in tokenize(source) if token.is_code]
    types = TYPES | set(type_names) | _declared_types(header_tokens) | _declared_types(source_tokens)
    findings = [LintFinding("header", line, message) for line, message in _non_ascii(header)]
    findings += [LintFinding("header", line, message) for line, message in _anywhere(header_tokens, types)]
    findings += [LintFinding("header", line, message) for line, message in _program_scope(header_tokens)]
    findings += [LintFinding("source", line, message) for line, message in _non_ascii(source)]
    findings += [LintFinding("source", line, message) for line, message in _anywhere(source_tokens, types)]
    return findings


def require_clean(kernel: str, header: str, source: str, type_names: Sequence[str] = ()) -> None:
    """Raises `LintError` with every finding of `lint`."""
    findings = lint(header, source, type_names)
    if findings:
        raise LintError(f"{kernel}: lint\n" + "\n".join(f"  {finding}" for finding in findings))


def _non_ascii(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        odd = next((c for c in line if not (c.isascii() and (c.isprintable() or c == "\t"))), None)
        if odd is not None:
            yield number, f"character {odd!r}: MLX hands the text on as ASCII"


def _declared_types(tokens: Sequence[Token]) -> set[str]:
    return {
        after.text
        for before, after in itertools.pairwise(tokens)
        if before.text in ("typename", "struct", "class", "using") and after.kind == "name"
    }


def _anywhere(tokens: Sequence[Token], types: set[str]) -> Iterator[tuple[int, str]]:
    for i, token in enumerate(tokens):
        before = tokens[i - 1].text if i else ""
        after = tokens[i + 1].text if i + 1 < len(tokens) else ""
        if token.kind == "name" and token.text in FORBIDDEN and not (token.text == "std" and after != "::"):
            yield token.line, f"'{token.text}': {FORBIDDEN[token.text]}"
        if token.text == "[" and before in ("=", "(", ",", "return") and after in ("=", "&", "]"):
            yield token.line, "a lambda expression: Metal has none"
        if token.text == "static" and after not in ("const", "constexpr", "constant", "inline"):
            yield token.line, "'static': a static variable must be in the constant address space"
        if token.text in ("*", "&") and i and _lacks_address_space(tokens, i, types):
            yield token.line, f"'{before} {token.text} {after}': a pointer or reference with no address space"


def _lacks_address_space(tokens: Sequence[Token], i: int, types: set[str]) -> bool:
    """Whether tokens[i], a `*` or `&`, makes a pointer to a known type, and nothing says to which address space."""
    after = tokens[i + 1] if i + 1 < len(tokens) else None
    if after is None or not (after.kind == "name" or after.text in (")", ">", ",", "*")):
        return False
    j = i - 1
    while j >= 0 and tokens[j].text in ("const", "volatile"):
        j -= 1
    if j < 0 or tokens[j].text not in types:
        return False
    while j >= 0 and tokens[j].text not in (";", "{", "}", "(", ",", ")", "<"):
        if tokens[j].text in ADDRESS_SPACES:
            return False
        j -= 1
    return True


def _program_scope(tokens: Sequence[Token]) -> Iterator[tuple[int, str]]:
    """Variables outside functions: they must be constant, and cannot be in threadgroup memory."""
    nested = 0  # open braces, those of namespaces apart
    declaration: list[Token] = []
    for token in tokens:
        if token.text == "{" and declaration and declaration[0].text == "namespace":
            declaration = []
        elif token.text == "{":
            nested += 1
        elif token.text == "}":
            nested = max(nested - 1, 0)
        if nested:
            continue
        if token.text in ("{", "}", ";") or token.kind == "directive":
            yield from _program_scope_declaration(declaration)
            declaration = []
        else:
            declaration.append(token)


def _program_scope_declaration(declaration: Sequence[Token]) -> Iterator[tuple[int, str]]:
    texts = [token.text for token in declaration]
    if texts[:1] == ["template"]:
        texts = texts[_end_of_angle_brackets(texts) :]
    declared = texts[: texts.index("=")] if "=" in texts else texts
    if not texts or texts[0] in ("using", "typedef") or "(" in declared:
        return
    if texts[0] == "threadgroup" and not {"*", "&"} & set(texts):
        yield declaration[0].line, "a threadgroup variable outside a kernel"
    elif "=" in texts and "constant" not in texts:
        yield declaration[0].line, "a program-scope variable must be in the constant address space"


def _end_of_angle_brackets(texts: Sequence[str]) -> int:
    depth = 0
    for i, text in enumerate(texts):
        depth += text.count("<") - text.count(">")
        if depth == 0 and i > 0:
            return i + 1
    return len(texts)
