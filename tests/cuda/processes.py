"""Tests in a process of their own where Triton interprets its kernels, and machine code where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.absent import absent

ROOT = Path(__file__).parents[2]


def need_triton(what: str) -> None:
    """Skip, or fail in CI on x86-64 Linux, where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        absent(what, "Triton is not installed", expected=sys.platform == "linux" and platform.machine() == "x86_64")


def run_interpreted(name: str, select: str) -> None:
    """Run the tests of tests/cuda/`name` that -k `select`s on Triton's interpreter; every one must pass."""
    need_triton("Triton's kernels on its interpreter")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", select]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "cuda" / name)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert not re.search(r"skipped|xfailed", done.stdout), done.stdout


class Code(NamedTuple):
    """What the assembler says of a kernel."""

    registers: int
    spilled: int  # bytes of stack and local memory
    text: str
    shared: int = 0  # bytes of shared memory


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, warps: int = 1, stages: int = 1
) -> Code:
    """Machine code of a kernel for sm_`arch`, no GPU needed; pointers and the sizes in `types` are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name] != "constexpr"
    }
    done = triton.compile(
        (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(done.asm["cubin"])
        told = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found, told
    registers, stack, local = map(int, found.groups())
    return Code(registers, stack + local, done.asm["ptx"], done.metadata.shared)
