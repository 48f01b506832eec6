"""Runs from the first step to the exported model: batches, processes, kills and resumption, failures, curves."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from bmojo_edge import checkpoint, golden, run_log
from bmojo_edge.checks import ConfigError
from bmojo_edge.cli import app
from bmojo_edge.divergence import STEPS, Divergence
from bmojo_edge.tensors import CheckpointError
from bmojo_edge.torch import load
from bmojo_edge.torch.parallel import World
from bmojo_edge.torch.run_checkpoint import RunCheckpoints
from bmojo_edge.torch.train import Diverged, Trainer, train
from bmojo_edge.train_config import TrainConfig
from tests.absent import absent
from tests.helpers import rms_ratio
from tests.training import SMALL, finish, losses, make_data, settings, start


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def whole(root: Path) -> TrainConfig:
    """A run from beginning to end."""
    config = settings(root, "whole")
    train(config)
    return config


def last_tensors(config: TrainConfig) -> dict[str, np.ndarray]:
    """All tensors of the last checkpoint of a run."""
    checkpoints = RunCheckpoints(Path(config.out) / "checkpoints", 1)
    step = checkpoints.steps()[-1]
    integers = ("positions", "position", "offset")
    found = {
        name: torch.zeros(shape, dtype=torch.int64 if name.endswith(integers) else torch.float32)
        for name, shape in checkpoints.shapes(step).items()
    }
    checkpoints.load(step, found)
    return {name: tensor.numpy() for name, tensor in found.items()}


def assert_same_run(got: TrainConfig, want: TrainConfig) -> None:
    """The same losses and the same last checkpoint, bit for bit."""
    assert losses(got) == losses(want)
    ours, theirs = last_tensors(got), last_tensors(want)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


# --- one process ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_that_loads(whole: TrainConfig) -> None:
    folder = Path(whole.out) / "model"
    model = load(folder, verify=True)
    made = golden.read(folder)
    assert made is not None and "reference" in made.author
    stored, trained = checkpoint.read(folder)[1], last_tensors(whole)
    for name in stored:
        np.testing.assert_array_equal(stored[name], trained[f"model.{name}"], err_msg=name)
    assert model.config.vocab_size == 37
    assert losses(whole)[-1] < losses(whole)[0]


def test_the_model_converts_and_runs_on_the_other_engine(whole: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    import bmojo_edge as be
    from bmojo_convert import convert

    convert(str(Path(whole.out) / "model"), tmp_path / "converted", dtype="float32")
    tokens = np.arange(60)[None] % 37
    ours = be.load(tmp_path / "converted", verify=True)
    got, _ = ours.forward(tokens, ours.init_state())
    want, _ = load(Path(whole.out) / "model")(tokens)
    assert rms_ratio(np.asarray(got), want) < 1e-5


def test_the_log_tells_every_step(whole: TrainConfig) -> None:
    begin, *steps = run_log.read(whole.out)
    assert begin["event"] == "start" and begin["tokens_per_step"] == 48 and begin["flops_per_token"] > 0
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in steps] == [48 * n for n in range(1, 7)]
    assert all(record["tokens_per_s"] > 0 and record["grad_norm"] > 0 for record in steps)
    assert steps[-1]["lr"] == pytest.approx(1e-5)


def test_accumulated_rows_equal_a_big_batch(root: Path) -> None:
    def gradient(rows: int) -> dict[str, torch.Tensor]:
        config = settings(root, batch={"rows": rows}, model={**SMALL, "layer_types": ["bmojo", "attention"]})
        with World.start("cpu") as world:
            trainer = Trainer(config, world, None)
            found: dict[str, torch.Tensor] = {}
            trainer.optimizer.register_step_pre_hook(
                lambda *_: found.update({n: p.grad.clone() for n, p in trainer.parallel.model.named_parameters()})  # pyright: ignore
            )
            for step in range(2):
                trainer.step(step, trainer.batches(step))
            trainer.close()
        return found

    one_by_one, at_once = gradient(1), gradient(4)
    for name, grad in at_once.items():
        assert rms_ratio(one_by_one[name], grad) < 2e-4, name


@pytest.mark.parametrize("carry", [True, False])
def test_a_run_cut_in_two_is_the_same_run(root: Path, whole: TrainConfig, carry: bool) -> None:
    """With a growing cache as well: its size is not in the settings."""
    layers = {**SMALL, "layer_types": ["bmojo", "attention"]}
    fields: dict[str, Any] = {"data": {"carry": carry}, "model": layers}
    uncut, cut = settings(root, f"uncut-{carry}", **fields), settings(root, f"cut-{carry}", **fields)
    train(uncut)

    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record.get("step") == 5:
            raise Stop

    with pytest.raises(Stop):
        train(cut, watch=stop)
    assert len(losses(cut)) == 5
    train(cut, resume=True)
    assert_same_run(cut, uncut)
    starts = [record["at"] for record in run_log.read(cut.out) if "event" in record]
    assert starts == [0, 4]


def test_resuming_a_finished_run_changes_nothing(whole: TrainConfig) -> None:
    before = last_tensors(whole)
    train(whole, resume=True)
    after = last_tensors(whole)
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert len(losses(whole)) == 6


def test_bfloat16_and_recomputation(root: Path, whole: TrainConfig) -> None:
    config = settings(root, "half", system={"precision": "bfloat16", "recompute": True})
    train(config)
    assert checkpoint.read(Path(config.out) / "model")[0].dtype == "bfloat16"
    np.testing.assert_allclose(losses(config), losses(whole), rtol=0.02)
    assert last_tensors(config)["model.embed.weight"].dtype == np.float32


def test_starting_from_a_model(root: Path, whole: TrainConfig) -> None:
    folder = str(Path(whole.out) / "model")
    config = settings(root, "tuned", model={"init": folder, "window": 9}, steps=1)
    train(config)
    assert load(Path(config.out) / "model").config.window == 9
    with pytest.raises(ConfigError, match="model: does not go with the weights"):
        train(settings(root, "wrong", model={"init": folder, "d_ff": 8}))
    with pytest.raises(ConfigError, match=r"model\.preset: says nothing beside model.init"):
        train(settings(root, "wrong", model={"init": folder, "preset": "tiny"}))
    with pytest.raises(CheckpointError, match="nowhere"):
        train(settings(root, "wrong", model={"init": str(root / "nowhere")}))


def test_validation_is_the_mean_over_its_rows(root: Path) -> None:
    if not (root / "valid").exists():
        make_data(root / "valid", [30, 50, 26], seed=9)
    config = settings(root, "valid-run", data={"valid": str(root / "valid")}, validation={"every": 3, "rows": 5})
    train(config)
    records = [record for record in run_log.read(config.out) if "valid_loss" in record]
    assert [record["step"] for record in records] == [3, 6]
    model = load(Path(config.out) / "model")
    with World.start("cpu") as world:
        trainer = Trainer(config, world, None)
        assert trainer.valid is not None
        total, count = 0.0, 0
        for row in range(5):
            rows = trainer.valid.rows(row, 0, 1)
            logits, _ = model(rows.tokens, segment_ids=rows.segments)
            logs = torch.log_softmax(logits[0].detach().double(), -1)
            for column, target in enumerate(rows.targets[0]):
                if target >= 0:
                    total, count = total - float(logs[column, target]), count + 1
        trainer.close()
    assert records[-1]["valid_loss"] == pytest.approx(total / count, rel=1e-5)


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one_and_checkpoints_go_both_ways(root: Path, whole: TrainConfig, strategy: str) -> None:
    """Steps 1 to 4 in two processes, 5 and 6 in one; then 1 and 2 in one, the rest in two. Validated or not."""
    system: dict[str, Any] = {"strategy": strategy}
    valid: dict[str, Any] = {"data": {"valid": str(root / "data")}, "validation": {"every": 1, "rows": 3}}
    config = settings(root, f"two-{strategy}", system=system, **valid)
    finish(start(config, processes=2))
    np.testing.assert_allclose(losses(config), losses(whole), rtol=1e-5)
    got = last_tensors(config)
    for name, tensor in last_tensors(whole).items():
        assert rms_ratio(got[name], tensor) < 1e-3, name
    _drop_after(config, 4)
    train(config, resume=True)
    np.testing.assert_allclose(losses(config), losses(whole), rtol=1e-5)
    if strategy == "fsdp":
        other = settings(root, "one-then-two", system=system, checkpoints={"keep": 3})
        train(other)
        _drop_after(other, 2)
        finish(start(other, resume=True, processes=2))
        np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-5)
        load(Path(other.out) / "model", verify=True)


def _drop_after(config: TrainConfig, step: int) -> None:
    """Forget the checkpoints after a step."""
    import shutil

    checkpoints = RunCheckpoints(Path(config.out) / "checkpoints", 1)
    for later in checkpoints.steps():
        if later > step:
            shutil.rmtree(checkpoints.path(later))
    assert checkpoints.steps()[-1] == step


# --- kills ------------------------------------------------------------------------------------------------------------


def kill_and_resume(root: Path, name: str, kills: int, steps: int, seed: int, **more: Any) -> None:
    """Kill a run at random moments; every checkpoint there ever is loads, none is lost, and the end is the same."""
    fields: dict[str, Any] = {"steps": steps, "checkpoints": {"every": 1, "keep": 2}, **more}
    want, config = settings(root, f"{name}-want", **fields), settings(root, name, **fields)
    train(want)
    rng, checkpoints, best = random.Random(seed), RunCheckpoints(Path(config.out) / "checkpoints", 2), 0
    for _ in range(kills):
        (process,) = start(config, resume=True)
        deadline = time.monotonic() + 120
        while not checkpoints.steps()[-1:] > [best] and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        there = checkpoints.steps()
        assert there and there[-1] >= best
        best = there[-1]
        for step in there:
            checkpoints.info(step)
            checkpoints.load(step, {k: torch.zeros(shape) for k, shape in checkpoints.shapes(step).items()})
        if best == steps:
            break
    train(config, resume=True)
    assert_same_run(config, want)
    assert not list((Path(config.out) / "checkpoints").glob(".*"))


def test_killed_twice(root: Path) -> None:
    kill_and_resume(root, "killed", kills=2, steps=12, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_ten_random_moments(root: Path, seed: int) -> None:
    kill_and_resume(root, f"killed-{seed}", kills=10, steps=60, seed=seed)


@pytest.mark.cuda
@pytest.mark.parametrize("deterministic", [False, True])
def test_killed_on_a_gpu(tmp_path: Path, deterministic: bool) -> None:
    """In bfloat16, with the kernels, documents that begin and end anywhere, and carried states."""
    make_data(tmp_path / "data", [700, 90, 33, 2000, 450, 64, 128, 1500, 7, 3000] * 4, vocab=256)
    fields: dict[str, Any] = {
        "model": {"preset": "tiny", "n_layers": 2, "n_sinks": 4, "rope_theta": 10_000.0, "qk_norm": True},
        "data": {"sequence_length": 256},
        "batch": {"tokens": 2048, "rows": 4},
        "system": {"device": "cuda", "deterministic": deterministic},
    }
    kill_and_resume(tmp_path, "killed", 2, 24, seed=0, **fields)


# --- failures ---------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def toml(root: Path, tmp_path: Path) -> Path:
    """The settings of `settings` as a file."""
    fields = settings(root).to_dict()
    lines = ["steps = 6", 'out = "run"', "[model]"]
    lines += [f"{key} = {json.dumps(x)}" for key, x in SMALL.items() if not isinstance(x, dict)]
    lines += ["[model.ssm]", *(f"{key} = {json.dumps(x)}" for key, x in SMALL["ssm"].items())]
    lines += ["[data]", f"train = {json.dumps(fields['data']['train'])}", "sequence_length = 12"]
    lines += ["[batch]", "tokens = 48", "[system]", 'device = "cpu"', "[checkpoints]", "every = 2"]
    (tmp_path / "train.toml").write_text("\n".join(lines))
    return tmp_path / "train.toml"


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 5 on losses are not finite."""
    forward, seen = Trainer._forward, [0]

    def poisoned(self: Trainer, rows: Any, state: Any) -> Any:
        loss, state = forward(self, rows, state)
        seen[0] += 1
        return (loss * float("nan") if seen[0] > 4 else loss), state

    monkeypatch.setattr(Trainer, "_forward", poisoned)


def test_the_command_trains_and_says_where_the_model_is(toml: Path, tmp_path: Path) -> None:
    out = tmp_path / "here"
    result = command(str(toml), "--set", f"out={out}", "--set", "steps=2")
    assert result.exit_code == 0, result.output
    assert "2 steps of 48 tokens, cpu, float32" in result.stderr and f"The model is in {out / 'model'}" in result.stderr
    again = command(str(toml), "--set", f"out={out}", "--set", "steps=2")
    assert again.exit_code == 1 and "out: " in again.stderr and "holds a run already" in again.stderr
    changed = command(str(toml), "--set", f"out={out}", "--set", "steps=2", "--set", "seed=1", "--resume")
    assert changed.exit_code == 1 and "seed: is 1, but the run to resume has 0" in changed.stderr


def test_a_loss_that_is_no_number_stops_the_run(toml: Path, tmp_path: Path, poison: None) -> None:
    out = tmp_path / "nan"
    result = command(str(toml), "--set", f"out={out}", "--set", "steps=9")
    assert result.exit_code == 1
    last = out / "checkpoints" / "step-00000004"
    assert f"step 5: the loss is nan; training stopped, the last checkpoint is {last}" in result.stderr
    assert RunCheckpoints(out / "checkpoints", 1).steps()[-1] == 4
    assert len([r for r in run_log.read(out) if "loss" in r]) == 4


def test_a_loss_that_runs_away_stops_the_run(root: Path) -> None:
    config = settings(root, "away", steps=60, optimizer={"lr": 300.0, "final_lr": 300.0}, max_divergence=0.5)
    with pytest.raises(Diverged, match=rf"the mean loss of {STEPS} steps is .* nats above its lowest|is (nan|inf)"):
        train(config)


def test_divergence() -> None:
    def rise(losses: list[float]) -> float:
        return Divergence(losses[:-1]).rise(losses[-1])

    assert rise([1.0] * STEPS) == 0
    assert rise([2.0] * (STEPS - 2) + [50.0]) == 0
    assert rise([5.0] * 30 + [2.0] * 30) == 0
    assert rise([2.0] * 30 + [5.0] * STEPS) == pytest.approx(3.0)
    assert rise([2.0] * 30 + [5.0] * (STEPS // 2)) == pytest.approx(1.5)


def test_errors_are_one_line_and_name_the_field(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for change, message in (
        ("optimizer.lrr=1", "optimizer.lrr: is not a known field"),
        ("data.train=nowhere", "nowhere: no such folder"),
        ("model.window=1.5", "model.window: must be an integer"),
        ("batch.tokens=960", "batch.tokens: a step takes 80 rows"),
        ("system.device=cuda", "system.device: cuda is not available"),
        ("log.wandb=project", "log.wandb: the Python package 'wandb' is not installed"),
    ):
        if change == "system.device=cuda" and torch.cuda.is_available():
            continue
        result = command(str(toml), "--set", change, "--set", f"out={tmp_path / 'x'}")
        assert result.exit_code == 1, change
        assert message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert command().exit_code == 2 or "CONFIG" in command().output
    assert command("--resume").exit_code == 2


def test_a_run_that_failed_before_its_first_step_binds_nobody(toml: Path, tmp_path: Path) -> None:
    out = ("--set", f"out={tmp_path / 'x'}", "--set", "steps=1")
    assert command(str(toml), *out, "--set", "data.train=nowhere").exit_code == 1
    result = command(str(toml), *out, "--resume")
    assert result.exit_code == 0, result.output


def test_the_last_validation_is_told(toml: Path, root: Path, tmp_path: Path) -> None:
    valid = ("--set", f"data.valid={root / 'data'}", "--set", "validation.rows=2", "--set", "validation.every=1")
    result = command(str(toml), "--set", f"out={tmp_path / 'x'}", "--set", "steps=2", *valid)
    told = [record["valid_loss"] for record in run_log.read(tmp_path / "x") if "valid_loss" in record]
    assert [f"step {i}/2  valid {loss:.4f}" in result.stderr for i, loss in enumerate(told, 1)] == [True, True]


def test_two_runs_cannot_share_a_folder(root: Path) -> None:
    config = settings(root, "shared")

    def again(record: dict[str, Any]) -> None:
        if record.get("step") == 1:
            with pytest.raises(ConfigError, match="another process trains in"):
                train(config, resume=True)

    train(config, watch=again)


# --- what is told -----------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    log = run_log.RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("nan") if step == 2 else 1.5})
    log.close()
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [record["step"] for record in run_log.read(tmp_path)] == [1, 2, 3]
    assert run_log.read(tmp_path)[1]["loss"] is None
    again = run_log.RunLog(tmp_path, upto=1)
    again.write({"step": 2, "loss": 1.0})
    again.close()
    assert [record["loss"] for record in run_log.read(tmp_path)] == [1.5, 1.0]
    path.write_text('{"step": 1}\nnothing\n{"step": 2}\n')
    with pytest.raises(run_log.RunLogError, match="line 2 is not a JSON object"):
        run_log.read(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_curves(whole: TrainConfig, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"curves{suffix}"
    result = command("plot", whole.out, str(Path(whole.out) / "log.jsonl"), "--out", str(out))
    assert result.exit_code == 0, result.output
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in content
    if suffix == ".svg":
        assert content.count(b"<!-- tokens -->") == 1
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_curves_of_nothing_are_an_error(tmp_path: Path) -> None:
    result = command("plot", str(tmp_path), "--out", str(tmp_path / "a.png"))
    assert result.exit_code == 1 and "log.jsonl: no such file" in result.stderr
    assert command("plot", str(tmp_path), "--out", "a.pdf").exit_code == 2


def test_tensorboard(root: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        absent("the test of TensorBoard", "tensorboard is not installed")
    config = settings(root, "board", steps=2, log={"tensorboard": True})
    train(config)
    assert list((Path(config.out) / "tensorboard").glob("events.*"))
