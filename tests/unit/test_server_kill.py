"""Servers that are killed: what was said before is there again, and nothing of it is read again."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import bmojo_edge as be
from tests.unit.serving import command

LONG = 3_000  # tokens of the answer that is cut off


def ask(address: str, session: str, text: str, **options: Any) -> httpx.Response:
    body = {"model": "small", "session_id": session, "messages": [{"role": "user", "content": text}], "temperature": 0}
    response = httpx.post(f"{address}/v1/chat/completions", json={**body, **options}, timeout=60)
    assert response.status_code == 200, response.text
    return response


def told(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


def shown(address: str, session: str) -> dict[str, Any]:
    return httpx.get(f"{address}/v1/sessions/{session}", timeout=60).json()


@contextmanager
def answering(address: str, session: str) -> Iterator[Iterator[str]]:
    """An answer in progress: the texts of its chunks."""
    message = {"role": "user", "content": "on and on"}
    body = {"model": "small", "session_id": session, "messages": [message], "max_tokens": LONG, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as response:
        lines = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
        yield (line["choices"][0]["delta"].get("content") or "" for line in lines if "choices" in line)


def expected(model: Path, count: int) -> list[str]:
    session = be.Session(be.load(model))
    return ["".join(session.say(f"question {i}", max_tokens=8)) for i in range(count)]


def kill_and_go_on(model: Path, folder: Path, kills: int, rng: random.Random) -> None:
    """Turns, each followed by a kill at some moment of the next answer, or of what is done after it."""
    answers, read_again = expected(model, kills + 1), 0
    for n in range(kills + 1):
        with command(model, "--sessions-dir", str(folder), "--no-page") as (child, address, _):
            assert shown(address, "kept").get("turns", 0) == n
            response = ask(address, "kept", f"question {n}", max_tokens=8)
            assert told(response) == answers[n]
            usage = response.json()["usage"]
            read_again += n > 0 and usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] > 60
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.05)  # while the state is being saved
            else:
                with answering(address, "kept") as pieces:
                    for _ in range(rng.randrange(1, 40)):
                        next(pieces)
                    child.kill()
                    child.wait()
            child.kill()
            child.wait()
    assert read_again == 0
    assert not [path for path in folder.iterdir() if path.name not in ("lock", "kept.bmojo", "kept.jsonl")]


def test_a_kill_loses_at_most_the_answer_in_hand(model_folder: Path, tmp_path: Path) -> None:
    kill_and_go_on(model_folder, tmp_path, 1, random.Random(1))


@pytest.mark.slow
def test_many_kills(model_folder: Path, tmp_path: Path) -> None:
    kill_and_go_on(model_folder, tmp_path, 25, random.Random(2))
