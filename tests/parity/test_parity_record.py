"""Records of what a model computes: the same on other engines, and every kind of difference told."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from bmojo_edge import checkpoint, parity
from bmojo_edge.cli import app
from bmojo_edge.config import Config
from bmojo_edge.parity import Oracle, ParityError, Record, borders, checksum, default_tokens, pieces, tokens_for
from bmojo_edge.parity_check import BOUNDS, check, tie, wrong_sets
from bmojo_edge.reference_memory import top_positions
from bmojo_edge.state import State
from tests.helpers import GRID, odd, random_weights

ENGINES = ("torch", "mlx")


def observed(engine: str, folder: Path) -> Any:
    if engine == "torch":
        from bmojo_edge.torch.parity import Observed as Torch

        return Torch(folder)
    from bmojo_edge.mlx.parity import Observed

    return Observed(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Model folders by name of the grid and dtype, each written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str, dtype: str = "float32", seed: int = 0) -> Path:
        path = root / f"{name} {dtype} {seed}"
        if not path.exists():
            checkpoint.save(path, GRID[name].replace(dtype=dtype), random_weights(GRID[name], seed))
        return path

    return folder


@pytest.fixture(scope="module")
def oracle_record(folders: Callable[..., Path]) -> Record:
    return parity.record(folders("all"), Oracle(folders("all")))


# --- agreement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["all", "mixed", "no ssm", "no eidetic", "mamba", "experts", "window of one"])
def test_the_oracle_and_the_twins_agree(tmp_path: Path, folders: Callable[..., Path], engine: str, name: str) -> None:
    n = None if default_tokens(GRID[name]) < 100 else 60
    parity.record(folders(name), Oracle(folders(name)), n).save(tmp_path / "record")
    record = Record.open(tmp_path / "record")
    comparison = check(folders(name), record, observed(engine, folders(name)))
    assert comparison.failures == [] and 0 < comparison.logits < BOUNDS["float32"]
    memories = {layer.kind: set(layer.errors) for layer in comparison.layers}
    expected = {"output", "window"} | ({"ssm"} if GRID[name].ssm else set())
    expected |= {"eidetic", "history", "innovation"} if GRID[name].n_eidetic else set()
    expected |= ({"sinks"} if GRID[name].n_sinks else set()) | ({"fading"} if GRID[name].n_fading else set())
    wanted = {"bmojo": expected, "mamba": {"output", "ssm"}, "attention": {"output", "cache"}}
    assert memories == {kind: wanted[kind] for kind in memories}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_agrees_across_engines(folders: Callable[..., Path], dtype: str) -> None:
    folder = folders("qk-norm", dtype)
    record = parity.record(folder, observed("torch", folder))
    comparison = check(folder, record, observed("mlx", folder))
    assert comparison.failures == [] and comparison.logits > 10 * BOUNDS["float32"]


def test_quantised_weights_and_shards(tmp_path: Path) -> None:
    config = odd(d_model=32, d_ff=32, head_dim=8, quantization={"bits": 8, "group_size": 32})
    weights = random_weights(config)
    checkpoint.save(tmp_path / "one", config, weights)
    checkpoint.save(tmp_path / "cut", config, weights, shard_bytes=20_000)
    assert len(list((tmp_path / "cut").glob("model-*"))) > 1
    record = parity.record(tmp_path / "one", Oracle(tmp_path / "one"), 40)
    for engine in ENGINES:
        assert check(tmp_path / "cut", record, observed(engine, tmp_path / "cut"), bound=3e-5).failures == []


def test_every_border_is_crossed_in_every_way() -> None:
    for config in GRID.values():
        n = default_tokens(config)
        assert all(border + 1 < n for border in borders(config).values())
        ways = pieces(config, n)
        assert all(sum(lengths) == n for lengths in ways.values())
        cuts = set(np.cumsum(ways["pieces"]).tolist())
        assert all({border - 1, border, border + 1} - {0} <= cuts for border in borders(config).values())
        steps = ways["decode"][1:]
        assert set(steps) == {1} and any((n - k) % config.chunk_size == 0 for k in range(1, len(steps) + 1))
    assert pieces(GRID["all"], 1) == {"whole": [1], "pieces": [1]}
    assert len(set(tokens_for(1000, 500).tolist())) > 350 and tokens_for(3, 9).max() == 2


def test_one_token(folders: Callable[..., Path]) -> None:
    record = parity.record(folders("all"), Oracle(folders("all")), 1)
    assert check(folders("all"), record, observed("mlx", folders("all"))).failures == []


# --- differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "memory"),
    [
        ("mixer.o_proj.weight", "output"),
        ("mlp.down_proj.weight", "output"),
        ("mixer.k_proj.weight", "window"),
        ("mixer.ssm.A_log", "ssm"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_that_computes_something_else_is_named(
    folders: Callable[..., Path], oracle_record: Record, engine: str, weight: str, memory: str
) -> None:
    wrong = observed(engine, folders("all"))
    part: Any = wrong.model.layers[1]
    *owners, leaf = weight.split(".")
    for owner in owners:
        part = getattr(part, owner)
    if engine == "torch":
        getattr(part, leaf).data *= 1.001
    else:
        setattr(part, leaf, getattr(part, leaf) * 1.001)
    comparison = check(folders("all"), oracle_record, wrong)
    first = comparison.failures[0]
    assert first.startswith("layer 1 (bmojo): ") and memory in first and "the bound is 1.0e-05" in first
    assert all(error < BOUNDS["float32"] for error in comparison.layers[0].errors.values())


def test_no_number_is_a_difference(folders: Callable[..., Path], oracle_record: Record) -> None:
    wrong = observed("torch", folders("all"))
    wrong.model.layers[0].mixer.o_proj.weight.data[0, 0] = float("nan")
    comparison = check(folders("all"), oracle_record, wrong)
    assert comparison.failures[0].startswith("layer 0 (bmojo): output inf")
    assert json.loads(json.dumps(comparison.as_json(), allow_nan=False))["layers"][0]["errors"]["output"] is None


def chosen(config: Config, scores: np.ndarray) -> np.ndarray:
    """The sets that innovations (n_layers, n) give."""
    sets = np.full((len(scores), -(-scores.shape[1] // config.chunk_size), config.n_eidetic), -1)
    for layer, chunk in np.ndindex(sets.shape[:2]):
        end = (chunk + 1) * config.chunk_size - config.window
        eligible = np.arange(config.n_sinks, max(config.n_sinks, end))
        kept = eligible[top_positions(scores[layer][eligible], eligible, config.n_eidetic)]
        sets[layer, chunk, : len(kept)] = kept
    return sets


def test_a_machine_that_would_choose_otherwise_fails(folders: Callable[..., Path], oracle_record: Record) -> None:
    scores = oracle_record.scores.copy()
    never = np.setdiff1d(np.arange(2, 16), oracle_record.sets[1])[0]
    assert np.array_equal(chosen(oracle_record.config, scores), oracle_record.sets)
    scores[1, never] = 2 * scores[1].max()
    record = dataclasses.replace(oracle_record, scores=scores, sets=chosen(oracle_record.config, scores))
    for engine in ENGINES:
        comparison = check(folders("all"), record, observed(engine, folders("all")))
        assert comparison.layers[1].swapped > 0 and comparison.layers[1].errors["innovation"] > 0.1
        sentence = rf"layer 1, chunk \d: position {never} is in one set only, .* rounding explains 1.0e-05"
        assert any(re.fullmatch(sentence, problem) for problem in comparison.layers[1].wrong_sets)
        assert comparison.layers[0].wrong_sets == [] and comparison.layers[0].swapped == 0


def test_sets_that_were_changed_are_refused(folders: Callable[..., Path], oracle_record: Record) -> None:
    for position, message in ((2, r"chunk 8: position \d+ is in one set only"), (999, "the set holds what it cannot")):
        sets = oracle_record.sets.copy()
        assert 2 not in sets[1, 8]
        sets[1, 8, 0] = position
        with pytest.raises(ParityError, match=f"not those that its own innovations give: layer 1, .*{message}"):
            check(folders("all"), dataclasses.replace(oracle_record, sets=sets), observed("torch", folders("all")))


@pytest.mark.parametrize(("gap", "wrong"), [(0.5, False), (1.5, True)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_only_ties_may_be_swapped(dtype: str, gap: float, wrong: bool) -> None:
    config = odd("bmojo", n_sinks=0, n_eidetic=2)
    scores = np.linspace(0.1, 0.2, 27)[None].astype(np.float64)
    scores[0, [3, 7]] = 5.0, 4.0
    scores[0, 5] = 4.0 * (1 - gap * tie(dtype))  # the third of all
    others = scores.copy()
    others[0, [5, 7]] = scores[0, [7, 5]]
    swapped, problems = wrong_sets(config, chosen(config, scores), scores, others, tie(dtype))
    assert swapped == [4] and bool(problems) is wrong  # chunks 5 to 8 choose between both
    assert not wrong or re.match("layer 0, chunk 5: position [57] is in one set only", problems[0])


class _Meddling:
    """An engine with something wrong in it."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.config, self.description = engine, engine.config, engine.description

    def run(self, tokens: Any, state: Any, eidetic_index: Any) -> parity.Pass:
        return self.engine.run(tokens, state, eidetic_index)

    def decode(self, token: int, state: State) -> tuple[Any, State]:
        return self.engine.decode(token, state)


class _ForgetsFirst(_Meddling):
    """Chooses sets without their first token, and says so honestly."""

    def run(self, tokens: Any, state: Any, eidetic_index: Any) -> parity.Pass:
        result = self.engine.run(tokens, state, eidetic_index)
        if eidetic_index is None:
            sets = np.array(result.memory.eidetic_index)
            sets[0, 1, 8] = np.append(sets[0, 1, 8, 1:], -1)
            result = result._replace(memory=result.memory._replace(eidetic_index=sets))
        return result


class _DecodesOtherwise(_Meddling):
    """Promotes another token than it should where decoding enters a chunk."""

    def decode(self, token: int, state: State) -> tuple[Any, State]:
        logits, state = self.engine.decode(token, state)
        if int(state.position[0]) % self.config.chunk_size != 1:
            return logits, state
        layer = state.layers[0]
        kept = layer.eidetic.positions.copy()
        kept[0, 0] = 2 if 2 not in kept else 3
        return logits, state._replace(
            layers=(layer._replace(eidetic=layer.eidetic._replace(positions=kept)), *state.layers[1:])
        )


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (_ForgetsFirst, "layer 1, chunk 8: the set holds what it cannot: this machine does not choose by its own"),
        (_DecodesOtherwise, r"layer 0, chunk \d: position \d+ is in one set only, .* \(in decoding\)"),
    ],
)
def test_wrong_choices_of_an_engine_are_told(
    folders: Callable[..., Path], oracle_record: Record, engine: type[_Meddling], message: str
) -> None:
    comparison = check(folders("all"), oracle_record, engine(Oracle(folders("all"))))
    assert any(re.match(message, problem) for problem in comparison.failures), comparison.failures


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_record_of_another_model_is_refused(folders: Callable[..., Path], oracle_record: Record) -> None:
    other = folders("all", seed=1)
    with pytest.raises(
        ParityError, match=r"another model: all float32 0 \([0-9a-f]{12}\), .* all float32 1 \([0-9a-f]{12}\)"
    ):
        check(other, oracle_record, observed("torch", other))


def _edited(path: Path, drop: str = "", metadata: Any = (), **tensors: Any) -> None:
    with safe_open(path, framework="numpy") as file:
        about = {**file.metadata(), **dict(metadata)}
        held = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118
    held |= tensors
    save_file(held, path, {**about, "checksum": checksum(about["about"], held)})


def _flipped(path: Path) -> None:
    """One bit of the last number."""
    raw = bytearray(path.read_bytes())
    raw[-4] ^= 1
    path.write_bytes(raw)


def _resized(path: Path, name: str) -> None:
    tensors: dict[str, Any] = {name: np.zeros(3, np.float32)}
    _edited(path, **tensors)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated or damaged"),
    "one bit": (_flipped, "damaged or edited: it does not hold what was recorded"),
    "empty": (lambda path: path.write_bytes(b""), "truncated or damaged"),
    "something else": (lambda path: save_file({"x": np.zeros(2)}, path), "is no parity record"),
    "a later version": (lambda path: _edited(path, metadata={"version": "3"}), "version 3 of the format"),
    "broken metadata": (lambda path: _edited(path, metadata={"about": "{"}), "says of its model cannot be read"),
    "no tokens": (lambda path: _edited(path, "tokens"), "tokens is missing"),
    "fewer tokens": (lambda path: _edited(path, tokens=np.arange(3)), r"sets is int64 \(2, 9, 5\), expected"),
    "strange tokens": (lambda path: _edited(path, tokens=np.full(27, 37)), "outside the vocabulary of 37"),
    "a value less": (
        lambda path: _edited(path, "values/whole.27.layers.1.output"),
        "whole.27.layers.1.output is not in both",
    ),
    "a value of another shape": (
        lambda path: _resized(path, "values/whole.27.logits"),
        "logits: inf",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_records_are_named(
    tmp_path: Path, folders: Callable[..., Path], oracle_record: Record, name: str
) -> None:
    damage, message = DAMAGES[name]
    oracle_record.save(tmp_path / "record")
    damage(tmp_path / "record")
    result = CliRunner().invoke(
        app, ["parity", "check", str(folders("all")), str(tmp_path / "record"), "--engine", "torch"]
    )
    assert result.exit_code == 1 and re.search(message, result.stderr.replace("\n", " ")), result.stderr


def test_the_command(tmp_path: Path, folders: Callable[..., Path]) -> None:
    run, folder, file = CliRunner(), str(folders("all")), str(tmp_path / "deep" / "record")
    made = run.invoke(app, ["parity", "record", folder, "--out", file, "--engine", "torch"])
    assert made.exit_code == 0 and "filled and overrun: chunk, window, sinks, fading memory, eidetic" in made.stdout
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["record"]
    checked = run.invoke(app, ["parity", "check", folder, file, "--engine", "mlx"])
    assert checked.exit_code == 0 and "0 of 9" in checked.stdout and "plain PyTorch" in checked.stdout
    told = run.invoke(app, ["parity", "check", folder, file, "--engine", "reference", "--json"])
    assert told.exit_code == 0
    result = json.loads(told.stdout)
    assert result["ok"] and result["recorded_on"]["engine"] == "torch" and result["checked_on"]["engine"] == "reference"
    assert [layer["layer"] for layer in result["layers"]] == [0, 1] and result["bound"] == 1e-5
    strict = run.invoke(app, ["parity", "check", folder, file, "--engine", "reference", "--bound", "1e-9"])
    assert strict.exit_code == 1 and "layer 0 (bmojo)" in strict.stderr
    again = run.invoke(app, ["parity", "record", folder, "--out", file, "--engine", "torch"])
    assert again.exit_code == 1 and "--overwrite" in again.stderr
    short = run.invoke(
        app, ["parity", "record", folder, "--out", file, "--overwrite", "--tokens", "9", "--engine", "mlx"]
    )
    assert short.exit_code == 0 and "too few to overrun: sinks, fading memory" in short.stderr.replace("\n", " ")
    assert run.invoke(app, ["parity", "check", folder, file, "--engine", "mlx", "--device", "cpu"]).exit_code == 2
    import torch

    if not torch.cuda.is_available():
        missing = run.invoke(app, ["parity", "check", folder, file, "--device", "cuda"])
        assert missing.exit_code == 1 and "no CUDA device" in missing.stderr
    assert run.invoke(app, ["parity", "check", folder, str(tmp_path / "none")]).exit_code == 1
