"""Where the harness cannot run, its tests are skipped with a reason that says what to do; in CI they fail instead."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metal_kernels.host import CompileError, Run, metal_kernel, toolchain, unavailable_reason
from metal_kernels.host.runtime import runtime_library

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="clang could not be installed here anyway"
)


def run_a_test(**environment: str) -> str:
    """The summary of one of the harness's tests in a process of its own, on a machine without clang."""
    test = "tests/metal_host/test_faults.py::test_a_finding_in_a_helper_names_both_lines"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", test],
        cwd=ROOT,
        env={**os.environ, "METAL_HOST_CXX": "no-such-clang", "CI": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


@linux
def test_without_clang_tests_are_skipped() -> None:
    output = run_a_test()
    assert "1 skipped" in output
    assert "no-such-clang is not installed: run metal_kernels/host/install_clang.sh" in output


@linux
def test_without_clang_tests_fail_in_ci() -> None:
    output = run_a_test(CI="true")
    assert "1 error" in output
    assert "CI must run the Metal kernels: no-such-clang is not installed" in output


def test_other_systems_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert unavailable_reason() == "the Metal host harness runs on x86-64 Linux, not on darwin arm64"


@linux
def test_a_kernel_called_without_clang_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolchain, "COMPILER", "no-such-clang")
    with pytest.raises(CompileError, match="no-such-clang is not installed"):
        toolchain.cached("anything", lambda output: toolchain.compile_with(["-o", str(output)]))


@linux
def test_installing_clang_does_nothing_where_it_is_or_cannot_be(tmp_path: Path) -> None:
    script = str(ROOT / "metal_kernels/host/install_clang.sh")
    for tool in ("uname", "id"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    environment = {"PATH": str(tmp_path), "METAL_HOST_CXX": "some-clang"}
    done = subprocess.run(["/bin/sh", script], env=environment, capture_output=True, text=True, check=True)
    assert "some-clang is missing" in done.stderr
    assert "apt-get install clang-19" in done.stderr
    (tmp_path / "some-clang").symlink_to("/bin/true")
    done = subprocess.run(["/bin/sh", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.usefixtures("harness")
def test_compiled_kernels_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime_library()  # its place is settled before the cache's is changed
    monkeypatch.setenv("METAL_HOST_CACHE", str(tmp_path))
    call = {"inputs": [np.ones(8, np.float32)], "grid": (8, 1, 1), "threadgroup": (8, 1, 1)}
    call |= {"output_shapes": [(8,)], "output_dtypes": [np.float32]}
    source = "uint i = thread_position_in_grid.x; o[i] = x[i];"
    for _ in range(2):
        metal_kernel("kept", ["x"], ["o"], source)(**call, run=Run(mode="fast"))
        (only,) = tmp_path.iterdir()
        assert only.suffix == ".so"
