"""The pure step that exporters see, run by PyTorch itself: logits and eidetic choices are the oracle's, for ever."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bmojo_convert.export_folder import ExportError, check_exportable  # noqa: E402
from bmojo_convert.step import (  # noqa: E402
    Commit,
    Decode,
    Prefill,
    angles,
    fresh_state,
    position_cycle,
)
from bmojo_edge import reference  # noqa: E402
from bmojo_edge.config import Config  # noqa: E402
from bmojo_edge.rope import turns_per_token  # noqa: E402
from bmojo_edge.torch import Model  # noqa: E402
from bmojo_edge.torch.load import load_weights  # noqa: E402
from tests.helpers import GRID, assert_close, odd, random_tokens, random_weights  # noqa: E402

CONSTANT = {name: config for name, config in GRID.items() if not config.growing_layers}
CONSTANT["windows shorter than a chunk"] = odd("attention", "attention", ssm=None, attention_window=2, n_eidetic=0)
LENGTH = 45


class Runner:
    """Drives the graphs as a host does."""

    def __init__(self, config: Config, weights: dict[str, np.ndarray], batch: int, scatters: bool = False) -> None:
        model = load_weights(Model(config), weights).eval()
        self.config, self.batch = config, batch
        self.decode, self.prefill, self.commit = Decode(model, scatters), Prefill(model, scatters), Commit(model)
        self.state, self.position = fresh_state(config, batch), 0
        self.held = {i: np.full((batch, config.n_eidetic), -1) for i in self.commit.layers}  # positions in slots

    def _call(self, graph: Any, size: int, tokens: np.ndarray | None = None) -> tuple[Any, ...]:
        base, period = position_cycle(self.config)
        p = self.position if self.position < base else base + (self.position - base) % period
        given = {"position": torch.full((self.batch,), p, dtype=torch.int32)}
        turns = turns_per_token(self.config)
        if turns is not None:
            at = np.broadcast_to(self.position + np.arange(size), (self.batch, size))
            given |= {name: torch.from_numpy(x) for name, x in zip(("cos", "sin"), angles(turns, at), strict=True)}
        if tokens is not None:
            given["tokens"] = torch.from_numpy(tokens.astype(np.int32))
        with torch.no_grad():
            return graph(*(given[name] for name in graph.inputs), *(self.state[name] for name in graph.names))

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (b, v) after tokens (b, 1) or (b, chunk)."""
        config, size = self.config, tokens.shape[1]
        if self.commit.layers and self.position % config.chunk_size == 0:
            found = self._call(self.commit, 1)
            n = len(self.commit.layers)
            self.state |= dict(zip(self.commit.changed, found[n:], strict=True))
            leaving = self.position - config.window + np.arange(config.chunk_size)
            for i, choice in zip(self.commit.layers, found[:n], strict=True):
                candidates = np.concatenate(
                    [self.held[i], np.broadcast_to(leaving, (self.batch, len(leaving)))], axis=1
                )
                chosen = np.take_along_axis(candidates, np.maximum(choice.numpy(), 0).astype(int), axis=1)
                self.held[i] = np.where(choice.numpy() < 0, -1, chosen)
        logits, *leaves = self._call(self.decode if size == 1 else self.prefill, size, tokens)
        self.state, self.position = dict(zip(self.decode.names, leaves, strict=True)), self.position + size
        return logits.numpy()


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("how", ["tokens", "both", "both, by scatters"])
def test_step_is_the_oracle(name: str, how: str) -> None:
    """Token by token, and with two of three chunks at once. Every chunk's choice is compared too."""
    config = CONSTANT[name]
    weights, tokens = random_weights(config), random_tokens(config, 2, LENGTH)
    ref, _, memory = reference.forward(config, weights, tokens, return_memory=True)
    runner, chunk, at = Runner(config, weights, 2, "scatters" in how), config.chunk_size, 0
    while at < LENGTH:
        whole = at % chunk == 0 and at + chunk <= LENGTH and how != "tokens" and at // chunk % 3 != 1
        size = chunk if whole else 1
        logits = runner.feed(tokens[:, at : at + size])
        at += size
        assert_close(logits, ref[:, at - 1], 2e-5, f"{name}, token {at - 1}")
        for i, held in runner.held.items():
            np.testing.assert_array_equal(held, memory.eidetic_index[:, i, (at - 1) // chunk])


def test_positions_may_run_for_ever() -> None:
    """From `base` on a position is told modulo `period`; the graphs do the same at either."""
    config = odd(window=6, n_fading=2)
    base, period = position_cycle(config)
    assert base >= config.window + config.fading + config.n_sinks and base % period == 0
    for ring in (config.window, config.window + config.fading, config.chunk_size):
        assert period % ring == 0
    weights, tokens = random_weights(config), random_tokens(config, 1, 3 * (base + period))
    ref, _ = reference.forward(config, weights, tokens)
    runner = Runner(config, weights, 1)
    for t in range(tokens.shape[1]):
        logits = runner.feed(tokens[:, t : t + 1])
        assert_close(logits, ref[:, t], 5e-5, f"token {t}")


def test_angles_are_exact_far_away() -> None:
    config = odd(head_dim=64, rope_theta=1e5)
    turns = turns_per_token(config)
    assert turns is not None
    far = 10**12 + 7
    cos, sin = angles(turns, np.array([far]))
    for j, turn in enumerate(turns):
        phase = far * int(turn) % 2**64 / 2**64
        assert abs(cos[0, j] - np.cos(2 * np.pi * phase)) < 1e-6 and abs(sin[0, j] - np.sin(2 * np.pi * phase)) < 1e-6


def test_growing_layers_are_named() -> None:
    with pytest.raises(ExportError, match=r"layers 0, 1: .*--window"):
        check_exportable(GRID["attention"])
    with pytest.raises(ExportError, match="layer 3: "):
        check_exportable(GRID["mixed"])
