"""Models learn what they can, cells are run once, and results outlive the run."""

import argparse
import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from apps.repro import cells, sweep  # noqa: E402
from apps.repro.inside import by_distance, what_is_kept  # noqa: E402
from apps.repro.ledger import Ledger, missing  # noqa: E402
from apps.repro.models import MAX_STATES, MODELS, config_of, matching_state, memory_bytes  # noqa: E402
from apps.repro.tasks import IGNORED, TASKS  # noqa: E402
from apps.repro.training import Questions, Recipe, Run, _queries, groups, questions, schedule, train_together  # noqa: E402
from bmojo_edge.torch import Model  # noqa: E402

SIZES: dict[str, Any] = {"vocab_size": 16, "d_model": 32, "window": 8, "n_eidetic": 8}
CPU = torch.device("cpu")


def induction(seed: int, n: int) -> Questions:
    return questions(TASKS["induction_heads"].make(np.random.default_rng(seed), n, 16, 1), CPU)


def run_of(model: str, **recipe: float) -> Run:
    settings = {"lr": 1e-2, "seed": 0, "epochs": 6, "batch": 64, **recipe}
    config = config_of(model, d_state=16, **SIZES)
    return Run(config, induction(0, 2048), induction(1, 256), Recipe(**settings), CPU)  # pyright: ignore[reportArgumentType]


def test_a_transformer_learns_induction() -> None:
    (run,) = train_together(iter([lambda: run_of("transformer")]), at_once=2)
    assert run.outcome.best > 0.99
    assert run.outcome.steps == 32 * len(run.outcome.curve)
    assert run.score(induction(2, 100)) > 0.97


def test_a_window_that_cannot_see_does_not() -> None:
    (run,) = train_together(iter([lambda: run_of("window", epochs=1)]), at_once=1)
    assert run.outcome.accuracy < 0.9


@pytest.mark.parametrize("fresh", [False, True])
def test_what_an_epoch_shows(fresh: bool) -> None:
    run = run_of("window", fresh=fresh, epochs=4)
    shown = []
    for _ in range(4):
        run.begin_epoch()
        shown.append(run.order.tolist())
        assert len(set(shown[-1])) == len(shown[-1]) == run.batches * 64
    assert len({row for epoch in shown for row in epoch}) == 2048
    assert run.batches == (8 if fresh else 32)
    assert shown[0] != shown[1]


def test_unfinished_runs_are_not_results() -> None:
    clock = count()
    runs = train_together(iter([lambda: run_of("transformer", enough=2.0)]), 1, more_time=lambda: next(clock) < 2)
    assert list(runs) == []


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_in_one_group(model: str) -> None:
    run = run_of(model, ssm_lr=5.0)
    found = groups(run.model, run.recipe)
    listed = [id(parameter) for group in found for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in run.model.parameters())
    fast = {group["scale"] for group in found}
    assert fast == ({1.0, 5.0} if model not in ("transformer", "window") else {1.0})


def test_schedule_rises_and_falls_to_nothing() -> None:
    rates = schedule(Recipe(lr=1.0, seed=0), 1000)
    assert len(rates) == 1000 and max(rates) == 1.0 == rates[99]
    assert rates[0] == 0.01 and rates[-1] < 1e-5 and rates[99:] == sorted(rates[99:], reverse=True)


def test_queries_are_the_scored_columns() -> None:
    targets = torch.tensor([[IGNORED, 3, IGNORED, 4], [5, IGNORED, IGNORED, IGNORED]])
    assert _queries(targets).tolist() == [[1, 3], [0, 0]]


def test_memory_is_that_of_the_state() -> None:
    config = config_of("bmojo", d_state=16, **SIZES)
    found = memory_bytes(config, 256)
    p = 2 * 8 * 32 * 4  # keys and values of 8 slots of a layer, float32
    assert found["rings"] == 2 * (p + 2 * p + 8 * 4)  # window, window + fading, scores
    assert found["eidetic"] == 2 * (p + 8 * 4 + 8 * 8)
    assert found["ssm"] == 2 * 4 * (64 * 16 + 3 * 64)
    assert found["total"] == config.state_bytes() - 16  # position and offset
    assert memory_bytes(config_of("transformer", d_state=16, **SIZES), 256)["total"] == 2 * 2 * 256 * 32 * 4


def test_equal_memory_favours_the_ssm() -> None:
    budget = memory_bytes(config_of("bmojo", d_state=16, **SIZES), 256)["total"]
    for wanted in (budget // 2, budget, 100 * budget):
        found = matching_state("mamba", wanted, 256, **SIZES)
        less = (
            {**found, "expand": found["expand"] // 2}
            if found["expand"] > 2
            else {**found, "d_state": found["d_state"] // 2}
        )
        assert found["d_state"] <= MAX_STATES and (found["expand"] == 2 or found["d_state"] == MAX_STATES)
        assert memory_bytes(config_of("mamba", **found, **SIZES), 256)["total"] >= wanted
        assert memory_bytes(config_of("mamba", **less, **SIZES), 256)["total"] < wanted


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    sweep.main()


def test_sweep_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned_cells = [cells.Cell("window", 1, lr, task="induction_heads", seq_len=16) for lr in (1e-3, 1e-2)]

    def planned(rows: object) -> list[cells.Cell]:
        """Two learning rates."""
        return planned_cells

    monkeypatch.setitem(cells.STAGES, "recall", planned)
    arguments = ["--stage", "recall", "--device", "cpu", "--train", "128", "--epochs", "1", "--out", str(tmp_path)]
    main(monkeypatch, *arguments, "--minutes", "0")
    assert not [*tmp_path.iterdir()] and "out of time" in capsys.readouterr().err
    main(monkeypatch, *arguments)
    found = json.loads((tmp_path / "induction_heads.json").read_text())
    assert {row["lr"] for row in found["rows"]} == {1e-3, 1e-2}
    for name in ("machine", "versions", "commit"):
        assert found[name]
    for name in (
        "model",
        "seq_len",
        "pairs",
        "d_model",
        "window",
        "n_eidetic",
        "memory_bytes",
        "lr",
        "seed",
        "accuracy",
    ):
        assert name in found["rows"][0]
    capsys.readouterr()
    main(monkeypatch, *arguments)
    assert "0 cells ended" in capsys.readouterr().out
    main(monkeypatch, *arguments[:-4], "--epochs", "2", "--out", str(tmp_path), "--list")
    assert " 2 " in capsys.readouterr().out  # another recipe is another result


def as_if_run(planned: list[cells.Cell], **best: Any) -> list[dict[str, Any]]:
    """Rows of cells, right where a cell has the values of `best` and wrong elsewhere."""
    right = [all(getattr(cell, name) == value for name, value in best.items()) for cell in planned]
    return [{**cell.key(), "accuracy": float(x), "steps": 1} for cell, x in zip(planned, right, strict=True)]


def test_seeds_follow_the_best_rate() -> None:
    rows = as_if_run(cells.stage_recall([]), lr=3e-3)
    found = cells.stage_seeds(rows)
    assert len(found) == 2 * len(MODELS)
    assert {cell.lr for cell in found} == {3e-3} and {cell.seed for cell in found} == {1, 2}
    assert all(cell.lr == 3e-3 for cell in cells.stage_choices(rows)) and len(cells.stage_choices(rows)) == 12
    assert not cells.stage_seeds([row for row in rows if row["lr"] != 1e-2])  # not all rates have been tried


@pytest.mark.parametrize("rotary", [False, True])
def test_later_stages_have_the_better_positions(rotary: bool) -> None:
    rows = as_if_run([*cells.stage_recall([]), *cells.stage_easy([])], rotary=rotary)
    for stage in (cells.stage_wide, cells.stage_long, cells.stage_memory, cells.stage_others):
        found = stage(rows)
        assert {cell.rotary for cell in found if cell.model in cells.POSITIONS} == {rotary}
        assert not any(cell.rotary for cell in found if cell.model not in cells.POSITIONS)
    assert len(cells.stage_wide(rows)) == len(cells.stage_long(rows)) == 3 * len(MODELS)
    short = [row for row in rows if row["pairs"] != 32]
    assert not {cell.model for cell in cells.stage_wide(short)} & {*cells.POSITIONS}


def test_equal_memory_is_at_least_that_of_bmojo() -> None:
    rows = as_if_run([*cells.stage_recall([]), *cells.stage_easy([])], rotary=True)
    found = cells.stage_memory(rows)
    assert {(cell.model, cell.pairs) for cell in found} == {
        (model, pairs) for model in ("mamba", "bmojo-f", "hybrid") for pairs in (16, 32, 64)
    }
    for cell in found:
        bmojo = memory_bytes(config_of("bmojo", **cell.sizes()), 256)["total"]
        config = config_of(cell.model, d_state=cell.d_state, expand=cell.expand, **cell.sizes())
        assert memory_bytes(config, 256)["total"] >= bmojo


def test_a_stage_may_ask_for_more_epochs() -> None:
    rows = as_if_run(cells.stage_recall([]), lr=3e-3)
    assert {cell.epochs for cell in cells.stage_longer(rows)} == {4 * cells.Cell.epochs}
    args = argparse.Namespace(train=64, epochs=2, batch=8, repeated=False, model=list(MODELS), d_state=None)
    small = [{**row, "train": 64, "epochs": 2, "batch": 8} for row in rows]
    assert {cell.epochs for cell in sweep.planned("longer", small, args)} == {8}
    assert not sweep.planned("longer", rows, args)  # those were another recipe's


def test_every_stage_is_planned_for_another_recipe() -> None:
    args = argparse.Namespace(train=64, epochs=2, batch=8, repeated=True, model=list(MODELS), d_state=None)
    rows: list[dict[str, Any]] = []
    for stage in cells.STAGES:  # each with the rows of those before it, as a sweep finds them
        found = sweep.planned(stage, rows, args)
        assert found, stage
        assert all((cell.train, cell.batch, cell.fresh) == (64, 8, False) for cell in found)
        rows += as_if_run(missing(found, rows), lr=3e-3, rotary=True)


def test_answers_by_distance() -> None:
    tokens = np.array([[7, 70, 8, 80, 0, 0, 8, 80, 7, 70]])
    right, columns = np.array([[True, False]]), np.array([[6, 8]])
    assert by_distance(tokens, right, columns, 2, 4) == [[4, 1, 1], [8, 1, 0]]


def test_damaged_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "mqar.json").write_text('{"rows"')
    with pytest.raises(SystemExit, match=r"mqar\.json"):
        Ledger(tmp_path, tmp_path / "claims")


def test_a_cell_is_given_out_once(tmp_path: Path) -> None:
    plan = [cells.Cell("window", 1, lr, task="induction_heads") for lr in (1e-3, 1e-2)]
    one, other = (Ledger(tmp_path, tmp_path / "claims") for _ in range(2))
    assert one.claim(lambda _: plan) == plan[0]
    assert other.claim(lambda _: plan) == plan[1]
    assert one.claim(lambda _: plan) is None
    one.add({**plan[0].key(), "accuracy": 1.0})
    again = Ledger(tmp_path, tmp_path / "claims of the next run")
    assert again.claim(lambda _: plan) == plan[1]
    assert [row["lr"] for row in other.rows()] == [1e-3]


def test_what_is_kept_is_what_the_memory_holds() -> None:
    config = config_of("bmojo", **{**SIZES, "vocab_size": 8192})
    torch.manual_seed(0)
    tokens, targets = TASKS["mqar"].make(np.random.default_rng(0), 3, 48, 8)
    found = what_is_kept(Model(config), tokens, targets, 8)
    for share, texts in zip(found["share"], found["positions"], strict=True):
        rows = [[int(p) for p in text.split()] for text in texts]
        assert all(len(row) == SIZES["n_eidetic"] and max(row) < 48 - SIZES["window"] for row in rows)
        held = np.zeros((3, 48), bool)
        for row, positions in enumerate(rows):
            held[row, positions] = True
        assert share["keys"] == held[:, 0:16:2].mean() and share["values"] == held[:, 1:16:2].mean()
        assert share["queries"] == held[targets != IGNORED].mean()
