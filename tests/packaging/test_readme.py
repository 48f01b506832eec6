"""Every command in the documents exists: `make` targets, `bmojo-edge` verbs and each option given to them.

The README's Python runs as it stands, on a small random model in the folder it names.
"""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from typer.core import TyperGroup as Group
from typer.main import get_command

from bmojo_edge.cli import app
from bmojo_edge.config import Config

ROOT = Path(__file__).parents[2]
IMPORT_ROOTS = (".", "metal_kernels", "cuda_kernels", "converters")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(program: str) -> list[str]:
    """The commands of `program` in fenced blocks and code spans, without their comments."""
    found: set[str] = set()
    for document in DOCUMENTS:
        text = document.read_text()
        fences = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
        lines = [line for fence in fences for line in fence.splitlines()]
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        for line in lines + spans:
            match = re.search(rf"(?:^|(?<=\s)|(?<=/)){program}(\s.*|$)", line.split(" # ")[0].strip())
            found |= {" ".join(match.group().split())} if match else set()
    return sorted(found)


def test_the_readme_has_the_commands_these_tests_look_for() -> None:
    assert 'make chat PROMPT="What is the capital of France?"' in commands("make")
    assert "make test" in commands("make")
    assert any(command.startswith("bmojo-edge convert") for command in commands("bmojo-edge"))


@pytest.mark.parametrize("command", commands("make"))
def test_make_target_exists(command: str) -> None:
    dry_run = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert dry_run.returncode == 0, dry_run.stderr


@cache
def help_of(*verbs: str) -> str:
    code = "import sys; from bmojo_edge.cli import main; sys.argv[0] = 'bmojo-edge'; sys.exit(main())"
    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-c", code, *verbs, "--help"], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def verb_of(words: list[str]) -> list[str]:
    """The words that name a command: one, or two where the first is a group; `train FILE` is `train run FILE`."""
    if not words or words[0].startswith("-"):
        return []
    group = get_command(app).commands.get(words[0])  # type: ignore[attr-defined]
    if not isinstance(group, Group):
        return words[:1]
    return words[:2] if len(words) > 1 and words[1] in group.commands else [words[0], *(["run"] if words[1:] else [])]


@pytest.mark.parametrize("command", commands("bmojo-edge"))
def test_verb_and_its_options_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    verb = verb_of(words)
    options = [word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)]
    for option in options:
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_of(*verb)), option
    assert help_of(*verb)


def test_python_example_runs(model: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in IMPORT_ROOTS)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], env=env, cwd=model.parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    position, nbytes = map(int, done.stdout.split()[-2:])
    assert position > 0
    assert nbytes == Config.from_json((model / "config.json").read_text()).state_bytes()
