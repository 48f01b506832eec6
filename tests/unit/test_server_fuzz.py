"""Requests made up from the server's own OpenAPI document, and by hand: answered with 2xx or 4xx, whatever they are.

schemathesis makes requests that fit the document and requests that do not, and holds status, content type and body of
each answer to it. The default suite sends few of them, `-m slow` 10,000.
"""

from __future__ import annotations

import json
import random
import re
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from bmojo_edge.engine import LM
from bmojo_edge.server.app import Limits
from bmojo_edge.tokenizer import Tokenizer
from tests.unit.serving import Served, serving, until
from tests.unit.test_generation_engines import make

LIMITS = Limits(slots=40, max_running=8, max_tokens=6, max_prompt=500, max_body=50_000, timeout=30)


@pytest.fixture(scope="module")
def lm(byte_level_folder: Path) -> LM:
    return make("mlx", Tokenizer.load(byte_level_folder))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "secret.jsonl").write_text('{"event": "begin", "at": 1, "title": "secret"}\n', encoding="utf-8")
    (folder / "page").mkdir()
    (folder / "page" / "index.html").write_text("chat", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(lm: LM, home: Path) -> Iterator[Served]:
    with serving(lm, LIMITS, sessions=home / "sessions", pages=home / "page") as served:
        yield served


# A document cannot say all of it: that a rewind goes no further than there are turns, that ids are those of the model
# and prompts fit it, that a turn is one message, that the model's template takes these messages.
SAYS_NOT_ALL = ["/v1/chat/completions", "/v1/completions", "/v1/sessions/{id}/fork", "/v1/sessions/{id}/rewind"]
ANY_TEXT = "GET /v1/models/{model}"  # is a name: no request of this kind is malformed
CONFIG = {
    "operations": [
        {
            "include-path": SAYS_NOT_ALL,
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "409", "429"]}},
        }
    ]
}


def fuzz(served: Served, requests: int) -> Counter[int]:
    """Send about so many requests, as many to each operation; how often each status came back."""
    config = schemathesis.Config.from_dict(CONFIG)
    schema = schemathesis.openapi.from_url(f"{served.address}/openapi.json", config=config)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) == 14
    kinds = [
        (operation, mode)
        for operation in operations
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE
        or (operation.label != ANY_TEXT and (operation.body or list(operation.iter_parameters())))
    ]
    statuses: Counter[int] = Counter()
    for operation, mode in kinds:
        send_some(operation, mode, -(-requests // len(kinds)), statuses)
    return statuses


def send_some(operation: Any, mode: GenerationMode, count: int, statuses: Counter[int]) -> None:
    names = random.Random(0)

    @seed(0)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck.__members__.values()],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and names.random() < 0.8:
            case.body["model"] = "tiny"  # else hardly a request would reach the model
        if mode is GenerationMode.POSITIVE and "id" in case.path_parameters and names.random() < 0.8:
            case.path_parameters["id"] = names.choice("ABCDEF")
        response = case.call(timeout=30)
        statuses[response.status_code] += 1
        case.validate_response(response)

    send()


def check_fuzz(served: Served, home: Path, requests: int) -> None:
    before = tree(home)
    for name in "ABCDEF":
        served.ask(name, "Hello", max_tokens=3)
    statuses = fuzz(served, requests)
    assert sum(statuses.values()) >= requests
    assert {status // 100 for status in statuses} == {2, 4}
    assert statuses[200] > requests / 20 and statuses[201] > requests / 50  # not all of it is refused
    until(lambda: served.health()["running"] == served.health()["waiting"] == served.health()["reading"] == 0)
    assert served.ask("after", "Hello", max_tokens=3)["usage"]["completion_tokens"]
    check_outside(before, home)


def tree(home: Path) -> dict[str, bytes]:
    """All files that are no sessions."""
    files = [path for path in home.rglob("*") if path.is_file() and path.parent.name != "sessions"]
    return {str(path.relative_to(home)): path.read_bytes() for path in files}


def check_outside(before: dict[str, bytes], home: Path) -> None:
    """Nothing outside the folder of sessions has changed, and in it there is nothing but sessions."""
    assert tree(home) == before
    names = [path.relative_to(home / "sessions").as_posix() for path in (home / "sessions").rglob("*")]
    written = [name for name in names if not re.fullmatch(r"\..*\.tmp-[0-9a-f-]+", name)]  # being saved just now
    assert all(re.fullmatch(r"lock|[a-z0-9_~-]+\.(jsonl|bmojo)", name) for name in written), written


def test_requests_from_the_document(served: Served, home: Path) -> None:
    check_fuzz(served, home, 60)


@pytest.mark.slow
def test_ten_thousand_requests_from_the_document(served: Served, home: Path) -> None:
    check_fuzz(served, home, 10_000)


# --- by hand

BASE: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
BODIES = {
    "nothing": b"",
    "cut off": b'{"model": "tiny", "mess',
    "two": b"{}{}",
    "no JSON": b"model=tiny&messages=hello",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
    "deep": b'{"model":' * 20_000,
    "deep lists": b"[" * 45_000,
    "deep and closed": b'{"messages":' + b"[" * 9_000 + b"]" * 9_000 + b"}",
    "NaN": json.dumps({**BASE, "temperature": float("nan")}).encode(),
    "infinity": b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
    "a number of many digits": b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5_000 + b"}",
    "a key twice": b'{"model": "tiny", "prompt": "x", "prompt": 3}',
    "huge": b'{"model": "tiny", "prompt": "' + b"x" * 60_000 + b'"}',
    "unknown field": json.dumps({**BASE, "surprise": 1}).encode(),
    "wrong types": json.dumps({**BASE, "messages": {"role": "user"}, "stream": "yes", "max_tokens": [1]}).encode(),
    "a lone surrogate": json.dumps({**BASE, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
    "NUL": json.dumps({**BASE, "session_id": "a\0b"}).encode(),
}  # fmt: skip
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/sessions", "/v1/sessions/A/fork", "/v1/sessions/A/rewind"]


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_that_are_no_request(served: Served, kind: str) -> None:
    for path in POSTS:
        response = served.http.post(path, content=BODIES[kind], headers={"content-type": "application/json"})
        empty_is_fine = kind == "nothing" and path.endswith("/fork")
        assert response.status_code in ((404, 201) if empty_is_fine else (400, 413)), (path, response.text)
        assert empty_is_fine or response.json()["error"]["message"]


IDS = [
    "../secret", "..%2fsecret", "%2e%2e%2fsecret", "%252e%252e%252fsecret", "..", "%2e%2e", ".", "a/../../secret",
    "..\\secret", "%5c..%5csecret", "%00", "secret%00", "secret.jsonl", "~secret", "%7esecret",
    "/etc/passwd", "%2fetc%2fpasswd",
    "%ff%fe", "%ed%a0%80", "\u202esecret", "\uff0e\uff0e\uff0fsecret", "a" * 65, "a" * 5_000, "lock",
    "con", "CON", "-", "_", " ", "%0a", "a%0a",
]  # fmt: skip


@pytest.mark.parametrize("name", IDS)
def test_ids_lead_nowhere_else(served: Served, home: Path, name: str) -> None:
    before = tree(home)
    host, port = served.address.removeprefix("http://").split(":")
    for method, end, body in (
        ("GET", "", b""), ("GET", "/memory", b""), ("PATCH", "", b'{"title": "x"}'), ("POST", "/fork", b"{}"),
        ("POST", "/rewind", b'{"turns": 1}'), ("DELETE", "", b""),
    ):  # fmt: skip
        # By a socket, as clients tidy a path up before they send it.
        head = (
            f"{method} /v1/sessions/{name}{end} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(head + body)
            answer = b"".join(iter(lambda: client.recv(65_536), b""))
        status = int(answer.split(b" ", 2)[1])
        assert status in (400, 404, 405), (method, end, answer[:300])
        assert b"secret.jsonl" not in answer or name == "secret.jsonl"
    for body in ({"id": name}, {**BASE, "session_id": name}):
        path = "/v1/sessions" if "id" in body else "/v1/chat/completions"
        allowed = re.fullmatch("[A-Za-z0-9_-]{1,64}", name) is not None
        assert served.post(body, path).status_code in ((200, 201, 409) if allowed else (400,))
    check_outside(before, home)


def test_a_link_out_of_the_folder_is_not_followed(lm: LM, tmp_path: Path) -> None:
    folder, outside = tmp_path / "sessions", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine", encoding="utf-8")
    for name in ("a.jsonl", "b.bmojo", "c.jsonl"):
        (folder / name).symlink_to(outside)
    with serving(lm, LIMITS, sessions=folder) as served:
        assert served.http.get("/v1/sessions").json()["data"] == []
        for name in "abc":
            served.ask(name, "Hello", max_tokens=2)  # kept in memory, where the disk cannot be used
            served.ask(name, "why?", max_tokens=2)
    assert outside.read_text(encoding="utf-8") == "mine"


def test_bytes_that_are_no_http(served: Served) -> None:
    host, port = served.address.removeprefix("http://").split(":")
    noise = random.Random(0)
    for raw in (b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", noise.randbytes(5_000)):
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(65_536), b""))
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 2")), answer[:100]
    assert served.health()["status"] == "ok"
