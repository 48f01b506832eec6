"""For a machine with an NVIDIA GPU: runs cases there, again and again, and under NVIDIA's checkers.

    python -m metal_kernels.host.run_on_gpu tests.metal_host.samples --repeats 1000 --sanitize

The argument is a module with a function `cases()`; needs NumPy, ml_dtypes, CuPy and, for --sanitize, compute-sanitizer.
Exits with 1 if a case misses its reference, if two runs of a case differ in a bit, or if a checker reports anything.
"""

import argparse
import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from .case import Case
from .cupy_runner import run_on_gpu

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def check(case: Case, repeats: int, poison: bool) -> bool:
    """Runs one case, prints a line, and says whether all is well."""
    first = run_on_gpu(case.kernel, **case.call, poison=poison)
    errors = ", ".join(f"{error:.2e}" for error in case.errors(first))
    different = 0
    for _ in range(repeats):
        again = run_on_gpu(case.kernel, **case.call, poison=poison)
        different += any(a.tobytes() != b.tobytes() for a, b in zip(first, again, strict=True))
    good = case.is_met_by(first) and not different
    print(f"{'ok  ' if good else 'FAIL'} {case.name}: error ratio {errors}; {different} of {repeats} repeats differ")
    return good


def sanitize(module: str, tool: str) -> bool:
    """Runs the cases once more under one tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise SystemExit("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    poison = [] if tool != "initcheck" else ["--no-poison"]
    command = [program, "--tool", tool, "--error-exitcode", "99", "--kernel-name", "kernel_name=msl_entry"]
    this = [sys.executable, "-m", "metal_kernels.host.run_on_gpu", module, "--repeats", "0", *poison]
    done = subprocess.run([*command, *this], capture_output=True, text=True, check=False)
    print(f"{'ok  ' if done.returncode == 0 else 'FAIL'} compute-sanitizer {tool}")
    if done.returncode:
        print((done.stdout + done.stderr)[-6000:])
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="a module with a function cases(), such as tests.metal_host.samples")
    parser.add_argument("--repeats", type=int, default=10, help="runs that must give the same bits (default: 10)")
    parser.add_argument("--sanitize", action="store_true", help="also run once under each tool of compute-sanitizer")
    parser.add_argument("--no-poison", action="store_true", help="leave outputs unset instead of NaN (for initcheck)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("cupy") is None:
        raise SystemExit("CuPy is not installed: pip install cupy-cuda13x (or the package for your CUDA)")
    cases = importlib.import_module(arguments.module).cases()
    results = [check(case, arguments.repeats, not arguments.no_poison) for case in cases]
    if arguments.sanitize:
        results += [sanitize(arguments.module, tool) for tool in TOOLS]
    print(f"{sum(results)} of {len(results)} good")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
