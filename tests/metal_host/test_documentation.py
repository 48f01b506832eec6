"""metal_kernels/README.md: its Python runs, prints what it says, and its counts are those of the tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import test_barriers, test_faults

pytestmark = pytest.mark.usefixtures("harness")

ROOT = Path(__file__).parents[2]
README = (ROOT / "metal_kernels/README.md").read_text()


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for found, text in fences if found == language]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_run_and_print_what_they_say() -> None:
    example, installation = blocks("python")
    printed = run_python(example).splitlines()
    shown = blocks("")[0].splitlines()
    assert len(printed) == len(shown)
    for got, said in zip(printed, shown, strict=True):
        assert got.startswith(said.removesuffix("..."))
    assert run_python(installation) == ""


def test_the_commands_exist() -> None:
    for module in re.findall(r"python -m (metal_kernels\.\S+|tests\.metal_host\.\S+?)[\s`]", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    for path in re.findall(r"`(?:sh )?((?:metal_kernels/|tests/)[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_counts_are_the_tests() -> None:
    wrong, refused, sound = len(test_faults.RUNS_WRONG), len(test_faults.REFUSED), len(test_faults.SOUND)
    assert f"{wrong} faults planted" in README
    assert f"{refused} more are refused" in README
    assert f"{sound} kernels that are sound" in README
    assert f"Each of the {len(test_barriers.MUTANTS) // 2} barriers" in README
