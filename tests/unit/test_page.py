"""The files of the chat page: whole, ours or as their authors published them, and without a way to the outside."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from pathlib import Path

import pytest

PAGE = Path(str(files("bmojo_edge") / "server" / "page"))
OURS = sorted(path for path in PAGE.iterdir() if path.suffix in (".html", ".css", ".js", ".svg"))
SCRIPTS = [path for path in OURS if path.suffix == ".js"]


def test_files_of_others_are_those_that_were_published() -> None:
    rows = re.findall(r"^\| `(\S+)` \|.*\| `([0-9a-f]{64})` \|$", (PAGE / "vendor" / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {path.name for path in (PAGE / "vendor").glob("*.js")}
    for name, expected in rows:
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == expected, name
        assert (PAGE / "vendor" / name).with_suffix(".LICENSE").stat().st_size > 1000


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_what_a_file_names_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"""(?:src|href)="([^"$#]+)["#]|from "([^"]+)"|import\("([^"]+)"\)""", text)
    for name in filter(None, (name for names in found for name in names)):
        assert (PAGE / name).is_file(), name
    drawn = set(re.findall(r'<symbol id="icon-(\w+)"', (PAGE / "index.html").read_text(encoding="utf-8")))
    assert len(drawn) > 10
    asked = re.findall(r'href="#icon-(\w+)"|\bicon(?:Button)?\("(\w+)"', text)
    assert {html or script for html, script in asked} <= drawn


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_nothing_is_inline_and_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.findall(r"@import|url\(", text)
    if path.suffix == ".html":
        assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_text_becomes_markup(path: Path) -> None:
    ways = (
        r"(inner|outer)HTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|\beval\(|Function\("
    )
    assert not re.search(ways, path.read_text(encoding="utf-8"))


def test_every_script_says_what_it_is() -> None:
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("// ") and len(text.splitlines()) <= 300, path.name
