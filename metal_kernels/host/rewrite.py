"""Rewrites Metal text into what a C++ compiler takes. Lines keep their numbers, so findings point into the kernel."""

import re
from collections.abc import Sequence

from .errors import CompileError
from .tokens import Token, tokenize

MAX_THREADGROUP_VARIABLES = 64  # kMaxThreadgroupVariables of native/runtime.h

_SUFFIXED_FLOAT = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(h|H|bf|BF)")
_PLAIN_FLOAT = re.compile(r"(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+")
_INSTANTIATION = re.compile(r"(?m)^template \[\[host_name\(.*?\)\]\] \[\[kernel\]\] (.*)$")


def rewrite(text: str) -> str:
    """Metal text as C++: threadgroup variables become MSL_THREADGROUP_VARIABLE, literals get a float's suffix.

    The instantiation at the end, which names the function for the host, becomes a plain one.
    """
    tokens = tokenize(text)
    out: list[str] = []
    previous = ";"  # the last token of code: a declaration begins after ; { } ) or a directive
    variables = 0
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if token.text == "threadgroup" and token.kind == "name" and previous in (";", "{", "}", ")"):
            end = next((j for j in range(i, len(tokens)) if tokens[j].text == ";"), len(tokens))
            declaration = _threadgroup_variables(tokens[i + 1 : end], variables)
            if declaration:
                out.extend(declaration)
                out.append("\n" * sum(t.text.count("\n") for t in tokens[i:end]))
                variables += len(declaration)
                previous = ";"
                i = end + 1
                continue
        out.append(_literal(token.text) if token.kind == "number" else token.text)
        if token.kind == "directive":
            previous = ";"
        elif token.is_code:
            previous = token.text
        i += 1
    if variables > MAX_THREADGROUP_VARIABLES:
        raise CompileError(f"{variables} threadgroup variables; the harness takes {MAX_THREADGROUP_VARIABLES}")
    return _INSTANTIATION.sub(r"template \1", "".join(out))


def _literal(number: str) -> str:
    """MSL has no double: 1.0 is a float, 1.0h a half, 1.0bf a bfloat."""
    if match := _SUFFIXED_FLOAT.fullmatch(number):
        digits, suffix = match.groups()
        point = "" if any(c in digits for c in ".eE") else ".0"
        return f"{'half' if suffix in 'hH' else 'bfloat'}({digits}{point}f)"
    return number + "f" if _PLAIN_FLOAT.fullmatch(number) else number


def _threadgroup_variables(tokens: Sequence[Token], first_id: int) -> list[str]:
    """`float a[4], b;` after `threadgroup` as one macro call per variable; nothing if it declares a pointer."""
    code = [token for token in tokens if token.is_code]
    start = _declarator(code)
    if start is None or any(token.text in ("*", "&", "(") for token in code[:start]):
        return []
    base_type = " ".join(token.text for token in code[:start]).replace(" :: ", "::")
    declarators: list[list[Token]] = [[]]
    depth = 0
    for token in code[start:]:
        depth += (token.text in ("[", "(", "[[")) - (token.text in ("]", ")", "]]"))
        if token.text == "," and depth == 0:
            declarators.append([])
        else:
            declarators[-1].append(token)
    calls = []
    for number, declarator in enumerate(declarators, first_id):
        name, *dimensions = [token.text for token in declarator]
        if "=" in dimensions:
            raise CompileError(f"line {declarator[0].line}: threadgroup variable '{name}' has an initialiser")
        calls.append(f"MSL_THREADGROUP_VARIABLE({number}, {base_type}, {name}, {' '.join(dimensions)}); ")
    return calls


def _declarator(code: Sequence[Token]) -> int | None:
    """Where in `T name[4], ...` the first declared name stands."""
    for i in range(1, len(code)):
        ends = i + 1 == len(code) or code[i + 1].text in ("[", ",", "=")
        if code[i].kind == "name" and ends and code[i - 1].text != "::":
            return i
    return None
