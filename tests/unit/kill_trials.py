"""Processes that talk, save and are killed at random moments; run as a program, it prints what it found as JSON.

python -m tests.unit.kill_trials FOLDER TOKENIZER TRIALS

One trial forks a child that goes on with the session in FOLDER, saving after each exchange, by `Session.save` or as
`bmojo-edge chat --session`, and kills it with SIGKILL after a random time. What is then in the file must be the session
that was never killed, with at most the exchange in hand missing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bmojo_edge.cli import app, chat
from bmojo_edge.session import Session
from bmojo_edge.state import State
from bmojo_edge.tokenizer import Tokenizer
from tests.unit.fake_lm import FakeLM

LONGEST = 0.25  # seconds a child lives


class Heavy(FakeLM):
    """Its state is large enough that writing it takes a while; it answers any question with one token."""

    def init_state(self, batch: int = 1, offset: int = 0) -> State:
        state = super().init_state(batch, offset)
        return state._replace(layers=(*state.layers, np.zeros((1, 2**15), np.float32)))

    def prefill(self, tokens: Any, state: State, lengths: Any = None) -> tuple[np.ndarray, State]:
        logits, new = super().prefill(tokens, state)
        blob = state.layers[1] + np.float32(int(new.layers[0][0]) % 997)  # every byte of it changes
        assert self.tokenizer is not None
        says = self.tokenizer.encode_continuation("ok")[0] if np.size(tokens) > 1 else min(self.tokenizer.eos_ids)
        logits[0, says] = 100
        return logits, new._replace(layers=(*new.layers, blob))


def question(n: int) -> str:
    return f"question {n}"


def exchanges(session: Session) -> int:
    return session._forgotten + len(session.turns)


def by_saving(lm: Heavy, path: Path, report: int) -> None:
    """A child that says and saves, and reports how many exchanges are surely saved."""
    session = Session.open(path, lm)
    while True:
        for _ in session.say(question(exchanges(session)), max_tokens=2):
            pass
        session.save(path)
        os.write(report, b"%d\n" % exchanges(session))


def by_chatting(lm: Heavy, path: Path, report: int) -> None:
    """A child that is `bmojo-edge chat --session`; its answers, a line each, are the report."""
    n = exchanges(Session.open(path, lm))
    lines, to_lines = os.pipe()
    os.write(to_lines, "".join(question(i) + "\n" for i in range(n, n + 500)).encode())
    os.dup2(lines, 0)
    os.dup2(report, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 - for the life of the process
    sys.stdout = open(1, "w", encoding="utf-8")  # noqa: SIM115
    chat.open_model = lambda model: lm
    app(["chat", "--session", str(path), "--temp", "0", "--max-tokens", "2"])


def trial(lm: Heavy, path: Path, child: Any, seconds: float) -> bytes:
    """What the child had reported when it was killed."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            child(lm, path, writing)
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), f"the child ended by itself: {status}"
    with os.fdopen(reading, "rb") as file:
        return file.read()


def main(folder: Path, tokenizer: Path, trials: int, seed: int = 0) -> dict[str, int]:
    rng, lm, path = random.Random(seed), Heavy(Tokenizer.load(tokenizer)), folder / "chat.bmojo"
    ref = Session(lm)  # the session that is never killed
    hashes = [ref.rolling_hash]
    ref.save(path)
    found = {"trials": 0, "exchanges": 0, "lost": 0, "cut_off_writes": 0}
    before = 0
    for n in range(trials):
        child = (by_saving, by_chatting)[n % 2]
        said = trial(lm, path, child, rng.uniform(0.0, LONGEST))
        whole = said[: said.rfind(b"\n") + 1].split()
        surely = (int(whole[-1]) if whole else before) if child is by_saving else before + len(whole)
        session = Session.open(path, lm)  # raises if it is damaged
        now = exchanges(session)
        # Saving reports what is saved; chat prints an answer and then saves it.
        assert (now in (surely, surely + 1)) if child is by_saving else (now in (surely - 1, surely)), (now, surely)
        while len(hashes) <= now:
            for _ in ref.say(question(len(hashes) - 1), max_tokens=2):
                pass
            hashes.append(ref.rolling_hash)
        assert session.rolling_hash == hashes[now], f"trial {n}: not the session it was"
        found["lost"] += child is by_chatting and now == surely - 1
        found["cut_off_writes"] += any(p != path for p in folder.iterdir())
        before = now
    session.save(path)  # pyright: ignore[reportPossiblyUnboundVariable]
    left = [p.name for p in folder.iterdir() if p != path]
    assert not left, f"left behind: {left}"
    return {**found, "trials": trials, "exchanges": before}


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # forking with the tokenizer's idle threads
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
