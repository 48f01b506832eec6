"""Decoding in MLX: rings written where they are, one trace for all positions, compiled equals eager, for ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from bmojo_edge.config import Config
from bmojo_edge.state import leaves
from tests.helpers import GRID, assert_close, assert_states_close, odd, random_tokens, random_weights

mx = pytest.importorskip("mlx.core")

from bmojo_edge.mlx import Model, load_weights  # noqa: E402
from bmojo_edge.mlx import layout as layout_module  # noqa: E402

# All memories, a ring and an SSM; every ring turns over within the tests.
EVERYTHING = odd("bmojo", "attention", "mamba", attention_window=5)
RINGS = ("window.k", "window.v", "window.scores", "fading.k", "fading.v", "sinks.k", "sinks.v", "1.k", "1.v")


def model_of(config: Config) -> Model:
    return load_weights(Model(config), random_weights(config))


@pytest.fixture
def compiling() -> Iterator[None]:
    """Compilation, which conftest.py turns off for all other tests."""
    mx.enable_compile()
    yield
    mx.disable_compile()


def addresses(state: Any, names: tuple[str, ...] = RINGS) -> dict[str, int]:
    """Where the rings of an evaluated state are."""
    rings = {name: leaf for name, leaf in leaves(state.layers) if name.endswith(names)}
    return {name: np.asarray(ring).__array_interface__["data"][0] for name, ring in rings.items()}


def ragged(model: Model, batch: int) -> Any:
    """An evaluated state whose rows stand at different positions, beyond sinks and below the window."""
    _, state = model.prefill(
        random_tokens(model.config, batch, 40), model.init_state(batch), [3 + 7 * r for r in range(batch)]
    )
    mx.eval(state)
    return state


def moved_rings(model: Model, batch: int, steps: int, rests: bool) -> int:
    """How many rings were somewhere else after a step, over all steps, as drivers decode."""
    state, moved = ragged(model, batch), 0
    for i in range(steps):
        before = addresses(state)
        assert len(before) == len(RINGS)
        active = [(i + r) % 3 > 0 for r in range(batch)] if rests else None
        logits, state = model.decode_one_token(mx.array([i % 7] * batch), state, active)
        mx.eval(logits, state)
        after = addresses(state)
        moved += sum(before[name] != after[name] for name in before)
    return moved


@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_rings_stay_where_they_are(batch: int, rests: bool) -> None:
    assert moved_rings(model_of(EVERYTHING), batch, 40, rests) <= 2  # sinks, while a row still fills them


def test_a_held_state_is_copied_and_not_changed() -> None:
    model = model_of(EVERYTHING)
    held = ragged(model, 1)
    before = {name: np.array(leaf) for name, leaf in leaves(held)}
    logits, state = model.decode_one_token(mx.array([1]), held)
    mx.eval(logits, state)
    shared = dict(addresses(state).items() & addresses(held).items())
    assert set(shared) == {"0.sinks.k", "0.sinks.v"}  # full, so not written to
    for name, leaf in leaves(held):
        np.testing.assert_array_equal(np.array(leaf), before[name], err_msg=name)


@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_equals_eager_without_new_traces(batch: int, compiling: None) -> None:
    """Over chunk borders and turns of every ring: one trace, the eager numbers, no ring moved."""
    eager, compiled = model_of(EVERYTHING), model_of(EVERYTHING)
    eager.decoder.compiles, compiled.decoder.compiles = False, True
    state, want = ragged(compiled, batch), ragged(eager, batch)
    for i in range(40):
        before, token = addresses(state), mx.array(random_tokens(EVERYTHING, batch, 1, seed=i)[:, 0])
        logits, state = compiled.decode_one_token(token, state)
        mx.eval(logits, state)
        ref, want = eager.decode_one_token(token, want)
        assert_close(logits, ref, 2e-6, f"step {i}")
        assert i == 0 or addresses(state) == before
    assert_states_close(state, want, 6e-6)
    assert compiled.decoder.traces == 1
    assert eager.decoder.traces == 40


def test_compiled_step_sees_new_weights(compiling: None) -> None:
    config = odd("attention", ssm=None, attention_window=5)
    model = model_of(config)
    model.decoder.compiles = True
    first = model.decode_one_token([1], model.init_state())[0]
    mx.eval(first)
    load_weights(model, random_weights(config, seed=1))
    second = model.decode_one_token([1], model.init_state())[0]
    ref = load_weights(Model(config), random_weights(config, seed=1)).forward([[1]])[0][:, 0]
    assert_close(second, ref, 2e-6)
    assert model.decoder.traces == 1


def test_one_trace_for_each_multiple_of_live_slots(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read grows in steps up to the window and then stays; a growing cache needs a trace for each size."""
    monkeypatch.setattr(layout_module, "LIVE_STEP", 16)
    for kind, traces in (("bmojo", 5), ("attention", 2)):  # 64 slots and beyond; 256 and 512
        config = odd(kind, ssm=None, window=64, n_eidetic=0, n_sinks=0, chunk=16)
        model = model_of(config)
        model.decoder.compiles = True
        logits, state = model.decode_one_token(mx.array([0]), model.init_state())
        for i in range(1, 300):
            logits, state = model.decode_one_token(mx.array([i % 37]), state)
            mx.eval(logits, state)
        assert model.decoder.traces == traces
        ref, _ = model.forward(np.arange(300)[None] % 37)
        assert_close(logits, ref[:, -1], 1e-5)


def test_a_step_can_be_traced_by_the_caller(compiling: None) -> None:
    """`mx.compile` around decode_one_token itself: positions stay arrays, promotion happens within the graph."""
    model = model_of(EVERYTHING)
    step, runs = mx.compile(lambda token, state: model.decode_one_token(token, state)), 0
    state, want = ragged(model, 2), ragged(model, 2)
    for i in range(12):
        token = mx.array(random_tokens(EVERYTHING, 2, 1, seed=i)[:, 0])
        logits, state = step(token, state)
        mx.eval(logits, state)
        ref, want = model.decode_one_token(token, want)
        assert_close(logits, ref, 2e-6, f"step {i}")
        runs += 1
    assert_states_close(state, want, 6e-6)
    assert model.decoder.traces == 1 + runs  # the eager ones run anew each time
    full = model_of(GRID["attention"])
    with pytest.raises(ValueError, match="full attention grows on the host"):
        mx.compile(lambda token, state: full.decode_one_token(token, state))(mx.array([1]), full.init_state())


def test_twenty_thousand_tokens_in_constant_memory() -> None:
    """State bytes at every step, resident memory, ring addresses: nothing moves and nothing grows."""
    config = Config.preset(
        "tiny", n_layers=1, vocab_size=64, d_model=32, d_ff=32, n_heads=1, n_sinks=4, ssm={"d_state": 4, "expand": 1}
    )
    model, size, process = Model(config), config.state_bytes(), psutil.Process()
    logits, state = model.decode_one_token(mx.array([0]), model.init_state())
    resident, moved = 0, 0
    names = ("window.k", "window.v", "window.scores", "fading.k", "fading.v", "sinks.k", "sinks.v")
    before = None
    for i in range(1, 20_000):
        logits, state = model.decode_one_token(mx.array([i * i % 64]), state)
        mx.eval(logits, state)
        assert sum(leaf.nbytes for _, leaf in leaves(state)) == size
        now = addresses(state, names)
        if i >= config.n_sinks and before is not None:
            moved += now != before
        before = now
        if i == 2000:
            resident = process.memory_info().rss
    assert np.isfinite(np.array(logits)).all()
    assert state.position.tolist() == [20_000]
    assert moved == 0
    assert process.memory_info().rss - resident < 2**20
