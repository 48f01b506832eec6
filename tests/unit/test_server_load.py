"""The server under load: many conversations at a time say what each says alone, and nothing is left of those who go.

The default suite runs each of these small; `-m slow` runs them as large as the names say.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import openai
import psutil
import pytest

from bmojo_edge.engine import LM, evaluate
from bmojo_edge.generate import prompt_ids
from bmojo_edge.server.app import Limits
from bmojo_edge.session import Session
from bmojo_edge.tokenizer import Tokenizer
from tests.unit.serving import command, serving, until
from tests.unit.test_generation_engines import make

ANSWER = 8  # tokens
TIE = 1e-4  # nats: rounding decides between two tokens that are closer


@pytest.fixture(scope="module")
def lm(byte_level_folder: Path) -> LM:
    return make("mlx", Tokenizer.load(byte_level_folder))


# --- many conversations


class Turn(NamedTuple):
    """What was asked, all of the conversation, and the answer's tokens as the server told them."""

    messages: list[Any]
    tokens: list[str]


def question(who: int, turn: int) -> str:
    return f"{'why? ' * (who % 5)}number {who}, {turn}"


def talk(client: openai.OpenAI, who: int, turns: int) -> list[Turn]:
    """A conversation: a third sends the whole history, a third too but streams, a third goes on by id."""
    messages: list[Any] = [{"role": "system", "content": f"You are number {who}."}]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": ANSWER, "temperature": 0, "logprobs": True}
    if who % 3 == 2:
        options["extra_body"] = {"session_id": f"who-{who}"}
    found = []
    for turn in range(turns):
        messages.append({"role": "user", "content": question(who, turn)})
        sent = messages if who % 3 < 2 or turn == 0 else messages[-1:]
        if who % 3 == 1:
            with client.chat.completions.create(messages=sent, stream=True, **options) as stream:
                choices = [chunk.choices[0] for chunk in stream if chunk.choices]
            text = "".join(choice.delta.content or "" for choice in choices)
            logprobs = [choice.logprobs for choice in choices]
        else:
            choice = client.chat.completions.create(messages=sent, **options).choices[0]
            text, logprobs = choice.message.content or "", [choice.logprobs]
        tokens = [one.token for part in logprobs if part is not None for one in part.content or []]
        found.append(Turn([*messages], tokens))
        messages.append({"role": "assistant", "content": text})
    return found


def lost(lm: LM, state: Any, ids: list[int], tokens: list[str]) -> float:
    """0 where the model says these tokens to these ids; else by how many nats the first other one is less likely."""
    assert lm.tokenizer is not None
    logits, state = lm.prefill(np.array([ids], np.int32), state)
    for n in range(ANSWER):
        row = evaluate(logits, state)
        best = int(row.argmax())
        text, told = lm.tokenizer.decode([best]), tokens[n] if n < len(tokens) else None
        if best in lm.tokenizer.eos_ids:
            return 0.0 if told is None else np.inf
        if text != told:
            rivals = [float(row[best] - row[i]) for i in np.argsort(-row)[1:5] if lm.tokenizer.decode([int(i)]) == told]
            return min(rivals, default=np.inf)
        logits, state = lm.decode_one_token(np.array([best], np.int32), state)
    return 0.0


def losses(lm: LM, who: int, conversation: list[Turn]) -> Iterator[float]:
    """`lost` of each answer. One that goes on by id is compared to the same session alone, until they differ."""
    if who % 3 < 2:
        for turn in conversation:
            yield lost(lm, lm.init_state(), prompt_ids(lm, turn.messages), turn.tokens)
        return
    session = Session(lm, conversation[0].messages[0]["content"])
    for turn in conversation:
        for _ in session.say(turn.messages[-1]["content"], max_tokens=ANSWER):
            pass
        yield (found := lost(lm, *session.last_exchange()[:2], turn.tokens))
        if found:
            return


def check_conversations(lm: LM, folder: Path, conversations: int, turns: int) -> tuple[int, int]:
    """All of them at a time; how many answers were compared, and in how many rounding decided."""
    limits = Limits(slots=4 * conversations, max_running=16, max_waiting=conversations)
    with serving(lm, limits, sessions=folder) as served, ThreadPoolExecutor(conversations) as pool:
        patient = served.openai.with_options(timeout=600)
        found = list(pool.map(lambda who: talk(patient, who, turns), range(conversations)))
        metrics = served.http.get("/metrics").text
    assert f"bmojo_answers_total {conversations * turns}\n" in metrics
    compared = [found for who, conversation in enumerate(found) for found in losses(lm, who, conversation)]
    assert max(compared) < TIE, compared
    return len(compared), sum(loss > 0 for loss in compared)


def test_conversations_at_a_time_say_what_each_says_alone(lm: LM, tmp_path: Path) -> None:
    assert check_conversations(lm, tmp_path, 6, 3) == (18, 0)


@pytest.mark.slow
def test_64_conversations_of_20_turns(lm: LM, tmp_path: Path) -> None:
    answers, ties = check_conversations(lm, tmp_path, 64, 20)
    print(f"{answers} answers compared, {ties} of them differ, where two tokens are within {TIE} nats")
    assert answers > 1200
    assert ties <= 3


# --- clients that go away


def vanish(address: str, session: str | None) -> None:
    """Ask for a long answer as a stream, see it begin, and hang up without a word."""
    host, port = address.removeprefix("http://").split(":")
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    raw = json.dumps({**body, "max_tokens": 100_000, "seed": 1, **({"session_id": session} if session else {})})
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(f"{head}content-length: {len(raw)}\r\n\r\n{raw}".encode())
        got = b""
        while got.count(b"data: ") < 4:
            got += (piece := client.recv(4096))
            assert piece, got
        assert got.startswith(b"HTTP/1.1 200"), got


def check_vanishing(byte_level_folder: Path, folder: Path, clients: int) -> None:
    tokenizer = Tokenizer.load(byte_level_folder)
    tokenizer.eos_ids = frozenset()  # answers do not end by themselves
    limits = Limits(slots=40, max_running=8, max_waiting=64, max_tokens=100_000)
    with serving(make("mlx", tokenizer), limits, sessions=folder) as served, ThreadPoolExecutor(8) as pool:
        sessions = [f"s{n}" if n % 4 == 0 else None for n in range(clients)]
        list(pool.map(lambda session: vanish(served.address, session), sessions))
        until(lambda: served.health()["running"] == served.health()["waiting"] == served.health()["reading"] == 0)
        assert served.health()["kept"] <= limits.slots
        assert f"bmojo_cancelled_total {clients}\n" in served.http.get("/metrics").text
        stored = served.http.get("/v1/sessions").json()["data"]
        assert len(stored) == len([session for session in sessions if session])
        assert all(session["turns"] == 1 for session in stored)  # what was said stays
        with ThreadPoolExecutor(8) as eight:  # all places are free
            said = list(eight.map(lambda n: served.ask(f"after{n}", "Hello", max_tokens=3), range(8)))
        assert len(said) == 8


def test_clients_that_vanish_leave_nothing(byte_level_folder: Path, tmp_path: Path) -> None:
    check_vanishing(byte_level_folder, tmp_path, 24)


@pytest.mark.slow
def test_1000_clients_that_vanish(byte_level_folder: Path, tmp_path: Path) -> None:
    check_vanishing(byte_level_folder, tmp_path, 1000)


# --- memory


def requests(address: str, count: int, first: int) -> None:
    """Requests of every kind, all of them answered; the prompts differ, the sessions are forty."""

    def one(n: int) -> None:
        message = {"role": "user", "content": f"number {n}"}
        body: dict[str, Any] = {"model": "small", "messages": [message], "max_tokens": 2, "stream": n % 3 == 0}
        if n % 4 == 1:
            body |= {"session_id": f"s{n % 40}"}
        if n % 50 == 2:
            response = client.get(f"/v1/sessions/s{n % 40 - n % 40 % 4 + 1}/memory")
        elif n % 50 == 7:
            response = client.post(f"/v1/sessions/s{n % 40 - n % 40 % 4 + 1}/rewind", json={"turns": 1})
        else:
            response = client.post("/v1/chat/completions", json=body)
        assert response.status_code in (200, 404, 409), response.text

    with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(first, first + count)))


def sizes(model: Path, folder: Path, parts: int, each: int) -> list[float]:
    """MiB that a server of at most 50 states takes after each part of so many requests."""
    with command(model, "--sessions-dir", str(folder), "--max-sessions", "50", "--no-page") as (child, address, _):
        process, found = psutil.Process(child.pid), []
        for part in range(parts):
            requests(address, each, each * part)
            found.append(process.memory_info().rss / 2**20)
        assert httpx.get(f"{address}/health").json()["kept"] <= 50
        assert process.num_fds() < 60
    print(f"MiB after each {each:,} requests:", [round(size, 1) for size in found])
    return found


@pytest.mark.slow
def test_memory_is_flat_over_10_000_requests(model_folder: Path, tmp_path: Path) -> None:
    first, *found = sizes(model_folder, tmp_path, 11, 1000)  # the first 1,000 warm up
    assert max(found) - first < 24
    assert max(found[5:]) - max(found[:5]) < 8  # it does not creep
