"""For a machine with an NVIDIA GPU: runs cases there, again and again, and under NVIDIA's checkers.

    python -m metal_kernels.host.run_on_gpu tests.metal_host.samples --repeats 1000 --sanitize

The argument is a module with a function `cases()`; needs NumPy, ml_dtypes, CuPy and, for --sanitize, compute-sanitizer.
Exits with 1 if a case misses its reference, if two launches differ in a bit, or if a checker reports anything.
"""

import argparse
import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .cupy_runner import recording

# With their options. Allocations lie side by side: without room between them, memcheck takes a buffer's end for sound.
TOOLS = {"memcheck": ("--padding", "4096"), "racecheck": (), "initcheck": (), "synccheck": ()}


class GpuCase(Protocol):
    """What a module's `cases()` is a list of: case.py has one, the tests of MLX's ops another."""

    @property
    def name(self) -> str: ...

    def run_on_gpu(self) -> Sequence[Any]: ...

    def errors(self, outputs: Sequence[Any]) -> list[float]: ...

    def is_met_by(self, outputs: Sequence[Any]) -> bool: ...


def check(case: GpuCase, repeats: int, poison: bool) -> bool:
    """Runs one case, prints a line, and says whether all is well."""
    with recording(poison) as dispatches:
        outputs = case.run_on_gpu()
    errors = ", ".join(f"{error:.2e}" for error in case.errors(outputs))
    different = sum(dispatch.repeats_that_differ(repeats) for dispatch in dispatches)
    good = case.is_met_by(outputs) and not different and len(dispatches) > 0
    what = f"{len(dispatches)} dispatches; error ratio {errors}; {different} of {repeats} repeats differ"
    print(f"{'ok  ' if good else 'FAIL'} {case.name}: {what}", flush=True)
    return good


def start_sanitizer(module: str, only: str, tool: str) -> subprocess.Popen[str]:
    """Starts the cases once more under one tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise SystemExit("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    poison = [] if tool != "initcheck" else ["--no-poison"]
    options = ("--tool", tool, *TOOLS[tool], "--error-exitcode", "99", "--kernel-name", "kernel_name=msl_entry")
    this = [sys.executable, "-m", "metal_kernels.host.run_on_gpu", module, "--only", only, "--repeats", "0", *poison]
    return subprocess.Popen([program, *options, *this], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def sanitized(tool: str, process: subprocess.Popen[str]) -> bool:
    """Waits for a checker, prints a line, and says whether it found nothing."""
    output, _ = process.communicate()
    print(f"{'ok  ' if process.returncode == 0 else 'FAIL'} compute-sanitizer {tool}", flush=True)
    if process.returncode:
        print(output[-6000:])
    return process.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="a module with a function cases(), such as tests.metal_host.samples")
    parser.add_argument("--only", default="", help="cases whose names begin so (default: all)")
    parser.add_argument("--repeats", type=int, default=10, help="launches that must give the same bits (default: 10)")
    parser.add_argument("--sanitize", action="store_true", help="also run once under each tool of compute-sanitizer")
    parser.add_argument("--no-poison", action="store_true", help="leave outputs unset instead of NaN (for initcheck)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("cupy") is None:
        raise SystemExit("CuPy is not installed: pip install cupy-cuda13x (or the package for your CUDA)")
    cases = [c for c in importlib.import_module(arguments.module).cases() if c.name.startswith(arguments.only)]
    if not cases:
        raise SystemExit(f"{arguments.module} has no case whose name begins with {arguments.only!r}")
    results = [check(case, arguments.repeats, not arguments.no_poison) for case in cases]
    if arguments.sanitize:  # side by side: compiled kernels are kept by CuPy
        started = [(tool, start_sanitizer(arguments.module, arguments.only, tool)) for tool in TOOLS]
        results += [sanitized(tool, process) for tool, process in started]
    print(f"{sum(results)} of {len(results)} good")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
