"""Session files: all of a session comes back, their size is bounded, and what is damaged or foreign is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from bmojo_edge import session_file
from bmojo_edge.config import Config
from bmojo_edge.moment import first_moment
from bmojo_edge.session import KEPT_TURNS, SAVED_TURNS, Session, SessionError
from bmojo_edge.state import leaves
from bmojo_edge.tokenizer import Tokenizer
from tests.helpers import ODD, assert_states_equal, random_weights, to_numpy
from tests.twins import ENGINES, build
from tests.unit.fake_lm import FakeLM
from tests.unit.test_session import MOVING, THINKING, say, with_template

ROOT = Path(__file__).parents[2]
SAVED_TEXT = 64  # in place of the real one: the fake model is slow with long texts


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.fixture
def lm(tokenizer: Tokenizer) -> FakeLM:
    return FakeLM(tokenizer)


def live(engine: str, tokenizer: Tokenizer, seed: int = 0, **overrides: Any) -> Any:
    config = Config(**{**ODD, "vocab_size": tokenizer.vocab_size, "layer_types": ("bmojo", "mamba"), **overrides})
    return build(engine, config, random_weights(config, seed), tokenizer)


def talked(lm: Any, turns: int = 2, **options: Any) -> Session:
    session = Session(lm, system="Be brief.", seed=1)
    for i in range(turns):
        for _ in session.say(f"question {i}", max_tokens=4, temperature=1.0, **options):
            pass
    return session


# --- all of it comes back


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_everything_comes_back(tokenizer: Tokenizer, tmp_path: Path, engine: str, dtype: str) -> None:
    lm = live(engine, tokenizer, dtype=dtype)
    session = talked(lm, 3)
    session.fork()  # the next one draws other numbers, also after opening
    session.save(tmp_path / "a.bmojo")
    again = Session.open(tmp_path / "a.bmojo", lm)
    for ours, theirs in ((session, again), (session.rewind(), again.rewind())):
        for (name, a), (_, b) in zip(leaves(ours.moment.state), leaves(theirs.moment.state), strict=True):
            assert type(a) is type(b) and str(a.dtype) == str(b.dtype), name
        assert_states_equal(ours.moment.state, theirs.moment.state)
        assert ours.moment._replace(state=None) == theirs.moment._replace(state=None)
        assert (ours.messages, ours.position, ours.nbytes) == (theirs.messages, theirs.position, theirs.nbytes)
        assert [t.finish_reason for t in ours.turns] == [t.finish_reason for t in theirs.turns]
        # Unseeded: the random numbers come back as well.
        ask = {"max_tokens": 6, "temperature": 2.0, "repetition_penalty": 1.3}
        assert "".join(ours.fork().say("more", **ask)) == "".join(theirs.fork().say("more", **ask))


def test_a_file_goes_from_one_twin_to_the_other(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours, theirs = (live(engine, tokenizer) for engine in ENGINES)
    session = talked(ours)
    session.save(tmp_path / "a.bmojo")
    moved = Session.open(tmp_path / "a.bmojo", theirs)
    assert_states_equal(session.moment.state, moved.moment.state)
    assert "".join(session.say("more", max_tokens=8)) == "".join(moved.say("more", max_tokens=8))


def test_a_cache_that_grows_is_saved_as_far_as_it_has_grown(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lm = live("mlx", tokenizer, layer_types=("attention", "bmojo"), ssm=None, n_fading=0)
    session = Session(lm)
    session.save(tmp_path / "a.bmojo")
    assert Session.open(tmp_path / "a.bmojo", lm).position == 0
    for _ in session.read("the river runs " * 100).say("x", max_tokens=3):
        pass
    session.save(tmp_path / "a.bmojo")
    assert_states_equal(Session.open(tmp_path / "a.bmojo", lm).moment.state, session.moment.state)


def test_saving_while_answering_saves_the_answer_so_far(lm: FakeLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    session = Session(lm)
    answer = session.say("the river", max_tokens=50)
    lm.says([*tokenizer.encode_continuation("runs to the sea"), 2], session.position)
    first = next(answer)
    session.save(tmp_path / "a.bmojo")
    assert Session.open(tmp_path / "a.bmojo", lm).messages[-1]["content"] == first
    assert first + "".join(answer) == "runs to the sea"


@given(splits=st.lists(st.integers(1, 40), min_size=1, max_size=8), pending=st.integers(0, 3), seed=st.integers(0, 3))
@settings(max_examples=10)
def test_ids_of_kept_tokens_are_known_however_they_came(
    tokenizer: Tokenizer, splits: list[int], pending: int, seed: int
) -> None:
    lm, rng = live("mlx", tokenizer), np.random.default_rng(seed)
    ids = rng.integers(0, tokenizer.vocab_size, sum(splits) + pending).tolist()
    moment, fed = first_moment(lm.init_state(), None), 0
    for n in splits:  # some of each call's ids are left to the next
        end = fed + n
        _, state = lm.prefill(np.array([ids[int(moment.state.position[0]) : end]]), moment.state)
        moment = moment.after(ids[moment.position : end + pending], state, ids[end : end + pending], lm.config)
        fed = end
        eidetic = to_numpy(state.layers[0].eidetic.positions)[0]
        expected = {*eidetic[eidetic >= 0].tolist(), *range(min(lm.config.n_sinks, end))}
        assert moment.kept == {p: ids[p] for p in expected}
        assert moment.recent == tuple(ids[max(0, end - lm.config.window) : end + pending])


# --- its size is bounded


def test_the_size_does_not_follow_the_past(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lm = live("mlx", tokenizer)
    sizes = set()
    for n in (30, 1000):
        session = Session(lm).read("the river runs to the sea. " * n)
        assert session.position > 3 * n
        for i in range(SAVED_TURNS + 2):
            for _ in session.say(f"{i}", max_tokens=4):
                pass
        session.save(tmp_path / "a.bmojo")
        sizes.add((tmp_path / "a.bmojo").stat().st_size)
    assert len(sizes) == 1
    assert sizes.pop() <= (SAVED_TURNS + 1) * (lm.config.state_bytes() + 4096) + 2 * session_file._ROUND


def test_a_long_conversation_is_saved_in_bounded_room(
    lm: FakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmojo_edge.turn.SAVED_TEXT", SAVED_TEXT)
    session = Session(lm)
    long = "x" * 4 * SAVED_TEXT
    sizes = set()
    for i in range(90):
        say(session, f"{i}{long}", "ok")
        if i > 75:
            session.save(tmp_path / "a.bmojo")
            sizes.add((tmp_path / "a.bmojo").stat().st_size)
    assert len(sizes) == 1
    content, _ = session_file.read(tmp_path / "a.bmojo")
    assert len(content["turns"]) == KEPT_TURNS
    assert {len(turn["user"]) for turn, _ in content["turns"]} == {SAVED_TEXT}
    again = Session.open(tmp_path / "a.bmojo", lm)
    assert again.rolling_hash == session.rolling_hash
    assert again.messages[-2]["content"] == f"89{long}"[: SAVED_TEXT // 2] + long[-SAVED_TEXT // 2 :]
    with pytest.raises(SessionError, match="kept only"):
        again.regenerate()
    with pytest.raises(SessionError, match=f"only the last {SAVED_TURNS} of the 90 exchanges"):
        again.rewind(SAVED_TURNS + 1)
    assert say(again, "why", temperature=1.0, seed=3) == say(session, "why", temperature=1.0, seed=3)
    assert again.rolling_hash == session.rolling_hash


@pytest.mark.parametrize("template", [THINKING, MOVING])
def test_long_texts_that_a_template_may_rewrite_are_saved_whole(
    tokenizer: Tokenizer, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmojo_edge.turn.SAVED_TEXT", SAVED_TEXT)
    lm = FakeLM(with_template(tokenizer, template))
    session, long = Session(lm, system="s"), "the river " * (SAVED_TEXT // 5)
    for _ in range(2):
        say(session, "Hello", f"hm</think>{long}", max_tokens=1000)
    session.save(tmp_path / "a.bmojo")
    again = Session.open(tmp_path / "a.bmojo", lm)
    fed = []
    for s in (session, again):
        lm.fed.clear()
        say(s, "more", "hm</think>x", max_tokens=20)
        fed.append([*lm.fed])
    assert fed[0] == fed[1]  # from the same moment on
    assert again.rolling_hash == session.rolling_hash
    assert again.messages == session.messages


def test_snapshots_in_a_file_are_few(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = live("mlx", tokenizer)
    session = talked(lm, 5)
    for room, kept in ((0, 1), (4 * lm.config.state_bytes(), 3), (10**9, 5)):
        monkeypatch.setattr("bmojo_edge.session.SAVED_BYTES", room)
        session.save(tmp_path / "a.bmojo")
        found = [turn.before is not None for turn in Session.open(tmp_path / "a.bmojo", lm).turns]
        assert found == [False] * (5 - kept) + [True] * kept


# --- what is refused


def test_a_file_that_is_none(lm: FakeLM, tmp_path: Path) -> None:
    path = tmp_path / "a.bmojo"
    with pytest.raises(FileNotFoundError, match=r"a\.bmojo"):
        Session.open(path, lm)
    for content in (b"", b"hello", b"\x10" * 9):
        path.write_bytes(content)
        with pytest.raises(SessionError, match=r"a\.bmojo: is no session file, or truncated or damaged"):
            Session.open(path, lm)
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(SessionError, match="is not a session file"):
        Session.open(path, lm)
    before = path.read_bytes()
    with pytest.raises(SessionError, match="exists and is no session file, so it is not replaced"):
        talked(lm).save(path)
    with pytest.raises(SessionError, match="not replaced"):
        talked(lm).save(tmp_path)
    with pytest.raises(SessionError, match="is a folder and no session file"):
        Session.open(tmp_path, lm)
    assert path.read_bytes() == before
    with pytest.raises(SessionError, match=r"nowhere.a\.bmojo: there is no folder .*nowhere"):
        talked(lm).save(tmp_path / "nowhere" / "a.bmojo")
    path.write_bytes(b"")  # as a temporary file of the caller's begins
    talked(lm).save(path)
    Session.open(path, lm)


def test_a_file_of_a_later_format(lm: FakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_file, "VERSION", 2)
    talked(lm).save(tmp_path / "a.bmojo")
    monkeypatch.undo()
    with pytest.raises(SessionError, match="version: is 2, this program reads 1"):
        Session.open(tmp_path / "a.bmojo", lm)


def test_every_cut_and_every_flipped_byte_is_seen(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lm, path = live("torch", tokenizer), tmp_path / "a.bmojo"
    session = talked(lm)
    session.save(path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    size = int.from_bytes(data[:8], "little")
    for cut in (0, 1, 7, 8, 9, 8 + size // 2, 8 + size, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(SessionError, match=r"a\.bmojo: "):
            Session.open(path, lm)
    tensors = {f"'{i}.state.{name}'" for i in range(9) for name, _ in leaves(session.moment.state)}
    tensors |= {f"'{i}.{name}'" for i in range(9) for name in ("recent", "kept")}
    for at in (*rng.integers(8 + size, len(data), 60), len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.integers(8))]) + data[at + 1 :])
        with pytest.raises(SessionError, match="damaged: tensor '") as error:
            Session.open(path, lm)
        assert any(name in str(error.value) for name in tensors)
    head = data[8 : 8 + size].rstrip()
    for at in rng.integers(8, 8 + len(head), 100):  # most of them in the padding
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(SessionError, match=r"a\.bmojo: "):
            Session.open(path, lm)
    path.write_bytes(data)
    Session.open(path, lm)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"window": 12}, "config.window is 8 in the session and 12 in this model"),
        ({"dtype": "float16"}, "config.dtype is 'float32' in the session and 'float16' in this model"),
        ({"layer_types": ("bmojo", "bmojo")}, "config.layer_types is "),
        ({"seed": 1}, "was made with a model of other weights"),
    ],
)
def test_another_model_is_refused_by_name(
    tokenizer: Tokenizer, tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    path = tmp_path / "a.bmojo"
    talked(live("mlx", tokenizer)).save(path)
    with pytest.raises(SessionError, match=f"a.bmojo: .*{says}.*open it with the model it was made with"):
        Session.open(path, live("mlx", tokenizer, **other))


def test_another_tokenizer_is_refused(lm: FakeLM, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    talked(lm).save(tmp_path / "a.bmojo")
    other = Tokenizer.load(request.getfixturevalue("metaspace_folder"))
    with pytest.raises(SessionError, match=r"model of other tokenizers; .*with, .*byte_level"):
        Session.open(tmp_path / "a.bmojo", FakeLM(other, vocab_size=lm.config.vocab_size))


# --- writing


def test_a_read_only_file_is_not_written_over(lm: FakeLM, tmp_path: Path) -> None:
    path = tmp_path / "a.bmojo"
    talked(lm, 1).save(path)
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(SessionError, match=r"a\.bmojo: is read-only"):
        talked(lm, 2).save(path)
    assert path.read_bytes() == before
    path.chmod(0o644)
    talked(lm, 2).save(path)


def test_a_write_that_fails_leaves_the_former_file(lm: FakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bmojo"
    talked(lm, 1).save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        talked(lm, 2).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.bmojo"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs POSIX")
def test_a_disk_that_fills_up_is_named_wherever_it_does(lm: FakeLM, tmp_path: Path) -> None:
    import resource

    path = tmp_path / "a.bmojo"
    talked(lm, 2).save(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    session = talked(lm, 3)
    for room in (0, 1000, len(before) - 1000, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # writing and closing fail, as on a full disk
        try:
            with pytest.raises(OSError, match=r"a\.bmojo"):
                session.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.bmojo"]


def test_a_file_is_plain_safetensors(lm: FakeLM, tmp_path: Path) -> None:
    talked(lm).save(tmp_path / "a.bmojo")
    with safe_open(tmp_path / "a.bmojo", framework="numpy") as file:
        head = file.metadata()
        assert set(file.keys()) >= {"0.state.position", "0.recent", "0.kept"}
    assert head["format"] == "bmojo-edge session"
    content = json.loads(head["session"])
    assert content["system"] == "Be brief."
    assert [turn["user"] for turn, _ in content["turns"]] == ["question 0", "question 1"]
    assert session_file.origin(tmp_path / "a.bmojo") == (content["model"]["folder"], None, None)


def trials(folder: Path, tokenizer: Path, n: int) -> dict[str, int]:
    """Saves and autosaves cut off by SIGKILL, see kill_trials.py."""
    roots = os.pathsep.join(str(ROOT / name) for name in (".", "converters", "metal_kernels", "cuda_kernels"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kill_trials", str(folder), str(tokenizer), str(n)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": roots}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")
def test_a_killed_process_leaves_a_session_that_opens(tmp_path: Path, byte_level_folder: Path) -> None:
    found = trials(tmp_path, byte_level_folder, 20)
    assert found["trials"] == 20
    assert found["cut_off_writes"] > 0  # some were killed while writing


@pytest.mark.slow
def test_a_thousand_killed_processes(tmp_path: Path, byte_level_folder: Path) -> None:
    found = trials(tmp_path, byte_level_folder, 1000)
    assert found["exchanges"] > 100 and found["cut_off_writes"] > 100
