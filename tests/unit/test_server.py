"""The server through the official `openai` client and plain HTTP, over a real socket."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bmojo_edge import checkpoint
from bmojo_edge.config import Config
from bmojo_edge.engine import LM
from bmojo_edge.generate import prompt_ids, stream
from bmojo_edge.server.app import Limits
from bmojo_edge.tokenizer import Tokenizer
from tests.helpers import random_weights
from tests.unit.serving import Served, command, serve, serving, until
from tests.unit.test_generation_engines import make

ROOT = Path(__file__).parents[2]

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def lm(byte_level_folder: Path) -> LM:
    return make("mlx", Tokenizer.load(byte_level_folder))


@pytest.fixture(scope="module")
def served(lm: LM) -> Iterator[Served]:
    with serving(lm) as served:
        yield served


# --- answers


def test_a_chat_plain_and_streamed(served: Served) -> None:
    expected = list(stream(served.lm, HELLO, max_tokens=20))
    text = "".join(token.text for token in expected)
    plain = served.openai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, temperature=0)
    assert plain.choices[0].message.content == text
    assert plain.choices[0].finish_reason == expected[-1].finish_reason
    assert plain.usage is not None
    assert plain.usage.prompt_tokens == len(prompt_ids(served.lm, HELLO))
    assert plain.usage.completion_tokens == len(expected)
    chunks = list(
        served.openai.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_completion_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == expected[-1].finish_reason
    assert chunks[-1].choices == []
    last = chunks[-1].usage
    assert last is not None and last.prompt_tokens_details is not None
    assert last.completion_tokens == len(expected)
    assert last.prompt_tokens_details.cached_tokens == last.prompt_tokens - 1  # the same question once more


def test_completions_of_text_and_ids(served: Served) -> None:
    expected = served.alone("The river", max_tokens=16)
    create = served.openai.completions.create
    assert create(model="tiny", prompt="The river", temperature=0).choices[0].text == expected
    ids = prompt_ids(served.lm, "The river")
    assert create(model="tiny", prompt=ids, temperature=0).choices[0].text == expected
    assert create(model="tiny", prompt=["The river"], temperature=0).choices[0].text == expected
    chunks = create(model="tiny", prompt="The river", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_stop_seed_and_log_probabilities(served: Served) -> None:
    create = served.openai.chat.completions.create
    tokens = list(stream(served.lm, HELLO, max_tokens=20))
    stop = next(token.text for token in tokens[4:] if token.text.strip())
    stopped = create(model="tiny", messages=HELLO, max_tokens=20, temperature=0, stop=[stop, "never said"]).choices[0]
    assert stopped.message.content == served.alone(HELLO, max_tokens=20, stop=stop)
    assert stopped.finish_reason == "stop"
    drawn = [create(model="tiny", messages=HELLO, max_tokens=12, seed=seed).choices[0].message for seed in (5, 5, -6)]
    assert drawn[0].content == drawn[1].content == served.alone(HELLO, max_tokens=12, temperature=1.0, seed=5)
    assert drawn[2].content != drawn[0].content
    choice = create(model="tiny", messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    told = choice.logprobs.content
    assert [one.logprob for one in told] == pytest.approx([token.logprob for token in tokens[:8]], abs=1e-4)
    assert [len(one.top_logprobs) for one in told] == [3] * 8
    assert all(one.top_logprobs[0].token == one.token for one in told)  # greedy: the likeliest was said
    legacy = served.openai.completions.create(model="tiny", prompt="The", max_tokens=4, logprobs=2, temperature=0)
    assert legacy.choices[0].logprobs is not None
    assert legacy.choices[0].logprobs.token_logprobs == pytest.approx(
        [token.logprob for token in stream(served.lm, "The", max_tokens=4)], abs=1e-4
    )


def test_conversations_beside_each_other_are_what_they_are_alone(lm: LM) -> None:
    answers: dict[int, list[Any]] = {}
    with serving(lm, Limits(slots=30, max_running=3)) as served:

        def talk(who: int) -> None:
            messages: list[Any] = [{"role": "system", "content": f"You are number {who}."}]
            for turn in range(3):
                messages.append({"role": "user", "content": f"{'why? ' * (who % 4)}{turn}"})
                limits: dict[str, Any] = {"model": "tiny", "max_tokens": 5 + who, "temperature": 0}
                if who % 2:
                    chunks = served.openai.chat.completions.create(messages=messages, stream=True, **limits)
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                else:
                    plain = served.openai.chat.completions.create(messages=messages, **limits)
                    text = plain.choices[0].message.content or ""
                messages.append({"role": "assistant", "content": text})
            answers[who] = messages

        threads = [threading.Thread(target=talk, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = served.http.get("/metrics").text
    assert "bmojo_answers_total 12\n" in metrics
    cached = int(metrics.split("\nbmojo_cached_tokens_total ")[1].split()[0])
    assert cached > 0
    for who, messages in answers.items():
        for turn in range(3):
            before, said = messages[: 2 + 2 * turn], messages[2 + 2 * turn]
            assert said["content"] == served.alone(before, max_tokens=5 + who), (who, turn)
    assert len(answers) == 4


@pytest.mark.parametrize(
    "more",
    [
        {"tools": None, "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}},
        {"stream": None, "stream_options": None, "stop": None, "n": 1, "logit_bias": {}, "logprobs": None},
        {"functions": None, "function_call": "auto", "modalities": ["text"], "reasoning_effort": None},
    ],
)
def test_what_changes_nothing_is_taken(served: Served, more: dict[str, Any]) -> None:
    said = served.post({"model": "tiny", "messages": HELLO, "max_tokens": 5, "temperature": 0, **more})
    assert said.status_code == 200, said.text
    assert said.json()["choices"][0]["message"]["content"] == served.alone(HELLO, max_tokens=5)


def test_an_answer_comes_back_as_clients_hold_it(served: Served) -> None:
    create = served.openai.chat.completions.create
    message = create(model="tiny", messages=HELLO, max_tokens=5, temperature=0).choices[0].message
    history: list[Any] = [*HELLO, message.model_dump(), {"role": "user", "content": "And?"}]
    assert "refusal" in history[1]
    again = create(model="tiny", messages=history, max_tokens=5, temperature=0).choices[0].message
    plain = [*HELLO, {"role": "assistant", "content": message.content}, history[2]]
    assert again.content == served.alone(plain, max_tokens=5)


# --- what is refused


@pytest.mark.parametrize(
    ("change", "status", "names"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "type"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "at most 200"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 301}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"n": 2}, 400, "n:"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"tools": []}, 400, "tools: is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools: is not supported"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"surprise": None}, 400, "surprise: is not supported"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content: must be a text, or a list"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, 400, "messages.0.role"),
        ({"stop": [5]}, 400, "stop: must be a text, or a list of at most 16"),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
        ({"model": "gpt-4"}, 404, "gpt-4"),
        ({"model": "\ud800../../etc"}, 404, "model"),
        ({"user": "x" * 30_000}, 413, "20,000 bytes"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(served: Served, change: dict[str, Any], status: int, names: str) -> None:
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 2, **change})
    response = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert names in error["message"]
    assert error["param"] is None or error["message"].startswith(f"{error['param']}: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 15_000, b'{"model": NaN}', b"\xff\xfe"])
def test_bodies_that_are_no_request(served: Served, body: bytes) -> None:
    response = served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [["a", "b"], [[1, 2]], [1.5], [-1], [True], None, {"a": 1}])
def test_prompts_that_are_none(served: Served, prompt: Any) -> None:
    error = served.post({"model": "tiny", "prompt": prompt}, "/v1/completions").json()["error"]
    assert error["message"] == "prompt: must be one text, or the ids of one"
    assert error["param"] == "prompt"


def test_other_paths_and_methods(served: Served) -> None:
    assert served.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert served.openai.models.retrieve("tiny").id == "tiny"
    assert served.http.get("/v1/models/..%2f..%2fetc%2fpasswd").status_code == 404
    assert served.http.get("/nothing").json()["error"]["type"] == "invalid_request_error"
    assert served.http.get("/v1/completions").status_code == 405
    preflight = served.http.options("/v1/models", headers={"origin": "https://x.org"})
    assert "access-control-allow-origin" not in preflight.headers
    text = served.http.post(  # what a page elsewhere may send without asking first
        "/v1/completions", content=b'{"model": "tiny", "prompt": "x"}', headers={"content-type": "text/plain"}
    )
    assert text.status_code == 400
    assert "application/json" in text.json()["error"]["message"]


def test_a_body_sent_in_pieces_is_counted_too(served: Served) -> None:
    response = served.http.post("/v1/completions", content=iter([b" " * 9_000] * 3))
    assert response.status_code == 413


def test_a_body_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmojo_edge.server.guard.BODY_SECONDS", 0.2)

    def slow() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.6)
        yield b"}"

    assert served.http.post("/v1/completions", content=slow()).status_code == 408


def test_a_client_that_goes_before_its_stream_begins(endless: LM) -> None:
    with serving(endless, Limits(slots=2, max_running=1, max_tokens=100_000)) as served, open_stream(served):
        host, port = served.address.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "stream": True})
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: "bmojo_requests_total 2" in served.http.get("/metrics").text)
        until(lambda: served.health()["waiting"] == 0)


def test_a_key(lm: LM) -> None:
    with serving(lm, api_key="secret") as served:
        for key in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Bearer é"}):
            headers = [(name.encode(), value.encode()) for name, value in key.items()]
            assert served.http.get("/v1/models", headers=headers).status_code == 401
        assert served.http.get("/v1/models", headers={"authorization": "bearer secret"}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            served.openai.models.list()
        assert served.openai.with_options(api_key="secret").models.list().data[0].id == "tiny"
        assert served.health()["status"] == "ok"


# --- load, and clients that go away


LONG: dict[str, Any] = {"model": "tiny", "prompt": "The river", "max_tokens": 100_000, "temperature": 1.0, "seed": 1}


@contextmanager
def open_stream(served: Served) -> Iterator[httpx.Response]:
    body = {**LONG, "stream": True}
    with (
        httpx.Client(base_url=served.address, timeout=30) as client,  # a connection of its own
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()  # closing this would close the connection
        next(lines)
        yield response


@pytest.fixture
def endless(byte_level_folder: Path) -> LM:
    """A model whose answers do not end before `max_tokens`."""
    tokenizer = Tokenizer.load(byte_level_folder)
    tokenizer.eos_ids = frozenset()
    return make("mlx", tokenizer)


def test_clients_that_vanish_leave_no_place_taken(endless: LM) -> None:
    limits = Limits(slots=4, max_running=2, max_waiting=2, max_tokens=100_000)
    with serving(endless, limits) as served:
        for _ in range(3):
            with open_stream(served), open_stream(served):
                assert served.health()["running"] == 2
            until(lambda: served.health()["running"] == served.health()["waiting"] == 0)
        with pytest.raises(httpx.ReadTimeout):  # one that does not stream, and hangs up
            httpx.post(f"{served.address}/v1/completions", json=LONG, timeout=0.5)
        until(lambda: served.health()["running"] == 0)
        assert "bmojo_cancelled_total" in served.http.get("/metrics").text
        assert served.post({**LONG, "max_tokens": 3}, "/v1/completions").status_code == 200


def test_a_full_server_says_so_and_recovers(endless: LM) -> None:
    limits = Limits(slots=1, max_running=1, max_waiting=0, max_tokens=100_000)
    with serving(endless, limits) as served:
        with open_stream(served):
            response = served.post({**LONG, "max_tokens": 3}, "/v1/completions")
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            with pytest.raises(openai.RateLimitError):
                served.openai.completions.create(**LONG)
        until(lambda: served.health()["running"] == 0)
        assert served.post({**LONG, "max_tokens": 3}, "/v1/completions").status_code == 200


def test_time_runs_out(endless: LM) -> None:
    limits = Limits(slots=2, max_running=2, max_tokens=100_000, timeout=0.3)
    with serving(endless, limits) as served:
        assert served.post(LONG, "/v1/completions").status_code == 408
        with pytest.raises(openai.APIError, match=r"0\.3 seconds"):
            list(served.openai.completions.create(**LONG, stream=True))
        until(lambda: served.health()["running"] == 0)


def test_a_model_that_fails_is_an_error_and_the_server_goes_on(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lm) as served:
        with monkeypatch.context() as broken:

            def fails(self: LM, *_: Any) -> Any:
                raise RuntimeError("out of memory")

            broken.setattr(type(lm), "decode_one_token", fails)
            response = served.post({"model": "tiny", "messages": HELLO, "max_tokens": 2})
            assert response.status_code == 500
            assert "out of memory" in response.json()["error"]["message"]
        assert served.post({"model": "tiny", "messages": HELLO, "max_tokens": 2}).status_code == 200


def test_shutting_down_ends_open_answers(endless: LM) -> None:
    """A stream tells why it ends, a plain answer is an error; neither connection just breaks off."""
    with serving(endless, Limits(slots=4, max_tokens=100_000)) as served, ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(lambda: list(served.openai.completions.create(**LONG, stream=True)))
        plain = pool.submit(lambda: served.openai.completions.create(**LONG))
        until(lambda: served.health()["running"] == 2)
        served.stop()
        assert isinstance(plain.exception(), openai.InternalServerError)
        for failed in (streamed.exception(), plain.exception()):
            assert isinstance(failed, openai.APIError) and failed.code == "shutting_down"


def test_shutting_down_waits_for_answers_that_end_soon(lm: LM) -> None:
    with serving(lm, grace=20) as served, ThreadPoolExecutor(1) as pool:
        said = pool.submit(served.alone, "The river", max_tokens=100)
        answer = pool.submit(
            served.openai.completions.create, model="tiny", prompt="The river", max_tokens=100, temperature=0
        )
        until(lambda: served.health()["running"] == 1 or answer.done())
        served.stop()
        assert answer.result().choices[0].text == said.result()


# --- the command


def test_the_command_serves_until_it_is_told_to_end(model_folder: Path) -> None:
    with command(model_folder, "--state-mib", "1", "--no-save", "--no-page") as (child, address, said):
        slot = checkpoint.read(model_folder)[0].state_bytes()
        assert f"small: {2**20 // slot} states of {slot / 2**20:.1f} MiB each" in said
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(model="small", messages=HELLO, max_tokens=3)
            assert answer.usage is not None and answer.usage.completion_tokens >= 1
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=20)
        assert child.returncode in (0, -signal.SIGTERM)  # uvicorn ends, then raises the signal it was sent


def test_the_command_says_what_it_cannot_do(model_folder: Path, tmp_path: Path) -> None:
    config = Config.preset("tiny", vocab_size=256, layer_types=("attention", "attention"), attention_window=None)
    checkpoint.save(tmp_path / "growing", config, random_weights(config), model_folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for folder, arguments, code, says in (
            (model_folder, ("--api-key", ""), 2, "--api-key"),
            (model_folder, ("--port", "70000"), 2, "--port"),
            (model_folder, ("--no-save", "--sessions-dir", "x"), 2, "--sessions-dir"),
            (model_folder, ("--allow-origin", "https://x.org/"), 2, "--allow-origin"),
            (model_folder, ("--no-save", "--port", str(taken.getsockname()[1])), 1, "in use"),
            (tmp_path / "growing", ("--no-save",), 2, "full attention"),
        ):
            child = serve(str(folder), *arguments)
            _, stderr = child.communicate(timeout=30)
            assert child.returncode == code
            assert says in stderr
