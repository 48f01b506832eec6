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
from tests.metal import attention_cases, selection_cases, ssm_cases, token_cases
from tests.metal.case import Case

CASES: list[Case] = [*ssm_cases.cases(), *token_cases.cases(), *selection_cases.cases(), *attention_cases.cases()]

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
    (r"!moves \?", "moves ?"),
    (r"([^!])moves \?", r"\1!moves ?"),
    (r"\[R \+ N \+ n\]", "[R + n]"),
    (r" \* BITS\b", " * (BITS - 1)"),
    (r" / GROUP\b", " / (2 * GROUP)"),
]

# (body, mutated line) -> why it computes the same.
EQUIVALENT: dict[tuple[str, str], str] = {
    ("scan", "constexpr int STATES = (N + LANES) / LANES;"): "lanes have room for states that are masked",
    ("scan", "s[j] = n < N ? starts[at] : 1.0f;"): "C is 0 where there is no state",
    ("scan", "a[j] = n < N ? -metal::exp(float(A_log[channel * N + n])) : 1.0f;"): "s stays 0 where there is no state",
    ("scan", "const float b = n < N ? float(B[b_at + n * B_strides[2]]) : 1.0f;"): "C is 0 where there is no state",
    ("scan", "const float c = n < N ? float(C[c_at + n * C_strides[2]]) : 1.0f;"): "s is 0 where there is no state",
    ("scan_ends", "const float b = n <= N ? float(B[b_at + n * B_strides[2]]) : 0.0f;"): "no such state is written",
    ("scan_ends", "constexpr int STATES = (N + LANES) / LANES;"): "lanes have room for states that are masked",
    ("scan_ends", "a[j] = n < N ? -metal::exp(float(A_log[channel * N + n])) : 1.0f;"): "no such state is written",
    ("scan_ends", "const float b = n < N ? float(B[b_at + n * B_strides[2]]) : 1.0f;"): "no such state is written",
    (
        "linear_header",
        "in[j] = at + j < end ? float(x[at - begin + j]) : 1.0f;",
    ): "a column past the last has no weight, and packed weights have none",
    (
        "selective_scan_step",
        "for (int begin = 0; begin <= channels; begin += TILE) {",
    ): "a tile without channels adds nothing",
    (
        "selective_scan_step",
        "for (int first = group * ROWS; first <= WIDTH; first += GROUPS * ROWS) {",
    ): "rows past the last are not kept",
    (
        "selective_scan_step",
        "for (int base = int(threadgroup_position_in_grid.x) * int(share); base <= stop; base += TOGETHER) {",
    ): "a round without channels",
    (
        "selective_scan_step",
        "constexpr int STATES = (N + LANES) / LANES, TOGETHER = 32 * GROUPS / LANES;",
    ): "lanes share out the states otherwise",
    ("select", "const int floor = bit <= 0 ? threshold : (threshold | 1 << bit) - 1;"): "the same at bit 0",
    ("select", "if (bit >= 0 && above > uint(e)) threshold = floor + 1;"): "with e above the threshold no tie is taken",
    (
        "select",
        "for (int block = 0, turn = 0; block <= n; block += GROUPS * 32, turn ^= 1) {",
    ): "a block without columns changes nothing",
    (
        "memory_attention_step",
        "const int count0 = now + 1 <= long(slots0) ? int(now + 1) : slots0;",
    ): "equal at the edge",
    ("memory_attention_step", "const int count0 = now < long(slots0) ? int(now + 1) : slots0;"): "equal at the edge",
    (
        "memory_attention_step",
        "const int count1 = !RING1 || aged <= 0 ? 0 : aged <= long(room1) ? int(aged) : room1;",
    ): "equal at the edge",
    (
        "memory_attention_step",
        "const int count1 = !RING1 || aged < 0 ? 0 : aged < long(room1) ? int(aged) : room1;",
    ): "equal at the edge",
    ("memory_attention_step", "const int room1 = slots1 >= near1 ? slots1 - near1 : 0;"): "equal at the edge",
    (
        "memory_attention_step",
        "const int count2 = PINNED2 || now >= long(near2) ? int(k2_shape[2]) : 0;",
    ): "shares are less equal; slots that are too young are passed over one by one",
    (
        "memory_attention_step",
        "const int count3 = PINNED3 || now >= long(near3) ? int(k3_shape[2]) : 0;",
    ): "shares are less equal; slots that are too young are passed over one by one",
    ("memory_attention_step_header", "for (int at = from + group * 4; at <= to; at += 32) {"): "a round without keys",
    (
        "memory_attention_step_header",
        "rows.q[h][j] = d < HEAD_DIM ? float(q[h * HEAD_DIM + d]) * scale : 1.0f;",
    ): "keys are 0 past the head",
    ("memory_attention_step_header", "key[j] = inside ? float(k[slot * HEAD_DIM + d]) : 1.0f;"): "queries are 0 there",
    ("memory_attention_step_header", "value[j] = inside ? float(v[slot * HEAD_DIM + d]) : 1.0f;"): "never written",
    ("memory_attention_step_header", "float score = 1.0f;"): "all scores are 8 larger: the same softmax",
    (
        "memory_attention_header",
        "const int written = start <= long(carried) ? carried - int(start) : 0;  // the row's position 0",
    ): "equal at the edge",
    ("memory_attention_header", "for (int tile = oldest; tile <= end; tile += KEYS) {"): "a tile without keys",
    ("memory_attention_header", "for (int tile = 0; tile <= count; tile += KEYS) {"): "a tile without keys",
    ("memory_attention_header", "const bool there = at.index <= KEYS && column < end;"): "no key is numbered KEYS",
    ("memory_attention_header", "if (at.index <= KEYS && entry < count) {"): "no key is numbered KEYS",
    (
        "memory_attention_header",
        "if (metal::simd_any(age + at.group * 8 + 7 >= near && age + at.group * 8 <= far)) {",
    ): "one more tile is multiplied, and masked",
    (
        "memory_attention_header",
        "if (metal::simd_any(age + at.group * 8 + 7 >= near || age + at.group * 8 < far)) {",
    ): "more tiles are multiplied, and masked",
    ("memory_attention_header", "if (!metal::simd_any(age + tokens >= near)) {"): "one more tile is read, and masked",
    (
        "memory_attention_header",
        "if (metal::simd_any(reads) || metal::simd_any(age + at.group * 8 + 7 >= near)) {",
    ): "more tiles are multiplied, and masked",
    (
        "memory_attention_header",
        "const int oldest = metal::max(carried + first - far, written);",
    ): "one more column is read, and masked",
    (
        "memory_attention_header",
        "rows.q[i].thread_elements()[e] = inside ? float(q[query * HEAD_DIM + d]) * scale : 1.0f;",
    ): "keys are 0 past the head, and queries past the last are not written",
    (
        "memory_attention_header",
        "bmojo_load_tile<HEAD_DIM, KEYS, STRIDE>(k_tile, v_tile, k, v, there ? column : 0, at);",
    ): "what is read instead of nothing is masked",
    (
        "memory_attention_header",
        "bmojo_load_tile<HEAD_DIM, KEYS, STRIDE>(k_tile, v_tile, k, v, position >= 0 ? column : 0, at);",
    ): "what is read instead of nothing is masked",
    ("memory_attention_step", "rows.l[h] = 1.0f;"): "the first key takes all of it away: exp(-inf) is 0",
    ("memory_attention_step", "rows.o[h][j] = 1.0f;"): "the first key takes all of it away: exp(-inf) is 0",
    ("memory_attention", "rows.l = 1.0f;"): "the first tile takes all of it away: exp(-inf) is 0",
    ("memory_attention", "for (int i = 0; i <= BLOCKS; ++i) {"): "past the head nothing is written",
    ("memory_attention", "constexpr int KEYS = BLOCKS < 8 ? 32 : BLOCKS <= 16 ? 16 : 8;"): "smaller tiles do the same",
    ("memory_attention", "constexpr int KEYS = BLOCKS <= 8 ? 32 : BLOCKS < 16 ? 16 : 8;"): "smaller tiles do the same",
    ("memory_attention", "const float factor = rows.l >= 0.0f ? 1.0f / rows.l : 0.0f;"): "0 past the last query only",
    ("memory_attention", "const float factor = rows.l > 0.0f ? 1.0f / rows.l : 1.0f;"): "0 past the last query only",
    (
        "memory_attention",
        "const int mine = query < tokens ? int(chunk[row * tokens + query]) : 0;",
    ): "queries past the last are not written",
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
