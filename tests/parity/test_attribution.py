"""How attention divides among the memories: both twins against the weights of the oracle's own softmax."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmojo_edge import reference, reference_memory
from bmojo_edge.config import Config
from bmojo_edge.inspection import inspect
from bmojo_edge.session import Session
from bmojo_edge.state import MEMORIES, attending
from bmojo_edge.tokenizer import Tokenizer
from tests.helpers import GRID, ODD, random_tokens, random_weights, to_numpy
from tests.twins import ENGINES, build
from tests.unit import tokenizer_folders

CASES = ["all", "untied, qk-norm, bias", "no fading", "no sinks", "no ssm", "window of one", "mixed",
         "an ssm in one layer"]  # fmt: skip
CONFIGS = {
    **{name: GRID[name] for name in CASES},
    "more memories than numbers a head": GRID["all"].replace(head_dim=2),
}


def oracle_shares(
    monkeypatch: pytest.MonkeyPatch, config: Config, tokens: np.ndarray
) -> list[list[dict[str, np.ndarray]]]:
    """Token by token and layer by layer: the oracle's weights, summed over each memory's slots."""
    weights, seen = random_weights(config), []
    attend = reference_memory.attend

    def watching(queries: list[Any], keys: list[Any], values: list[Any], scale: float) -> np.ndarray:
        h, g = queries[0].shape[0], keys[0].shape[1]
        scores = [
            np.einsum("hp,nhp->hn", q, k[:, np.arange(h) // (h // g)]) * scale
            for q, k in zip(queries, keys, strict=True)
        ]
        joined = np.exp(np.concatenate(scores, axis=-1))
        parts = np.split(joined / joined.sum(-1, keepdims=True), np.cumsum([s.shape[1] for s in scores])[:-1], axis=-1)
        seen[-1].append([part.sum(-1) for part in parts])
        return attend(queries, keys, values, scale)

    monkeypatch.setattr(reference_memory, "attend", watching)
    monkeypatch.setattr(reference, "attend", watching)
    found, state = [], reference.init_state(config)
    for token in tokens:
        seen.append([])
        _, state = reference.forward(config, weights, [[token]], state)
        layers, shares = iter(seen[-1]), []
        for i, attends in enumerate(attending(config)):
            names = ["window"]
            if config.layer_types[i] == "bmojo":
                held = {"fading": config.fading_of(i), "sinks": config.n_sinks, "eidetic": config.n_eidetic}
                names += [name for name, slots in held.items() if slots]
            shares.append(dict(zip(names, next(layers), strict=True)) if attends else {})
        found.append(shares)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_shares_are_those_of_the_oracles_softmax(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    tokens = random_tokens(config, 1, 26)[0]
    ref = oracle_shares(monkeypatch, config, tokens)
    for engine in ENGINES:
        lm: Any = build(engine, config, random_weights(config))
        for cuts in ([], [1, 2, 3, 9, 10, 17]):
            state, plain, at = lm.init_state(), lm.init_state(), 0
            for piece in np.split(tokens, cuts):
                logits, state, shares = lm.prefill_with_attention(piece[None], state)
                expected, plain = lm.prefill(piece[None], plain)
                np.testing.assert_array_equal(to_numpy(logits), to_numpy(expected))
                for i in range(len(piece)):
                    compare([{k: to_numpy(x)[0, :, i] for k, x in layer.items()} for layer in shares], ref[at + i])
                at += len(piece)


def compare(shares: Iterable[dict[str, np.ndarray]], ref: list[dict[str, np.ndarray]]) -> None:
    """One token's shares (h,) by layer and memory; memories that the oracle has not are empty."""
    for layer, (got, want) in enumerate(zip(shares, ref, strict=True)):
        assert set(want) <= set(got) <= set(MEMORIES)
        for memory, share in got.items():
            np.testing.assert_allclose(share, want.get(memory, 0.0), atol=2e-5, err_msg=f"{memory}, layer {layer}")
        if got:
            np.testing.assert_allclose(sum(got.values()), 1, atol=1e-6)


def test_the_attention_of_the_last_answer_is_the_oracles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two exchanges, the second inspected: live, and from a file."""
    (tmp_path / "tokenizer").mkdir()
    tokenizer = Tokenizer.load(tokenizer_folders.byte_level(tmp_path / "tokenizer"))
    config = Config(**{**ODD, "vocab_size": tokenizer.vocab_size, "layer_types": ("bmojo", "mamba")})
    said, ref = [], []
    for engine in ENGINES:
        lm = build(engine, config, random_weights(config), tokenizer)
        session, ids, answer = Session(lm), [], []
        for text in ("Hello", "the river"):
            for _ in session.say(text, max_tokens=5):
                pass
            _, fed, answer = session.last_exchange()
            ids = ids[: len(ids) - 1] + fed + answer  # the last token of an answer is fed with the next question
        assert session.position == len(ids)
        if ids != said:
            said, ref = ids, oracle_shares(monkeypatch, config, np.array(ids))
        queries = range(len(ids) - 1 - len(answer), len(ids) - 1)
        session.save(tmp_path / "a.bmojo")
        for found in (inspect(session), inspect(Session.open(tmp_path / "a.bmojo", lm))):
            assert found.queries == len(queries) == 5
            for i, layer in enumerate(found.layers):
                assert bool(layer.attention) == (layer.kind == "bmojo")
                for name, share in layer.attention.items():
                    expected = np.mean([ref[q][i][name] for q in queries]) if name in ref[0][i] else 0.0
                    np.testing.assert_allclose(share, expected, atol=2e-5, err_msg=f"{name}, layer {i}, {engine}")
            assert sum(found.attention.values()) == pytest.approx(1)
