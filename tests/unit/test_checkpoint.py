"""Model folders: what is saved is read back, what is wrong is named, what exists is not lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bmojo_edge import Config, checkpoint, staging
from bmojo_edge.checkpoint import CheckpointError
from bmojo_edge.config import SSM, Experts, Quantization
from bmojo_edge.parameters import parameter_shapes
from tests.helpers import GRID, odd, random_weights

CONFIG = odd()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "model", CONFIG, random_weights(CONFIG))
    return tmp_path / "model"


@pytest.mark.parametrize("case", GRID)
def test_round_trip(case: str, tmp_path: Path) -> None:
    config = GRID[case]
    weights = random_weights(config)
    checkpoint.save(tmp_path / "model", config, weights)
    read_config, read = checkpoint.read(tmp_path / "model")
    assert read_config == config
    assert dict.fromkeys(read) == dict.fromkeys(sorted(weights))
    for name, array in weights.items():
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    """Weights take the config's dtype, but for what the scan reads in float32."""
    config, weights = odd(dtype=dtype), random_weights(CONFIG)
    checkpoint.save(tmp_path / "model", config, weights)
    _, read = checkpoint.read(tmp_path / "model")
    for name in read:
        kept = name.endswith((".A_log", ".D", ".dt_proj.bias"))
        expected = np.float32 if kept else np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        assert read[name].dtype == expected
        np.testing.assert_array_equal(read[name], weights[name].astype(expected))


def test_weights_of_both_frameworks(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    torch = pytest.importorskip("torch")
    weights, config = random_weights(CONFIG), odd(dtype="bfloat16")
    as_torch = {name: torch.from_numpy(array).bfloat16().requires_grad_() for name, array in weights.items()}
    as_mlx = {name: mx.array(array).astype(mx.bfloat16) for name, array in weights.items()}
    for n, given in enumerate((as_torch, as_mlx)):
        checkpoint.save(tmp_path / str(n), config, given)
        _, read = checkpoint.read(tmp_path / str(n))
        name = "layers.0.mixer.q_proj.weight"
        np.testing.assert_array_equal(read[name], weights[name].astype(ml_dtypes.bfloat16))


def test_shards(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    checkpoint.save(tmp_path / "model", CONFIG, weights, shard_bytes=4000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    found: dict[str, np.ndarray] = {}
    for file in files:
        found |= load_file(tmp_path / "model" / file)  # the library itself reads each of them
    assert found.keys() == weights.keys()
    _, read = checkpoint.read(tmp_path / "model")
    for name, array in weights.items():
        np.testing.assert_array_equal(read[name], array)
    # Saving again as one file leaves no shard of before.
    checkpoint.save(tmp_path / "model", CONFIG, weights)
    left = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert left == ["bmojo_model.py", "config.json", "model.safetensors"]


def test_reading_is_lazy(folder: Path) -> None:
    """Only the headers are read before a tensor is asked for."""
    _, weights = checkpoint.read(folder)
    damaged = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(damaged[:-4] + b"\xff" * 4)
    assert sum(1 for name in weights if not np.isfinite(weights[name]).all()) == 1


def test_tokenizer_files(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "notes.txt"):
        (tokenizer / name).write_text(name)
    weights = random_weights(CONFIG)
    checkpoint.save(tmp_path / "a", CONFIG, weights, tokenizer=tokenizer)
    copied = {path.name for path in (tmp_path / "a").iterdir()} - {"bmojo_model.py", "config.json", "model.safetensors"}
    assert copied == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    checkpoint.save(tmp_path / "b", CONFIG, weights, tokenizer=str(tokenizer / "tokenizer.json"))
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "tokenizer.json"

    class Own:
        def save(self, folder: Path) -> None:
            (folder / "tokenizer.model").write_text("own")

    checkpoint.save(tmp_path / "c", CONFIG, weights, tokenizer=Own())
    assert (tmp_path / "c" / "tokenizer.model").read_text() == "own"
    for wrong in (tmp_path / "nothing", 3):
        with pytest.raises(CheckpointError, match="tokenizer"):
            checkpoint.save(tmp_path / "d", CONFIG, weights, tokenizer=wrong)
    assert not (tmp_path / "d").exists()


# --- what is wrong is named -----------------------------------------------------------------------------------------


def _rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    weights: dict[str, Any] = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, "tensor 'norm.weight' is missing"),
        ({"more": np.ones(2, np.float32)}, r"model\.safetensors: 1 tensor\(s\) the config has no place for.*'more'"),
        ({"norm.weight": np.ones(21, np.float32)}, r"tensor 'norm.weight' has shape \(21,\), expected \(20,\)"),
        ({"norm.weight": np.ones(20, np.int64)}, "tensor 'norm.weight' is int64, expected a floating-point dtype"),
        ({"norm.scales": np.ones(20, np.float32)}, "'norm.scales'"),
    ],
)
def test_wrong_tensors(changes: dict[str, Any], message: str, folder: Path) -> None:
    _rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"config\.json: not valid JSON"),
        ("[]", r"config\.json: must hold an object"),
        ("{}", "model_type is missing"),
        ('{"model_type": "llama"}', "model_type: is 'llama'"),
        ('{"model_type": "bmojo"}', "vocab_size: is missing"),
        ({"window": 0}, "window: must be at least 1"),
        ({"windw": 3}, "windw: is not a known field"),
        ({"experts": {"n": 2}}, r"config\.json: "),
        ({"quantization": {"bits": 7}}, "quantization.bits"),
    ],
)
def test_wrong_config(content: Any, message: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(CheckpointError, match=f"{path}.*{message}|{message}"):
        checkpoint.read(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: no such folder"):
        checkpoint.read(tmp_path / "nothing")
    (folder / "model.safetensors").rename(folder / "weights.pt")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(weights\.pt\)"):
        checkpoint.read(folder)
    (folder / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        checkpoint.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: file is missing"):
        checkpoint.read(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(share: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or damaged"):
        checkpoint.read(folder)


def test_saving_wrong_weights_writes_nothing(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    without = {name: array for name, array in weights.items() if name != "norm.weight"}
    for given, message in (
        (without, "tensor 'norm.weight' is missing"),
        ({**weights, "more": weights["norm.weight"]}, "no place for, such as 'more'"),
        ({**weights, "norm.weight": weights["norm.weight"][:3]}, r"'norm.weight' has shape \(3,\), expected \(20,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.save(tmp_path / "model", CONFIG, given)
    large = {**weights, "norm.weight": weights["norm.weight"] * 0 + np.float32(7e4)}
    with pytest.raises(CheckpointError, match=r"'norm\.weight': values up to 7e\+04 do not fit float16"):
        checkpoint.save(tmp_path / "model", odd(dtype="float16"), large)
    assert not list(tmp_path.iterdir())


# --- what exists is not lost ----------------------------------------------------------------------------------------


def test_replacing(folder: Path, tmp_path: Path) -> None:
    """A failing save leaves the former model, one that works leaves no trace of it."""
    (folder / "golden.safetensors").write_bytes(b"of the former weights")
    with pytest.raises(CheckpointError):
        checkpoint.save(folder, CONFIG, {})
    assert checkpoint.read(folder)[0] == CONFIG
    other = odd(n_sinks=0)
    checkpoint.save(folder, other, random_weights(other))
    assert checkpoint.read(folder)[0] == other
    assert not (folder / "golden.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_not_ours_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    (folder / "training.log").write_text("mine")
    with pytest.raises(CheckpointError, match=r"training\.log: is no part of a model and would be lost"):
        checkpoint.save(folder, CONFIG, weights)
    (tmp_path / "file").write_text("mine")
    for other in (tmp_path / "file", tmp_path):
        with pytest.raises(CheckpointError, match="exists and is not a model folder of ours"):
            checkpoint.save(other, CONFIG, weights)
    assert (tmp_path / "file").read_text() == "mine"


def test_cut_off_between_the_two_renames(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the former folder has its other name: reading says where it is, saving puts it back first."""
    rename = Path.rename

    class Killed(BaseException):
        pass

    def killed(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise Killed
        if ".old-" in self.name:
            raise Killed  # no chance to put it back either
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        checkpoint.save(folder, CONFIG, random_weights(CONFIG))
    monkeypatch.undo()
    assert not folder.exists()
    with pytest.raises(CheckpointError, match=r"no such folder; a replacement was cut off, the former one is .*\.old-"):
        checkpoint.read(folder)
    with pytest.raises(CheckpointError):
        checkpoint.save(folder, CONFIG, {})
    assert checkpoint.read(folder)[0] == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failing_rename_puts_the_former_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk on fire"):
        checkpoint.save(folder, odd(n_sinks=0), random_weights(odd(n_sinks=0)))
    assert checkpoint.read(folder)[0] == CONFIG


def test_only_abandoned_folders_are_removed(tmp_path: Path) -> None:
    """What a killed process left is removed; what another process is writing is not."""
    target = tmp_path / "a[b]"
    abandoned = tmp_path / ".a[b].tmp-1-dead"
    abandoned.mkdir()
    (abandoned / "model.safetensors").write_text("half")
    with staging.staged(target, lambda folder: None) as first:
        assert not abandoned.exists()
        (first / "x").write_text("first")
        with staging.staged(target, lambda folder: None) as second:
            assert first.exists()
            (second / "x").write_text("second")
        assert (target / "x").read_text() == "second"
    assert (target / "x").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a[b]"]


def test_a_full_disk_says_what_was_being_written(tmp_path: Path) -> None:
    """The system names no file there, as where a file is read that is missing."""
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"), staging.staged_file(tmp_path / "file"):
        raise OSError(28, "No space left on device")
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/folder'"),
        staging.staged(tmp_path / "folder", lambda _: None),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError, match="'other'"), staging.staged_file(tmp_path / "file"):
        raise FileNotFoundError(2, "No such file or directory", "other")
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    other = odd(n_sinks=0)
    checkpoint.save(link, other, random_weights(other))
    assert link.is_symlink()
    assert checkpoint.read(folder)[0] == other
    shutil.rmtree(folder)


def test_names_of_quantised_parameters(tmp_path: Path) -> None:
    """Linear and embedding weights of whole groups, never what acts on the state."""
    config = Config(
        vocab_size=37, d_model=64, d_ff=96, n_heads=2, layer_types=("bmojo", "mamba"), window=8, tie_kv=False,
        ssm=SSM(kind="mamba", d_state=32, dt_rank=64, d_conv=32, dt_bc_norm=True), rope_theta=100.0,
        experts=Experts(n=3, per_token=2, layers=(1,)), quantization=Quantization(bits=4, group_size=32),
    )  # fmt: skip
    weights = random_weights(config)
    checkpoint.save(tmp_path / "model", config, weights)
    _, read = checkpoint.read(tmp_path / "model")
    packed = {name.removesuffix(".scales") for name in read if name.endswith(".scales")}
    plain = {name.removesuffix(".weight") for name in parameter_shapes(config) if name.endswith(".weight")} - packed
    assert {name.rpartition(".")[2] for name in plain} == {
        "norm", "mlp_norm", "conv", "dt_proj", "dt_norm", "B_norm", "C_norm", "router",
    }  # fmt: skip
    assert {"embed", "lm_head", "layers.0.mixer.fading.q_proj", "layers.0.mixer.ssm.in_proj"} <= packed
    assert read["layers.1.mlp.experts.up_proj.weight"].shape == (3, 96, 8)
    assert read["layers.1.mlp.experts.up_proj.scales"].shape == (3, 96, 2)
    # Packed words given are stored as they are.
    checkpoint.save(tmp_path / "again", config, read)
    _, again = checkpoint.read(tmp_path / "again")
    assert all(np.array_equal(again[name], read[name]) for name in read)
    for name, message in (("embed.biases", "is missing"), ("embed.scales", "no place for")):
        shutil.copytree(tmp_path / "model", tmp_path / name)
        _rewrite(tmp_path / name, **{name: None})
        with pytest.raises(CheckpointError, match=message if name == "embed.biases" else "embed"):
            checkpoint.read(tmp_path / name)
