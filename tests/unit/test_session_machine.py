"""Any interleaving of saying, forking, rewinding, editing, regenerating, saving and opening, on fakes and both twins.

Each session is compared with a fresh one that said only what is left: the same ids, messages, and every bit of state.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from bmojo_edge.config import Config
from bmojo_edge.engine import LM
from bmojo_edge.inspection import inspect
from bmojo_edge.recall import WithStorage, shape_for
from bmojo_edge.session import Session, SessionError
from bmojo_edge.session_file import identity
from bmojo_edge.storage import Store
from bmojo_edge.tokenizer import Tokenizer
from tests.helpers import ODD, assert_states_equal, odd, random_weights
from tests.twins import build
from tests.unit import tokenizer_folders
from tests.unit.fake_lm import FakeLM
from tests.unit.test_session import MOVING, THINKING, with_template

TEXTS = st.sampled_from(["a</think>", "the river", "中 runs"])
# Seeded, or greedy: unseeded draws differ between forks on purpose, see test_session.py.
OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1.5]),
        "seed": st.integers(0, 2),
        "repetition_penalty": st.sampled_from([1.0, 1.7]),
        "stop": st.sampled_from([(), ("e",)]),
    }
)


class Held:
    """A session, and what it has said that was not taken back."""

    def __init__(self, session: Session, script: list[tuple[str, str]]) -> None:
        self.session, self.script = session, script


class Sessions(RuleBasedStateMachine):
    """Sessions of one model that come from one another."""

    held = Bundle("held")
    lm: LM
    folder: Path
    budgets: tuple[int, ...]
    length = 4
    texts_ahead: tuple[str | None, ...] = (None, "", "A book. ")
    fresh_ones: dict[Any, Session]

    @initialize(target=held, data=st.data())
    def begin(self, data: Any) -> Held:
        self.ahead, self.fresh_ones, self.files = data.draw(st.sampled_from(self.texts_ahead)), {}, 0
        return Held(self.start(data.draw(st.sampled_from(self.budgets))), [])

    def finish(self, session: Session, pieces: Any) -> None:
        """Hear the answer out; a fake's begins with reasoning, which templates may drop later."""
        if isinstance(self.lm, FakeLM) and self.lm.tokenizer is not None:
            self.lm.says(self.lm.tokenizer.encode_continuation("m</think>"), session.position)
        for _ in pieces:
            pass

    def start(self, budget: int = 10**9) -> Session:
        session = Session(self.lm, system="s", snapshot_bytes=budget, seed=0)
        return session if self.ahead is None else session.read(self.ahead)

    def fresh(self, script: list[tuple[str, str]]) -> Session:
        """A session that said the script and nothing else, with all its snapshots."""
        if not script:
            return self.start()
        if tuple(script) not in self.fresh_ones:
            session = self.fresh(script[:-1]).fork()
            text, options = script[-1]
            self.finish(session, session.say(text, max_tokens=self.length, **eval(options)))
            self.fresh_ones[tuple(script)] = session
        return self.fresh_ones[tuple(script)]

    def check(self, held: Held) -> None:
        session, fresh = held.session, self.fresh(held.script)
        assert session.messages == fresh.messages
        assert session.rolling_hash == fresh.rolling_hash
        assert session.position == fresh.position
        got, ref = session.moment, fresh.moment
        assert (got.pending, got.recent, got.kept) == (ref.pending, ref.recent, ref.kept)
        self.check_state(got.state, ref.state)

    def check_state(self, got: Any, ref: Any) -> None:
        assert_states_equal(got, ref)

    def snapshots(self, held: Held) -> int:
        """How many exchanges can be taken back one by one; the moment before the first is one of them while kept."""
        session, n = held.session, len(held.session.turns)
        return next((k for k in range(n) if session._before(n - 1 - k) is None), n)

    def refused(self, held: Held, n: int) -> bool:
        """Whether the states of n exchanges ago are gone."""
        return n > self.snapshots(held) and not (n == len(held.script) and held.session._start is not None)

    @rule(held=held, text=TEXTS, options=OPTIONS)
    def say(self, held: Held, text: str, options: dict[str, Any]) -> None:
        self.finish(held.session, held.session.say(text, max_tokens=self.length, **options))
        held.script.append((text, repr(options)))
        self.check(held)

    @rule(target=held, held=held)
    def fork(self, held: Held) -> Held:
        return Held(held.session.fork(), [*held.script])

    @rule(held=held, n=st.integers(0, 4))
    def rewind(self, held: Held, n: int) -> None:
        if n > len(held.script):
            with pytest.raises(ValueError, match="between 0 and"):
                held.session.rewind(n)
        elif self.refused(held, n):
            with pytest.raises(SessionError, match="can be taken back"):
                held.session.rewind(n)
        else:
            held.session.rewind(n)
            del held.script[len(held.script) - n :]
        self.check(held)

    @rule(held=held, text=TEXTS, n=st.integers(1, 2), options=OPTIONS)
    def edit(self, held: Held, text: str, n: int, options: dict[str, Any]) -> None:
        if n > len(held.script):
            return
        if self.refused(held, n):
            with pytest.raises(SessionError, match="can be taken back"):
                held.session.edit(text, turns=n, max_tokens=self.length, **options)
            self.check(held)
            return
        self.finish(held.session, held.session.edit(text, turns=n, max_tokens=self.length, **options))
        held.script[len(held.script) - n :] = [(text, repr(options))]
        self.check(held)

    @rule(held=held, options=OPTIONS)
    def regenerate(self, held: Held, options: dict[str, Any]) -> None:
        if not held.script:
            return
        if self.refused(held, 1):
            with pytest.raises(SessionError, match="can be taken back"):
                held.session.regenerate(max_tokens=self.length, **options)
            self.check(held)
            return
        self.finish(held.session, held.session.regenerate(max_tokens=self.length, **options))
        held.script[-1] = (held.script[-1][0], repr(options))
        self.check(held)

    @rule(target=held, held=held)
    def save_and_open(self, held: Held) -> Held:
        path = self.folder / f"{self.files}.bmojo"
        self.files += 1
        held.session.save(path)
        twin = Held(Session.open(path, self.lm), [*held.script])
        path.unlink()
        assert twin.session.moment.draws == held.session.moment.draws
        assert self.snapshots(twin) == min(self.snapshots(held), 8)
        self.check(twin)
        return twin

    @rule(held=held)
    def leave_an_answer(self, held: Held) -> None:
        """Half an answer, taken back: the session is what it was."""
        answer = held.session.say("the river", max_tokens=4)
        next(answer, None)
        held.session.rewind()
        assert list(answer) == []
        self.check(held)

    def teardown(self) -> None:
        """What was done to one session changed no other."""
        for held in self.bundles.get("held", []):
            self.check(self.names_to_values[held.name])


class Remembering(Sessions):
    """The same with storage: all begin before the store's first block, so that each sees what it has said itself."""

    lm: Any  # WithStorage
    blank: Any

    def start(self, budget: int = 10**9) -> Session:
        session = Session(self.lm, system="s", snapshot_bytes=budget, seed=0, blank=self.blank)
        return session if self.ahead is None else session.read(self.ahead)

    def check_state(self, got: Any, ref: Any) -> None:
        """Numbers of branches and blocks are the store's; all that is computed is the same."""
        assert_states_equal(got._replace(branch=ref.branch, seen=ref.seen), ref)

    @rule(held=Sessions.held)
    def look(self, held: Held) -> None:
        """Looking into a session stores nothing and changes nothing."""
        number, sources = self.lm.store.next_id, self.lm.store.sources
        inspect(held.session)
        assert (self.lm.store.next_id, self.lm.store.sources) == (number, sources)
        self.check(held)


def run(steps: int, examples: int, kind: type[Sessions] = Sessions, **attributes: Any) -> None:
    machine = type("Machine", (kind,), attributes)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=steps))


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.mark.parametrize("template", ["plain", "thinking", "moving"])
def test_any_interleaving_on_a_fake(tokenizer: Tokenizer, tmp_path: Path, template: str) -> None:
    source = {"plain": tokenizer_folders.CHATML, "thinking": THINKING, "moving": MOVING}[template]
    lm = FakeLM(with_template(tokenizer, source))
    ahead = (None,) if template == "moving" else Sessions.texts_ahead  # that one cannot be read ahead
    run(20, 12, lm=lm, folder=tmp_path, budgets=(0, 50, 10**9), texts_ahead=ahead, length=16)


# A window, a fading ring and slots that overflow within a turn; a growing cache; layers without attention.
LAYERS = {
    "bmojo, mamba": {"layer_types": ("bmojo", "mamba")},
    "bmojo, attention": {"layer_types": ("bmojo", "attention"), "ssm": None, "n_fading": 0},
    "gdn in bmojo, small window": {
        "layer_types": ("bmojo", "attention"), "attention_window": 5, "window": 4, "chunk": 2,
        "ssm": {"kind": "gdn", "head_dim": 4},
    },
}  # fmt: skip


@cache
def model(engine: str, layers: str, tokenizer: Tokenizer) -> Any:
    config = Config(**{**ODD, "vocab_size": tokenizer.vocab_size, **LAYERS[layers]})
    return build(engine, config, random_weights(config), tokenizer)


@pytest.mark.parametrize("engine", ["mlx", "torch"])
@pytest.mark.parametrize("layers", LAYERS)
def test_any_interleaving_on_a_twin(tokenizer: Tokenizer, tmp_path: Path, layers: str, engine: str) -> None:
    lm = model(engine, layers, tokenizer)
    run(10, 10, lm=lm, folder=tmp_path, budgets=(0, 3 * lm.config.state_bytes(), 10**9))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["mlx", "torch"])
@pytest.mark.parametrize("layers", LAYERS)
def test_long_interleavings_on_a_twin(tokenizer: Tokenizer, tmp_path: Path, layers: str, engine: str) -> None:
    lm = model(engine, layers, tokenizer)
    run(20, 15, lm=lm, folder=tmp_path, budgets=(0, 3 * lm.config.state_bytes(), 10**9))


# --- with storage


def remember(tokenizer: Tokenizer, folder: Path, engine: str, steps: int, examples: int) -> None:
    config = odd("bmojo", "mamba", "bmojo", vocab_size=tokenizer.vocab_size, window=16, chunk=3)
    lm = build(engine, config, random_weights(config), tokenizer)
    with Store.create(folder / "store", shape_for(config, block=4), identity(lm), disk_bytes=10**8) as store:
        storing = WithStorage(lm, store, top_k=2, every=7, queries=3)
        budgets = (0, 3 * config.state_bytes(), 10**9)
        blank = storing.init_state()
        run(steps, examples, Remembering, lm=storing, folder=folder, budgets=budgets, blank=blank, length=9)
        assert store.next_id > 100


@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_any_interleaving_with_storage(tokenizer: Tokenizer, tmp_path: Path, engine: str) -> None:
    remember(tokenizer, tmp_path, engine, 8, 4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_long_interleavings_with_storage(tokenizer: Tokenizer, tmp_path: Path, engine: str) -> None:
    remember(tokenizer, tmp_path, engine, 20, 25)
