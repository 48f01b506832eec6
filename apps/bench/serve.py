"""What the server gives: tokens a second by how many ask at a time, and the time to a conversation's next first token.

    python apps/bench/serve.py                       # the default model, less than 10 minutes on 2 quiet cores
    python apps/bench/serve.py --model DIR

Throughput: so many clients stream answers to short prompts one after another; the numbers of clients take turns, and
beside each stands what the model alone does in a step of such a batch. First token: conversations that have had one
short turn, one that fills the window, and 99 short ones are forked, the server is started anew, and each fork is asked
once from the disk and once more from memory, the kinds taking turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import bmojo_edge as be
from bmojo_edge.engine import evaluate_rows, join_rows

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mlx", "numpy", "fastapi", "uvicorn")
TURNS = {"short": 1, "full": 1, "long": 99}  # "full": the first question alone fills the window
PAUSE = 1.0  # seconds before a question, as people make: the turn before is saved meanwhile


@contextmanager
def serving(model: str, sessions: Path) -> Iterator[httpx.Client]:
    """`bmojo-edge serve` in a process of its own, and a client of it."""
    code = "from bmojo_edge.cli import main; main()"
    options = ["--port", "0", "--no-page", "--sessions-dir", str(sessions), "--state-mib", "2048"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, "serve", model, *options],
        env=os.environ | {"NO_COLOR": "1"}, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stderr is not None
        said = ""
        while "running on" not in said:
            line = child.stderr.readline()
            if not line:
                raise SystemExit(said)
            said += line
        address = re.findall(r"http://127\.0\.0\.1:\d+", said)[0]
        threading.Thread(target=child.stderr.read, daemon=True).start()
        with httpx.Client(base_url=address, timeout=600) as client:
            yield client
    finally:
        child.terminate()
        child.wait()


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    return (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))


# --- throughput


def throughput(client: httpx.Client, name: str, clients: int, seconds: float) -> float:
    """Tokens a second that so many clients are told together, once all of them are being told some."""
    told, stop = [0] * clients, threading.Event()

    def one(who: int) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            body = {"model": name, "prompt": f"Story {who}.{n}: once upon a time", "max_tokens": 200, "stream": True}
            with client.stream("POST", "/v1/completions", json={**body, "seed": who}) as response:
                if response.status_code != 200:
                    raise RuntimeError(response.read().decode())
                for event in events(response):
                    told[who] += len(event["choices"])
                    if stop.is_set():
                        break

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(one, who) for who in range(clients)]
        try:
            while not all(told):
                time.sleep(0.01)
                for failed in (asked for asked in asking if asked.done()):
                    failed.result()
            first, start = sum(told), time.perf_counter()
            time.sleep(seconds)
            rate = (sum(told) - first) / (time.perf_counter() - start)
        finally:
            stop.set()
    for asked in asking:
        asked.result()
    while client.get("/health").json()["running"]:
        time.sleep(0.01)
    return rate


def step_seconds(lm: Any, batch: int, steps: int) -> float:
    """Seconds of one step of the model alone with so many rows, the median."""
    state = join_rows([lm.prefill(np.array([[1 + row, 2, 3]], np.int32), lm.init_state())[1] for row in range(batch)])
    times = []
    for n in range(steps):
        start = time.perf_counter()
        logits, state = lm.decode_one_token(np.full(batch, 5 + n, np.int32), state)
        evaluate_rows(logits, state)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


# --- the time to the first token


def ask(client: httpx.Client, name: str, session: str, text: str, tokens: int) -> tuple[float, dict[str, int]]:
    """Seconds from the request to the first piece of the answer, and the usage."""
    message = {"role": "user", "content": text}
    body = {"model": name, "session_id": session, "messages": [message], "max_tokens": tokens, "temperature": 0}
    start, first, usage = time.perf_counter(), 0.0, {}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}  # a chunk for every token
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for event in events(response):
            if "error" in event:
                raise SystemExit(event["error"]["message"])
            if event["choices"] and event["choices"][0]["logprobs"]:
                first = first or time.perf_counter() - start
            usage = event.get("usage") or usage
    read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return first, {"read": read, "position": usage["prompt_tokens"]}


def first_tokens(model: str, folder: Path, rounds: int, window: int) -> list[dict[str, Any]]:
    """Rows of each conversation, from the disk and from memory."""
    forks: dict[str, list[str]] = {}
    with serving(model, folder) as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        for kind, turns in TURNS.items():
            for turn in range(turns):
                about = " and ".join(map(str, range(window // 2 if kind == "full" else 1)))
                ask(client, name, kind, f"Tell me something about the numbers {about} and {turn}.", 8)
            made = [client.post(f"/v1/sessions/{kind}/fork", json={}).json() for _ in range(rounds)]
            forks[kind] = [session["id"] for session in made]
            print(kind, made[0]["position"], "tokens", flush=True)
    rows: dict[tuple[str, str], list[tuple[float, dict[str, int]]]] = {}
    with serving(model, folder) as client:
        ask(client, name, "warm", "Hello", 8)
        for n in range(rounds):
            for where in ("disk", "memory"):
                for kind in list(TURNS) if n % 2 else reversed(TURNS):
                    time.sleep(PAUSE)
                    found = ask(client, name, forks[kind][n], "And what about the number 500?", 8)
                    rows.setdefault((kind, where), []).append(found)
    return [
        {
            "kind": "first token",
            "turn": TURNS[kind] + (1 if where == "disk" else 2),
            "from": where,
            "position": max(usage["position"] for _, usage in found),
            "read": max(usage["read"] for _, usage in found),
            "first_token_ms": 1e3 * statistics.median(seconds for seconds, _ in found),
        }
        for (kind, where), found in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; left out: the default model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=15.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each number of clients")
    parser.add_argument("--forks", type=int, default=8, help="conversations whose first token is timed")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve.json")
    args = parser.parse_args()
    if args.model is None:
        from bmojo_convert.default import ensure_default_model

        args.model = str(ensure_default_model())
    lm = be.load(args.model)
    alone = {count: [step_seconds(lm, count, 12) for _ in range(args.rounds)] for count in args.clients}
    window = lm.config.window
    del lm
    rates: dict[int, list[float]] = {count: [] for count in args.clients}
    with tempfile.TemporaryDirectory() as folder:
        with serving(args.model, Path(folder) / "a") as client:
            name = client.get("/v1/models").json()["data"][0]["id"]
            for n in range(args.rounds):
                for count in args.clients if n % 2 else reversed(args.clients):
                    rates[count].append(throughput(client, name, count, args.seconds))
                    print(count, "clients:", f"{rates[count][-1]:.1f} tokens/s", flush=True)
        rows: list[dict[str, Any]] = [
            {
                "kind": "throughput",
                "clients": count,
                "tok_s": statistics.median(rates[count]),
                "step_ms": 1e3 * statistics.median(alone[count]),
                "model_tok_s": count / statistics.median(alone[count]),
            }
            for count in args.clients
        ]
        rows += first_tokens(args.model, Path(folder) / "b", args.forks, window)
    for row in rows:
        print(row)
    blas = "OpenBLAS" if "openblas" in os.environ.get("LD_PRELOAD", "") else "the BLAS in MLX's wheel"
    report.write(args.out, rows, PACKAGES, model=name, dtype=be.load(args.model).config.dtype, blas=blas)


if __name__ == "__main__":
    main()
