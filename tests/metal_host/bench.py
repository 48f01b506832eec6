"""CPU seconds the harness takes: python -m tests.metal_host.bench. Best of three; a step is one thread's loop turn."""

import resource

from metal_kernels.host import Run
from metal_kernels.host.case import Case

from . import samples

RUNS = {
    "fast": Run(mode="fast"),
    "check": Run(mode="check"),
}
STEPS = 128 * 256 * 1000
CASES: list[tuple[str, Case, int]] = [
    ("scan, a simd_sum a step", samples.scan(batch=16, steps=1000, channels=64, groups=8), STEPS),
    ("two threadgroup_barriers a step", samples.neighbours(threadgroups=128, steps=1000), STEPS),
    ("scan in registers, no waiting", samples.scan_registers(batch=16, steps=1000, channels=256), STEPS // 8),
    ("attention 4 x 1024 x 64, window 256", samples.window_attention(heads=4, length=1024, window=256), 0),
    ("top 16 of 128 x 4096", samples.top_k(rows=128, columns=4096, k=16), 0),
]


def best_of_three(case: Case, run: Run) -> float:
    case.run(run)  # compiles
    seconds = []
    for _ in range(3):
        start = cpu_seconds()
        case.run(run)
        seconds.append(cpu_seconds() - start)
    return min(seconds)


def cpu_seconds() -> float:
    """Of this process and of the children that ran the kernels: other people's load does not count."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    for what, case, steps in CASES:
        for name, run in RUNS.items():
            seconds = best_of_three(case, run)
            statistics = case.kernel.statistics
            assert statistics is not None
            a_step = f"{seconds * 1e9 / steps:6.1f} ns a step" if steps else " " * 16
            counts = f"{statistics.switches:>10} switches, {statistics.accesses:>10} accesses checked"
            print(f"{what:36} {name:5} {seconds:6.2f} s {a_step} {counts}")


if __name__ == "__main__":
    main()
