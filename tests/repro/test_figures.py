"""The page's tables are those of the result files, and show what they say they show."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from apps.repro import cells, figures, rows


def row(cell: cells.Cell, accuracy: float, **more: Any) -> dict[str, Any]:
    return {**cell.key(), "accuracy": accuracy, "far_accuracy": 0.0, "steps": 1, "memory_bytes": 1024, **more}


def test_the_page_is_what_the_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["figures", "--check"])
    with pytest.raises(SystemExit) as ended:
        figures.main()
    assert ended.value.code == 0


def test_a_changed_page_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        figures.PAGE.read_text(encoding="utf-8").replace("| 256 tokens, 16 pairs", "| 257 tokens, 16 pairs")
    )
    monkeypatch.setattr(figures, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["figures", "--check"])
    with pytest.raises(SystemExit, match="tables are not those of the result files"):
        figures.main()


def test_the_learning_rate_of_seed_0_is_that_of_all_seeds() -> None:
    mamba = cells.Cell("mamba", 16, 1e-3)
    found = [row(mamba, 0.5), *(row(other, 0.9) for other in cells.changed([mamba], lr=3e-3))]
    found += [row(other, 1.0) for other in cells.changed([mamba], seed=1)]
    found += [row(other, 0.1) for other in cells.changed([mamba], lr=3e-3, seed=1)]
    ((best, other),) = rows.best_rates(found).values()
    assert (best["accuracy"], other["accuracy"]) == (0.9, 0.1)


def test_other_recipes_are_not_compared() -> None:
    usual = cells.Cell("bmojo", 16, 1e-3)
    changes: list[dict[str, Any]] = [
        {"fresh": False}, {"epochs": 128}, {"window": 8}, {"ssm_lr": 5.0}, {"options": (("chunk", 8),)},
    ]  # fmt: skip
    others = [other for change in changes for other in cells.changed([usual], **change)]
    assert rows.plain([row(cell, 1.0) for cell in (usual, *others)]) == [row(usual, 1.0)]
    fewer = cells.changed([usual], n_eidetic=16)
    assert rows.usual_slots([row(cell, 1.0) for cell in (usual, *fewer)]) == [row(usual, 1.0)]
    counted = rows.by_slots({"rows": [row(usual, 0.9), *(row(cell, 0.2) for cell in fewer)]})
    assert counted == {"16 pairs, no positions": {128: 0.9, 16: 0.2}}
