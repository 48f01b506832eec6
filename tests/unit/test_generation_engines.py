"""Generation and sessions on the real engines: both twins say the same, in constant memory, copying no ring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmojo_edge.config import Config
from bmojo_edge.engine import LM, evaluate
from bmojo_edge.generate import Continuation, stream
from bmojo_edge.parameters import parameter_shapes
from bmojo_edge.session import Session
from bmojo_edge.state import leaves
from bmojo_edge.tokenizer import Tokenizer


def make(engine: str, tokenizer: Tokenizer, dtype: str = "float32") -> LM:
    """A tiny model of all memories with the same weights in either engine."""
    config = Config.preset("tiny", vocab_size=tokenizer.vocab_size, n_sinks=2, window=16, n_eidetic=8, dtype=dtype)
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.normal(size=shape) * (3 if "embed" in name else 1) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    if engine == "mlx":
        from bmojo_edge.mlx import Model, load_weights

        model: Any = load_weights(Model(config), weights)
    else:
        from bmojo_edge.torch import Model as TorchModel
        from bmojo_edge.torch import load_weights as load_torch_weights

        model = load_torch_weights(TorchModel(config), weights).eval()
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


def conversation(session: Session) -> list[str]:
    said = ["".join(session.say(text, max_tokens=12)) for text in ("Hello", "the river 中")]
    said.append("".join(session.fork().rewind().say("why?", max_tokens=12, temperature=1.0, seed=1)))
    return said


def test_both_engines_say_the_same(tokenizer: Tokenizer) -> None:
    mlx, torch = make("mlx", tokenizer), make("torch", tokenizer)
    ours = [(t.id, t.text, t.finish_reason) for t in stream(mlx, "The river", max_tokens=40)]
    theirs = [(t.id, t.text, t.finish_reason) for t in stream(torch, "The river", max_tokens=40)]
    assert ours == theirs
    assert conversation(Session(mlx)) == conversation(Session(torch))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_every_dtype_and_a_constant_state(tokenizer: Tokenizer, engine: str, dtype: str) -> None:
    lm = make(engine, tokenizer, dtype)
    session = Session(lm)
    sizes = {session.nbytes}
    for _ in session.say("Hello", max_tokens=25):
        sizes.add(session.nbytes)
    assert sizes == {lm.config.state_bytes()}
    prompt = tokenizer.chat([{"role": "user", "content": "Hello"}])
    assert session.position == session.moment.position == len(prompt) + len(session.turns[0].answer_ids)
    logits, state = lm.prefill(np.array([[1, 2, 3]], dtype=np.int32), lm.init_state())
    row = evaluate(logits, state)
    assert row.dtype == np.float32
    assert row.shape == (lm.config.vocab_size,)


def test_rings_stay_where_they_are(tokenizer: Tokenizer) -> None:
    lm = make("mlx", tokenizer)
    run = Continuation(lm, lm.init_state(), tokenizer.encode("The river"), max_tokens=50)
    tokens = run.tokens()

    def addresses() -> dict[str, int]:
        rings = {
            name: leaf for name, leaf in leaves(run.state) if name.endswith((".k", ".v")) and "eidetic" not in name
        }
        return {name: np.asarray(ring).__array_interface__["data"][0] for name, ring in rings.items()}

    next(tokens)
    next(tokens)
    before = addresses()
    assert len(before) == 12  # window, fading and sinks of two layers, keys and values
    moved = 0
    for _ in tokens:
        after = addresses()
        moved += sum(before[name] != after[name] for name in before)
        before = after
    assert moved == 0


def test_a_session_keeps_one_state_per_turn_and_no_more(tokenizer: Tokenizer) -> None:
    lm = make("mlx", tokenizer)
    session = Session(lm, snapshot_bytes=0)
    for text in ("Hello", "the river", "why?"):
        for _ in session.say(text, max_tokens=5):
            pass
    assert [turn.before is not None for turn in session.turns] == [False, False, True]
    assert session._start is not None
    assert session._point.asked is None  # the template leaves answers as they are
    assert session._point.nbytes == lm.config.state_bytes()
    assert session.held_bytes == 3 * lm.config.state_bytes()  # now, before the last turn, before the first


def test_sessions_can_begin_from_one_state(tokenizer: Tokenizer) -> None:
    lm = make("mlx", tokenizer)
    blank = lm.init_state()
    one, other = (Session(lm, snapshot_bytes=0, blank=blank) for _ in range(2))
    assert one.held_bytes == other.held_bytes == 0
    alone = Session(lm)
    for session in (one, other, alone):
        for text in ("Hello", "the river"):
            for _ in session.say(text, max_tokens=9):
                pass
    assert one.messages == other.messages == alone.messages
    assert one.held_bytes == 2 * lm.config.state_bytes()
