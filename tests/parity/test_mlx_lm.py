"""mlx-lm runs our folders: the tokens of `be.stream`, with and without bmojo_edge; its batches, files and tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

import bmojo_edge as be
from bmojo_edge import checkpoint, mlx_lm_plugin, reference
from bmojo_edge.mlx.bmojo_model import ModelArgs, PlainModel
from tests.helpers import odd, random_tokens, random_weights, rms_ratio
from tests.parity.mlx_lm_folders import BLOCKED, ENGINE_ONLY, MODELS, PROMPT, TOKENS, Folders, expected, run, save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


def greedy(model: Any, ids: list[int], cache: Any = None, n: int = TOKENS, step: int = 2048) -> list[int]:
    tokens = generate_step(mx.array(ids), model, max_tokens=n, prompt_cache=cache, prefill_step_size=step)
    return [int(token) for token, _ in tokens]


def load(folder: Path) -> Any:
    """Model and tokenizer as a user of mlx-lm gets them."""
    return mlx_lm.load(str(folder))


def models(folder: Path) -> list[Any]:
    """The model with bmojo_edge, and without where it needs none."""
    return [load(folder)[0]] + ([] if folder.name.rpartition("-")[0] in ENGINE_ONLY else [plain(folder)])


def plain(folder: Path) -> Any:
    """The model without bmojo_edge, in this process."""
    return mlx_lm.utils.load_model(folder, get_model_classes=lambda config: (PlainModel, ModelArgs))[0]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *((name, None) for name in [*MODELS, *ENGINE_ONLY]),
        ("bmojo", 4),
        ("windowed", 4),
        ("mamba", 4),
        ("gdn hybrid", 4),
    ],
)
def test_mlx_lm_generates_the_same_tokens(folders: Any, name: str, bits: int | None) -> None:
    folder = folders(name, bits)
    model, tokenizer = load(folder)
    ids, want = tokenizer.encode(PROMPT), expected(folder)
    assert ids == be.load(folder).tokenizer.encode(PROMPT) and len(ids) > 20 and len(set(want)) > 3
    assert greedy(model, ids)[: len(want)] == want
    assert greedy(model, ids, step=7)[: len(want)] == want
    if name in MODELS:
        assert greedy(plain(folder), ids, step=7)[: len(want)] == want


@pytest.mark.parametrize("name", [*MODELS, *ENGINE_ONLY])
def test_logits_are_the_oracles(folders: Any, name: str) -> None:
    folder = folders(name)
    config, weights = checkpoint.read(folder)
    tokens = random_tokens(config, 2, 40)
    want = reference.forward(config, weights, tokens)[0]
    for model in models(folder):
        assert rms_ratio(model(mx.array(tokens)), want) < (5e-4 if "gka" in name else 2e-5)


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALED)
def test_stretched_positions_are_the_oracles(tmp_path: Path, scaling: str) -> None:
    config = odd("bmojo", "attention", rope_scaling=SCALED[scaling], d_model=20)
    checkpoint.save(tmp_path / "m", config, random_weights(config))
    tokens = random_tokens(config, 1, 30)
    want = reference.forward(config, checkpoint.read(tmp_path / "m")[1], tokens)[0]
    assert rms_ratio(plain(tmp_path / "m")(mx.array(tokens)), want) < 2e-5


def test_half_precision_is_near_the_oracle(tmp_path: Path) -> None:
    config = MODELS["windowed"].replace(dtype="bfloat16", n_eidetic=0, tie_embeddings=True)
    folder = save(tmp_path / "half", config)
    tokens = random_tokens(config, 1, 30)
    want = reference.forward(config, checkpoint.read(folder)[1], tokens)[0]
    for model in (load(folder)[0], plain(folder)):
        assert rms_ratio(model(mx.array(tokens)), want) < 0.03


@pytest.mark.parametrize("name", ["bmojo", "windowed", "mamba", "full", "mixed", "gdn hybrid"])
def test_a_batch_gives_what_each_prompt_gives_alone(folders: Any, name: str) -> None:
    folder = folders(name)
    tokenizer = load(folder)[1]
    tokenizer.eos_token_ids = set()
    prompts = [tokenizer.encode(text) for text in (PROMPT, "Hello", PROMPT[::-1], "naïve café")]
    assert len({len(p) for p in prompts}) == 4
    for lm in models(folder):
        alone = [greedy(lm, ids) for ids in prompts]
        # Batches of two: others join while one runs, rows are merged, filtered and extracted.
        got = batch_generate(
            lm, tokenizer, prompts, max_tokens=[TOKENS, 5, 9, TOKENS], completion_batch_size=2, prefill_batch_size=2,
            prefill_step_size=7, return_prompt_caches=True, return_token_ids=True,
        )  # fmt: skip
        assert got.token_ids is not None and got.caches is not None
        for ids, n, row in zip(alone, [TOKENS, 5, 9, TOKENS], got.token_ids, strict=True):
            assert row == ids[:n]
        # mlx-lm has read the last token already.
        assert greedy(lm, [alone[1][5]], got.caches[1], 3) == alone[1][6:9]


@pytest.mark.parametrize("name", ["bmojo", "full", "mixed", "gdn hybrid"])
def test_a_prompt_cache_is_saved_and_goes_on_in_either_model(folders: Any, tmp_path: Path, name: str) -> None:
    folder = folders(name)
    model, tokenizer = load(folder)
    ids = tokenizer.encode(PROMPT)
    want = greedy(model, ids)
    for first in models(folder):
        cache = make_prompt_cache(first)
        first(mx.array([ids[:19]]), cache=cache)
        save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
        for second in models(folder):
            assert greedy(second, ids[19:], load_prompt_cache(str(tmp_path / "cache.safetensors"))) == want


def test_folders_stand_by_themselves(folders: Any) -> None:
    code = (
        BLOCKED
        + """
import json, mlx_lm, mlx.core as mx
from mlx_lm.generate import generate_step
found = []
for folder in sys.argv[2:]:
    model, tokenizer = mlx_lm.load(folder, trust_remote_code=True)
    ids = mx.array(tokenizer.encode(sys.argv[1]))
    found.append([int(token) for token, _ in generate_step(ids, model, max_tokens=16)])
assert not any(name.startswith("bmojo") for name in sys.modules)
print(json.dumps(found))
"""
    )
    chosen = [folders(name, bits) for name in ("bmojo", "windowed", "mamba") for bits in (None, 4)]
    done = run(code, PROMPT, *chosen)
    assert done.returncode == 0, done.stderr
    for got, folder in zip(json.loads(done.stdout.splitlines()[-1]), chosen, strict=True):
        want = expected(folder)
        assert got[: len(want)] == want


def test_loading_without_trust_runs_nothing_of_the_folder(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", MODELS["mamba"])
    (folder / mlx_lm_plugin.MODEL_FILE).write_text("raise ArithmeticError('the folder ran')\n")
    config: Any = mlx_lm.load(str(folder), return_config=True)[-1]
    assert config["model_file"] == mlx_lm_plugin.MODEL_FILE
    with pytest.raises(ArithmeticError, match="the folder ran"):
        mlx_lm.load(str(folder), trust_remote_code=True)


def test_importing_bmojo_edge_imports_no_mlx_lm() -> None:
    done = run("import bmojo_edge, sys; print([n for n in sys.modules if n.split('.')[0] in ('mlx', 'mlx_lm')])")
    assert done.stdout == "[]\n", done.stderr


def test_other_models_still_ask_for_trust(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", MODELS["mamba"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "other.py"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm.load(str(folder))


def test_mixers_that_only_bmojo_edge_has_are_named() -> None:
    config = odd("gdn", "attention", ssm={"kind": "gdn"})
    with pytest.raises(ValueError, match="layer_types: gdn layers need bmojo_edge: pip install bmojo-edge"):
        PlainModel(ModelArgs.from_dict(config.to_dict()))


def test_left_padding_is_refused(folders: Any) -> None:
    model = load(folders("mamba"))[0]
    cache = make_prompt_cache(model)
    cache[0].left_padding = mx.array([1])
    with pytest.raises(ValueError, match="left_padding"):
        model(mx.array([[1, 2]]), cache=cache)


def test_a_saved_folder_may_be_replaced(folders: Any, tmp_path: Path) -> None:
    config = MODELS["mamba"]
    folder = save(tmp_path / "model", config)
    (folder / "README.md").write_text("mlx-lm's card")
    checkpoint.save(folder, config, random_weights(config))
    assert (folder / mlx_lm_plugin.MODEL_FILE).is_file() and not (folder / "README.md").exists()
