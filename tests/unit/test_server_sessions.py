"""Sessions of the server: each goes on by its id from its own state, across requests, restarts and kills."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bmojo_edge.engine import LM
from bmojo_edge.inspection import Inspection, inspect, inspecting
from bmojo_edge.server.app import Limits
from bmojo_edge.session import Session
from bmojo_edge.steps import Steps
from bmojo_edge.tokenizer import Tokenizer
from tests.unit.serving import Served, serving, until
from tests.unit.test_generation_engines import make

TEXTS = ["Hello", "the river 中", "why?", "and then?"]


@pytest.fixture(scope="module")
def lm(byte_level_folder: Path) -> LM:
    return make("mlx", Tokenizer.load(byte_level_folder))


@pytest.fixture(scope="module")
def served(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(lm, Limits(slots=40), sessions=tmp_path_factory.mktemp("sessions")) as served:
        yield served


@pytest.fixture
def read(lm: LM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of `prefill` has read."""
    found: list[int] = []
    prefill = lm.prefill

    def counted(self: LM, ids: Any, state: Any) -> Any:
        found.append(np.asarray(ids).size)
        return prefill(ids, state)

    monkeypatch.setattr(type(lm), "prefill", counted)
    return found


def answers(lm: LM, texts: list[str], system: str | None = None, max_tokens: int = 9) -> list[str]:
    """What the same conversation says without a server."""
    session = Session(lm, system)
    return ["".join(session.say(text, max_tokens=max_tokens)) for text in texts]


def told(response: dict[str, Any]) -> str:
    return response["choices"][0]["message"]["content"]


def get(served: Served, path: str) -> Any:
    response = served.http.get(f"/v1/sessions{path}")
    assert response.status_code == 200, response.text
    return response.json()


def act(served: Served, path: str, body: Any, status: int = 200) -> Any:
    response = served.http.post(f"/v1/sessions{path}", json=body)
    assert response.status_code == status, response.text
    return response.json()


# --- conversations


def test_a_session_says_what_the_conversation_says(served: Served, read: list[int]) -> None:
    shown: Any = None
    position = pending = 0  # of the tokens before a turn, those that its state has not taken in
    for n, (text, expected) in enumerate(zip(TEXTS, answers(served.lm, TEXTS), strict=True)):
        read.clear()
        response = served.ask("plain", text, max_tokens=9)
        assert told(response) == expected
        usage = response["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == position - pending
        assert sum(read) == usage["prompt_tokens"] - (position - pending) - 1
        shown, pending = get(served, "/plain"), response["choices"][0]["finish_reason"] == "length"
        assert shown["turns"] == n + 1
        assert position < shown["position"]
        position = shown["position"]
        assert shown["bytes"] == served.lm.config.state_bytes()
    assert shown["title"] == "Hello"
    assert [message["content"] for message in shown["messages"][::2]] == TEXTS
    assert [message["content"] for message in shown["messages"][1::2]] == answers(served.lm, TEXTS)


def test_a_system_message_begins_a_session(served: Served) -> None:
    system = {"role": "system", "content": "Be brief."}
    body: dict[str, Any] = {"model": "tiny", "session_id": "with-system", "temperature": 0, "max_tokens": 9}
    first = served.post({**body, "messages": [system, {"role": "user", "content": TEXTS[0]}]})
    assert [told(first.json()), told(served.ask("with-system", TEXTS[1], max_tokens=9))] == answers(
        served.lm, TEXTS[:2], "Be brief."
    )
    late = served.post({**body, "messages": [system, {"role": "user", "content": "x"}]})
    assert late.status_code == 400
    assert "has begun" in late.json()["error"]["message"]
    assert get(served, "/with-system")["messages"][0] == system
    act(served, "/with-system/rewind", {"turns": 2})
    assert told(served.ask("with-system", TEXTS[0], max_tokens=9)) == told(first.json())


def test_streaming_stop_strings_and_seeds(served: Served) -> None:
    session = Session(served.lm)
    session.read()
    whole = "".join(session.fork().say("Hello", max_tokens=30))
    stop = whole[8:10]
    expected = ["".join(session.say("Hello", max_tokens=30, stop=stop)), "".join(session.say("why?", max_tokens=9))]
    create = served.openai.chat.completions.create
    hello: list[Any] = [{"role": "user", "content": "Hello"}]
    chunks = create(
        model="tiny", messages=hello, max_tokens=30, temperature=0, stop=stop, stream=True,
        extra_body={"session_id": "stops"},
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected[0]
    assert get(served, "/stops")["messages"][-1]["content"] == expected[0]
    assert told(served.ask("stops", "why?", max_tokens=9)) == expected[1]
    drawn = Session(served.lm)
    expected = ["".join(drawn.say(text, max_tokens=9, temperature=1.0, seed=7)) for text in TEXTS[:2]]
    assert [told(served.ask("drawn", text, max_tokens=9, temperature=1.0, seed=7)) for text in TEXTS[:2]] == expected


def test_rewinding_and_regenerating(served: Served) -> None:
    said = [told(served.ask("rewound", text, max_tokens=9)) for text in TEXTS]
    shown = act(served, "/rewound/rewind", {"turns": 1})
    assert shown["turns"] == 3
    assert told(served.ask("rewound", TEXTS[3], max_tokens=9)) == said[3]
    assert act(served, "/rewound/rewind", {"turns": 3})["turns"] == 1  # further than states are kept
    assert get(served, "/rewound")["messages"][1:] == [{"role": "assistant", "content": said[0]}]
    assert told(served.ask("rewound", "why?", max_tokens=9)) == answers(served.lm, ["Hello", "why?"])[1]
    assert act(served, "/rewound/rewind", {"turns": 2})["position"] == 0
    assert told(served.ask("rewound", TEXTS[0], max_tokens=9)) == said[0]
    for turns in (0, 2, -1, "1", None):
        assert served.http.post("/v1/sessions/rewound/rewind", json={"turns": turns}).status_code == 400


def test_forks_go_their_own_way(served: Served) -> None:
    said = [told(served.ask("forked", text, max_tokens=9)) for text in TEXTS[:3]]
    whole = act(served, "/forked/fork", {}, 201)
    part = act(served, "/forked/fork", {"turns": 1}, 201)
    none = act(served, "/forked/fork", {"turns": 0}, 201)
    last = act(served, "/forked/fork", {"turns": 2}, 201)
    assert [fork["turns"] for fork in (whole, part, none, last)] == [3, 1, 0, 2]
    assert len({"forked", whole["id"], part["id"], none["id"], last["id"]}) == 5
    assert told(served.ask(part["id"], "why?", max_tokens=9)) == answers(served.lm, ["Hello", "why?"])[1]
    assert told(served.ask(last["id"], TEXTS[2], max_tokens=9)) == said[2]
    assert told(served.ask(none["id"], "Hello", max_tokens=9)) == said[0]
    expected = answers(served.lm, TEXTS)[3]
    assert told(served.ask(whole["id"], TEXTS[3], max_tokens=9)) == expected
    assert get(served, "/forked")["turns"] == 3
    assert told(served.ask("forked", TEXTS[3], max_tokens=9)) == expected
    assert served.http.post("/v1/sessions/forked/fork", json={"turns": 9}).status_code == 400
    assert served.http.post("/v1/sessions/forked/fork").status_code == 201  # all turns, without a body


def test_the_list_titles_and_removal(served: Served) -> None:
    made = act(served, "", {"id": "listed", "title": "A title"}, 201)
    assert made["title"] == "A title" and made["turns"] == made["position"] == 0
    assert act(served, "", {"id": "listed"}, 409)["error"]["message"]
    named = act(served, "", {}, 201)
    assert named["id"] not in ("listed", "")
    ids = [session["id"] for session in get(served, "")["data"]]
    assert ids.index(named["id"]) < ids.index("listed")  # the newest first
    served.ask("listed", "x" * 100, max_tokens=2)
    assert get(served, "/listed")["title"] == "A title"
    served.ask(named["id"], f"a\n b {'x' * 100}", max_tokens=2)
    assert get(served, f"/{named['id']}")["title"] == f"a b {'x' * 56}"
    assert served.http.patch("/v1/sessions/listed", json={"title": "Other"}).json()["title"] == "Other"
    assert served.http.delete("/v1/sessions/listed").status_code == 204
    for method, path in (("GET", ""), ("DELETE", ""), ("PATCH", ""), ("GET", "/memory"), ("POST", "/fork")):
        body = {"title": "x"} if method == "PATCH" else None
        assert served.http.request(method, f"/v1/sessions/listed{path}", json=body).status_code == 404
    assert "listed" not in [session["id"] for session in get(served, "")["data"]]


def test_what_a_session_remembers(served: Served) -> None:
    session = Session(served.lm)
    for text in TEXTS[:2]:
        served.ask("remembers", text, max_tokens=9)
        for _ in session.say(text, max_tokens=9):
            pass
    found, expected = get(served, "/remembers/memory"), json.loads(json.dumps(inspect(session).as_json()))
    assert found.pop("bytes") == served.lm.config.state_bytes()
    for got, want in zip(found.pop("layers"), expected.pop("layers"), strict=True):
        assert [token["text"] for token in got["eidetic"]] == [token["text"] for token in want["eidetic"]]
        assert got["attention"] == pytest.approx(want["attention"], abs=1e-4)
    assert found.pop("attention") == pytest.approx(expected.pop("attention"), abs=1e-4)
    assert found == expected
    whole, quick = get(served, "/remembers/memory"), get(served, "/remembers/memory?attention=false")
    assert quick.pop("queries") == 0 and quick.pop("attention") == {} and "not asked for" in quick.pop("unknown")
    for layer, looked in zip(quick["layers"], whole["layers"], strict=True):
        assert layer == {**looked, "attention": {}}
    assert quick["position"] == whole["position"] and quick["bytes"] == whole["bytes"]
    assert served.http.get("/v1/sessions/remembers/memory?attention=perhaps").status_code == 400
    assert get(served, f"/{act(served, '', {}, 201)['id']}/memory")["unknown"]


def test_a_question_waits_while_memories_are_looked_into(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.ask("watched", "Hello", max_tokens=3)
    looking, looked = threading.Event(), threading.Event()

    def slowly(session: Session) -> Steps[Inspection]:
        looking.set()
        end = time.monotonic() + 1.5  # longer than anyone waits for an answer to end
        while time.monotonic() < end:
            yield
        looked.set()
        return (yield from inspecting(session))

    monkeypatch.setattr("bmojo_edge.server.sessions.inspecting", slowly)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(served.http.get, "/v1/sessions/watched/memory")
        assert looking.wait(20)
        served.ask("another", "Hello", max_tokens=3)  # the model goes on meanwhile
        assert not looked.is_set()
        served.ask("watched", "And now?", max_tokens=3)
        assert looked.is_set()
        assert found.result().json()["queries"] == 3


# --- who may do what, when


def test_one_answer_at_a_time(endless: LM, tmp_path: Path) -> None:
    with serving(endless, Limits(slots=40, max_tokens=100_000), sessions=tmp_path) as served:
        with stream_of(served, "busy") as lines:
            for _ in range(20):
                next(lines)
            refused = served.post(
                {"model": "tiny", "session_id": "busy", "messages": [{"role": "user", "content": "x"}]}
            )
            assert refused.status_code == 409
            assert refused.json()["error"]["code"] == "session_busy"
            assert served.http.delete("/v1/sessions/busy").status_code == 409
            assert get(served, "/busy")["turns"] == 0
            served.ask("other", "Hello", max_tokens=3)
        # The client has gone: the turn ends with what was said, and the session is free at once.
        assert act(served, "/busy/fork", {}, 201)["turns"] == 1
        assert len(get(served, "/busy")["messages"][1]["content"]) > 10
        assert served.ask("busy", "go on", max_tokens=3)["usage"]["prompt_tokens_details"]["cached_tokens"] > 20
    with serving(endless, sessions=tmp_path) as served:
        assert get(served, "/busy")["turns"] == 2


class stream_of:
    """An open stream of a session's answer on a connection of its own."""

    def __init__(self, served: Served, session: str) -> None:
        self._client = httpx.Client(base_url=served.address, timeout=30)
        message = {"role": "user", "content": "Hello"}
        self._body = {"model": "tiny", "session_id": session, "messages": [message], "max_tokens": 100_000}

    def __enter__(self) -> Iterator[str]:
        self._open = self._client.stream("POST", "/v1/chat/completions", json={**self._body, "stream": True, "seed": 1})
        response = self._open.__enter__()
        assert response.status_code == 200
        return response.iter_lines()

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(None, None, None)
        self._client.close()


@pytest.fixture
def endless(byte_level_folder: Path) -> LM:
    """A model whose answers do not end before `max_tokens`."""
    tokenizer = Tokenizer.load(byte_level_folder)
    tokenizer.eos_ids = frozenset()
    return make("mlx", tokenizer)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "x"}],
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "word " * 40_000}],
    ],
)
def test_messages_that_are_no_turn_begin_no_session(served: Served, messages: list[dict[str, str]]) -> None:
    body = json.dumps({"model": "tiny", "session_id": "never", "messages": messages})
    response = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert served.http.get("/v1/sessions/never").status_code == 404


@pytest.mark.parametrize("name", ["", "a" * 65, "../x", "a/b", "a.b", "ä", "a\n", "a\0", "~a", " "])
def test_ids_that_are_none(served: Served, name: str) -> None:
    body = {"model": "tiny", "session_id": name, "messages": [{"role": "user", "content": "x"}]}
    assert served.post(body).status_code == 400
    assert served.http.post("/v1/sessions", json={"id": name}).status_code == 400


def test_a_model_that_fails_takes_the_turn_back(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lm, sessions=tmp_path) as served:
        served.ask("failing", "Hello", max_tokens=3)
        with monkeypatch.context() as broken:

            def fails(self: LM, *_: Any) -> Any:
                raise RuntimeError("out of memory")

            broken.setattr(type(lm), "decode_one_token", fails)
            body = {"model": "tiny", "session_id": "failing", "messages": [{"role": "user", "content": "x"}]}
            assert served.post(body).status_code == 500
        assert get(served, "/failing")["turns"] == 1
        assert told(served.ask("failing", "why?", max_tokens=9)) == (
            said := Session(lm), list(said.say("Hello", max_tokens=3)), "".join(said.say("why?", max_tokens=9))
        )[2]  # fmt: skip


# --- memory and disk


def test_a_restart_reads_nothing_again(lm: LM, tmp_path: Path, read: list[int]) -> None:
    expected = answers(lm, TEXTS)
    with serving(lm, sessions=tmp_path) as served:
        for text, said in zip(TEXTS[:2], expected, strict=False):
            assert told(served.ask("Kept", text, max_tokens=9)) == said
        before = get(served, "/Kept")
    with serving(lm, sessions=tmp_path) as served:
        assert get(served, "/Kept") == before
        read.clear()
        response = served.ask("Kept", TEXTS[2], max_tokens=9)
        assert told(response) == expected[2]
        assert response["usage"]["prompt_tokens_details"]["cached_tokens"] >= before["position"] - 1
        assert sum(read) < 40
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["lock", "~kept.bmojo", "~kept.jsonl"]


@pytest.mark.slow
def test_turn_100_reads_what_turn_2_reads(lm: LM, tmp_path: Path, read: list[int]) -> None:
    counts = []
    for turns in (range(50), range(50, 99), range(99, 100)):
        with serving(lm, Limits(slots=8), sessions=tmp_path) as served:
            for n in turns:
                read.clear()
                usage = served.ask("long", f"question {n:03}", max_tokens=5)["usage"]
                counts.append(sum(read))
                assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] == counts[-1] + 1
            assert get(served, "/long")["turns"] == turns[-1] + 1
    assert max(counts[1:]) <= min(counts[1:]) + 2  # whether an answer ended by itself, and how its question was cut


def test_ending_keeps_what_was_said(endless: LM, tmp_path: Path) -> None:
    """An answer that is not done when the time for it is over is kept as far as it went."""
    with (
        serving(endless, Limits(slots=40, max_tokens=100_000), sessions=tmp_path) as served,
        stream_of(served, "open") as lines,
    ):
        begun = [json.loads(line[6:]) for line in (next(lines) for _ in range(40)) if line]
        served.stop()
    with serving(endless, sessions=tmp_path) as served:
        found = get(served, "/open")
        assert found["turns"] == 1
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in begun)
        assert found["messages"][1]["content"].startswith(said)
        assert served.ask("open", "and?", max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"] > 20


def test_a_state_that_is_lost_or_damaged_is_read_from_the_words(
    lm: LM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(lm, TEXTS)

    def again(turn: int) -> None:
        with serving(lm, sessions=tmp_path) as served:
            assert told(served.ask("kept", TEXTS[turn], max_tokens=9)) == expected[turn]

    again(0)
    again(1)
    (tmp_path / "kept.bmojo").unlink()
    again(2)
    raw = (tmp_path / "kept.bmojo").read_bytes()
    (tmp_path / "kept.bmojo").write_bytes(raw[: len(raw) // 2])
    with (tmp_path / "kept.jsonl").open("ab") as file:
        file.write(b'{"event": "turn", "user": "cut of')  # as a kill may leave it
    again(3)
    assert "truncated or damaged" in caplog.text
    assert "is passed over" in caplog.text
    with serving(lm, sessions=tmp_path) as served:
        assert get(served, "/kept")["turns"] == 4
        assert served.ask("kept", "x", max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"] > 30


@pytest.mark.parametrize("save", [True, False])
def test_states_dropped_from_memory_come_back(lm: LM, tmp_path: Path, save: bool, read: list[int]) -> None:
    expected = answers(lm, TEXTS)
    with serving(lm, Limits(slots=5), sessions=tmp_path if save else None) as served:
        for turn, text in enumerate(TEXTS):
            for who in "abcd":
                read.clear()
                assert told(served.ask(who, text, max_tokens=9)) == expected[turn]
                assert served.health()["kept"] <= 5
                assert not save or sum(read) < 40
    assert (len(list(tmp_path.glob("*.bmojo"))) == 4) == save


def test_conversations_beside_each_other(lm: LM, tmp_path: Path) -> None:
    expected = {n: answers(lm, TEXTS, max_tokens=n) for n in range(4, 10)}
    said: dict[int, list[str]] = {n: [] for n in expected}
    with serving(lm, Limits(slots=7), sessions=tmp_path) as served:  # room for two at a time

        def talk(n: int) -> None:
            for text in TEXTS:
                said[n].append(told(served.ask(f"s{n}", text, max_tokens=n)))

        threads = [threading.Thread(target=talk, args=(n,)) for n in said]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: served.health()["running"] == 0)
    assert said == expected


def test_no_room_and_nobody_may_wait(endless: LM) -> None:
    with serving(endless, Limits(slots=3, max_waiting=0, max_tokens=100_000)) as served:
        with stream_of(served, "first"):
            body = {"model": "tiny", "session_id": "second", "messages": [{"role": "user", "content": "x"}]}
            refused = served.post({**body, "max_tokens": 2})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert [session["id"] for session in get(served, "")["data"]] == ["first"]
        until(lambda: served.health()["running"] == 0)
        assert served.post({**body, "max_tokens": 2}).status_code == 200


def test_at_most_so_many_sessions(lm: LM) -> None:
    with serving(lm, Limits(slots=4, max_stored=2)) as served:
        for n in range(2):
            act(served, "", {"id": f"s{n}"}, 201)
        assert "delete some" in act(served, "", {}, 429)["error"]["message"]
        served.ask("s1", "Hello", max_tokens=2)
        assert act(served, "/s1/fork", {}, 429)
        assert served.http.delete("/v1/sessions/s0").status_code == 204
        act(served, "/s1/fork", {}, 201)


def test_one_server_a_folder(lm: LM, tmp_path: Path) -> None:
    with (
        serving(lm, sessions=tmp_path),
        pytest.raises(OSError, match="another server keeps its sessions there"),
        serving(lm, sessions=tmp_path),
    ):
        pass
