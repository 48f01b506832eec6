"""Breaks every kernel body in one place at a time and asks the cases of its op to notice.

    python -m tests.metal.mutate [body ...]

Barriers are deleted, comparisons, bounds, ring indices and accumulations changed. It ends with status 1 when a mutant
survives that EQUIVALENT does not explain, or when an explained one is noticed after all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

from bmojo_metal import launch
from metal_kernels.host import CompileError, KernelError, LintError, Run, TypeCheckError
from tests.metal import attention_cases, selection_cases, ssm_cases
from tests.metal.case import Case

CASES: list[Case] = [*ssm_cases.cases(), *selection_cases.cases(), *attention_cases.cases()]

# What is replaced, each occurrence by itself, and by what.
CHANGES: list[tuple[str, str]] = [
    (r"(threadgroup|simdgroup)_barrier\([^;]*\);", ""),
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r" - 1\b", ""),
    (r" \+ 1\b", ""),
    (r" % (\w+)", r" % (\1 + 1)"),
    (r"metal::min\(", "metal::max("),
    (r"metal::max\(", "metal::min("),
    (r" \+= ", " = "),
    (r" \+ first_state\b", ""),
    (r"([:=]) 0\.0f\b", r"\1 1.0f"),
    (r" \^= 1\b", " ^= 0"),
    (r" & 1\b", " & 0"),
    (r" >> 16\b", " >> 15"),
    (r": -1\b", ": 0"),
    (r"_strides\[1\]", "_strides[2]"),
]

# (body, mutated line) -> why it computes the same.
EQUIVALENT: dict[tuple[str, str], str] = {
    ("scan", "constexpr int STATES = (N + LANES) / LANES;"): "lanes have room for states that are masked",
    ("scan", "s[j] = n < N ? starts[at] : 1.0f;"): "C is 0 where there is no state",
    ("scan", "a[j] = n < N ? -metal::exp(float(A_log[channel * N + n])) : 1.0f;"): "s stays 0 where there is no state",
    ("scan_ends", "constexpr int STATES = (N + LANES) / LANES;"): "lanes have room for states that are masked",
    ("scan_ends", "a[j] = n < N ? -metal::exp(float(A_log[channel * N + n])) : 1.0f;"): "no such state is written",
    ("scan_ends", "const float b = n < N ? float(B[b_at + n * B_strides[2]]) : 1.0f;"): "no such state is written",
    ("select", "const int floor = bit <= 0 ? threshold : (threshold | 1 << bit) - 1;"): "the same at bit 0",
    ("select", "if (bit >= 0 && above > uint(e)) threshold = floor + 1;"): "with e above the threshold no tie is taken",
    (
        "select",
        "for (int block = 0, turn = 0; block <= n; block += GROUPS * 32, turn ^= 1) {",
    ): "a block without columns changes nothing",
}


@dataclass(frozen=True)
class Mutant:
    """A body with one change; `line` is the changed line, stripped."""

    body: str
    number: int
    line: str
    text: str

    def __str__(self) -> str:
        return f"{self.body}.metal:{self.number}: {self.line}"


def mutants(body: str) -> Iterator[Mutant]:
    """Every change at every place of `<body>.metal` outside comments."""
    text = launch.text(body)
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), text)
    for pattern, replacement in CHANGES:
        for found in re.finditer(pattern, code):
            changed = text[: found.start()] + found.expand(replacement) + text[found.end() :]
            number = code[: found.start()].count("\n") + 1
            yield Mutant(body, number, changed.split("\n")[number - 1].strip(), changed)


def verdict(mutant: Mutant, cases: Sequence[Case]) -> str:
    """ "noticed", "survived" or "invalid", where the text no longer compiles."""
    original = launch.text

    def text(name: str) -> str:
        return mutant.text if name == mutant.body else original(name)

    with patch.object(launch, "text", text):
        launch._made.cache_clear()
        try:
            for case in cases:
                case.verify(Run(mode="check", timeout_s=10))
        except (LintError, TypeCheckError, CompileError):
            return "invalid"
        except (AssertionError, KernelError):
            return "noticed"
        finally:
            launch._made.cache_clear()
    return "survived"


def unexplained(body: str) -> list[str]:
    """Mutants of a body that survive without a reason, and reasons that do not hold."""
    cases = [case for case in CASES if body in case.kernels]
    assert cases, f"no case runs {body}.metal"
    wrong = []
    for mutant in mutants(body):
        result, explained = verdict(mutant, cases), (mutant.body, mutant.line) in EQUIVALENT
        print(f"{result:8} {'(equivalent) ' if explained else ''}{mutant}", flush=True)
        if (result == "survived") != explained and result != "invalid":
            wrong.append(f"{result}: {mutant}")
    return wrong


def bodies() -> list[str]:
    """Every body that a case runs."""
    return sorted({body for case in CASES for body in case.kernels})


def main(chosen: Sequence[str]) -> int:
    wrong = [line for body in chosen or bodies() for line in unexplained(body)]
    print("\n".join(["", *wrong, f"{len(wrong)} unexplained"]))
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
