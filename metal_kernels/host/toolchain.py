"""clang 19, the flags of each pass, MLX's headers, and a cache of what has been compiled."""

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import CompileError

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
COMPILER = os.environ.get("METAL_HOST_CXX", "clang++-19")
# Every x86-64 since 2013. It has the instructions for half precision.
MARCH = os.environ.get("METAL_HOST_MARCH", "x86-64-v3")
MARCH_NEEDS = {"avx2", "fma", "f16c"}

# Metal's spellings that C++ compilers remark on.
_QUIET = ["unknown-attributes", "duplicate-decl-specifier", "unused-value", "ignored-attributes", "unknown-pragmas"]
KERNEL_FLAGS = [
    "-std=c++17",
    f"-march={MARCH}",
    "-fPIC",
    "-shared",
    "-fno-sanitize-link-runtime",  # the runtime is ours
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Xclang",
    "-ffloat16-excess-precision=none",  # half arithmetic rounds after every operation
    "-Wframe-larger-than=32768",  # a fibre's stack has 64 KiB
    "-Werror=frame-larger-than",
    *(f"-Wno-{warning}" for warning in _QUIET),
]
MODE_FLAGS = {
    "fast": ["-O2"],
    # -fsanitize=thread puts a call before each load and store; the callee is ours (native/shadow.cpp), not tsan's.
    # Vectorised or unrolled code would hide accesses or multiply places.
    "check": [
        "-O1",
        "-g1",
        "-gdwarf-4",  # addr2line loses inlined ranges of version 5
        "-DMSL_CHECK",
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-fno-unroll-loops",
        "-fno-delete-null-pointer-checks",  # an access through null is made, and seen
        "-fsanitize=thread",
        "-mllvm",
        "-tsan-instrument-func-entry-exit=0",
        "-mllvm",
        "-tsan-instrument-read-before-write=1",
        "-fsanitize=alignment,array-bounds,shift,integer-divide-by-zero,float-cast-overflow,signed-integer-overflow",
        "-fstrict-flex-arrays=3",  # an array that ends a struct has its bounds too
        "-fsanitize-recover=all",
        "-ftrivial-auto-var-init=pattern",  # an unset private variable is NaN, and the same one every time
    ],
}
RUNTIME_FLAGS = ["-O2", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]


def unavailable_reason() -> str | None:
    """Why kernels cannot be run on this machine, and what to do; None when they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the Metal host harness runs on x86-64 Linux, not on {sys.platform} {platform.machine()}"
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} is not installed: run metal_kernels/host/install_clang.sh, or set METAL_HOST_CXX"
    if shutil.which("addr2line") is None:
        return "addr2line is not installed: it is in the package binutils"
    if mlx_headers() is None:
        return "the installed mlx has no Metal headers: pip install 'mlx[cpu]>=0.32'"
    cpu = Path("/proc/cpuinfo").read_text()
    missing = sorted(MARCH_NEEDS - set(cpu.split()))
    if missing and "METAL_HOST_MARCH" not in os.environ:
        return f"this CPU has no {', '.join(missing)}: set METAL_HOST_MARCH to what it has, x86-64-v2 for instance"
    return None


@functools.cache
def mlx_headers() -> Path | None:
    """The include directory of the installed MLX: its utils.h precedes every custom kernel, and so it does here."""
    spec = importlib.util.find_spec("mlx")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "include/mlx/backend/metal/kernels/utils.h").is_file():
            return Path(folder) / "include"
    return None


def include_flags() -> list[str]:
    headers = mlx_headers()
    ours = [f"-I{INCLUDE / 'mlx_override'}", f"-I{INCLUDE}"]
    return ours + (["-isystem", str(headers)] if headers else [])


def compile_with(flags: Sequence[str], stdin: str | None = None) -> None:
    """Runs the compiler. Raises `CompileError` with what it said."""
    try:
        done = subprocess.run([COMPILER, *flags], input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CompileError(unavailable_reason() or f"{COMPILER} cannot be started") from None
    if done.returncode:
        raise CompileError(done.stderr[:6000])


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """The shared object that `build` writes for `key`; built once for all processes and sessions."""
    folder = Path(os.environ.get("METAL_HOST_CACHE") or Path.home() / ".cache" / "bmojo-metal-host")
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((key + _fingerprint()).encode()).hexdigest()[:24]
    path = folder / f"{digest}.so"
    if not path.exists():
        unfinished = folder / f"{digest}.{os.getpid()}.so"
        try:
            build(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


@functools.cache
def _fingerprint() -> str:
    """Everything besides its source that a compiled kernel depends on."""
    digest = hashlib.sha256(f"{COMPILER} {KERNEL_FLAGS} {MODE_FLAGS} {RUNTIME_FLAGS}".encode())
    sources = [*INCLUDE.rglob("*"), *(HERE / "native").iterdir()]
    headers = mlx_headers()
    if headers:
        sources.append(headers / "mlx/backend/metal/kernels/utils.h")
    for path in sorted(sources):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
