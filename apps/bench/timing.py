"""Medians of times on a GPU, and benchmarks of which one may fail without stopping the others."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def median_ms(call: Callable[[], Any], device: str, budget_ms: float = 250, most: int = 100) -> float:
    """Median milliseconds of a call, by CUDA events after a warm-up; by the clock of the host on a CPU."""
    call()
    if device != "cuda":
        times = []
        for _ in range(2):
            begun = time.perf_counter()
            call()
            times.append((time.perf_counter() - begun) * 1e3)
        return round(statistics.median(times), 4)
    call()
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    n = int(max(8, min(most, budget_ms / max(first.elapsed_time(last), 1e-3))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(begin.elapsed_time(end) for begin, end in events), 4)


@contextmanager
def fail_soft(rows: list[dict[str, Any]], **row: Any) -> Iterator[None]:
    """Turns an exception inside into a row that names it, and prints where it was raised; leaves caches empty."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        rows.append({**row, "failed": f"{type(error).__name__}: {error}".split("\n")[0][:200]})
    if torch.cuda.is_available():
        torch.compiler.reset()
        torch.cuda.empty_cache()
