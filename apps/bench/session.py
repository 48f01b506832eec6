"""What a long past costs a saved session: time from `Session.open` to the first new token, size of the file, memory.

python apps/bench/session.py

A small B'MOJO model with random weights reads 1,000 and 1,000,000 tokens for real, answers a few questions and is
saved. Then each file is opened in processes of its own, in turns: the time from `open` to the first token of an answer,
and the largest resident memory of such a process. Peaks of the process that reads are taken at 100,000 tokens and at
the end. The ratio of medians is written beside the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import bmojo_edge as be

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mlx", "numpy", "safetensors", "tokenizers")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"
STEP = 20_000  # tokens that are read with one call


def make_model(folder: Path) -> None:
    """A model of all memories with random weights, and a tokenizer of single bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from bmojo_edge.parameters import parameter_shapes

    words = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    config = be.Config.preset("tiny", n_sinks=4)
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    source = folder / "tokenizer"
    source.mkdir()
    words.save(str(source / "tokenizer.json"))
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    be.checkpoint.save(folder / "model", config, weights, source)


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def write(model: Path, out: Path, past: int) -> dict[str, Any]:
    """Read `past` tokens, answer three questions, save."""
    lm = be.load(model)
    session, early, start = be.Session(lm), 0, time.perf_counter()
    letters = np.random.default_rng(1)
    while session.position < past:
        n = min(STEP, past - session.position)
        session.read("".join(map(chr, letters.integers(97, 123, n))))
        early = early or (peak() if session.position >= min(past, 100_000) else 0)
    for i in range(3):
        for _ in session.say(f"question {i}", max_tokens=16):
            pass
    seconds = time.perf_counter() - start
    session.save(out)
    return {"position": session.position, "read_s": seconds, "peak_bytes_early": early, "peak_bytes": peak()}


def reopen(model: Path, file: Path) -> dict[str, Any]:
    """Seconds from `open` to the first token of an answer, in a process that has just loaded the model."""
    lm = be.load(model)
    for _ in be.stream(lm, "warm", max_tokens=2):  # what runs first pays for pages and threads
        pass
    start = time.perf_counter()
    session = be.Session.open(file, lm)
    opened = time.perf_counter()
    next(session.say("what was first?", max_tokens=4))
    first = time.perf_counter()
    return {"open_s": opened - start, "first_token_s": first - start, "rss_bytes": peak(), "state": session.nbytes}


def worker(*arguments: object) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--worker", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pasts", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=RESULTS / "session.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _, model, file, *past = args.worker
        print(json.dumps(write(Path(model), Path(file), int(past[0])) if past else reopen(Path(model), Path(file))))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        for past in args.pasts:
            file = folder / f"{past}.bmojo"
            made = worker("write", folder / "model", file, past)
            rows.append({"model": "tiny", "past": past, **made, "file_bytes": file.stat().st_size})
            print(rows[-1], flush=True)
        times: dict[int, list[dict[str, Any]]] = {past: [] for past in args.pasts}
        for n in range(args.rounds):
            for past in args.pasts if n % 2 else reversed(args.pasts):
                times[past].append(worker("open", folder / "model", folder / f"{past}.bmojo"))
        for row in rows:
            runs = times[row["past"]]
            row |= {
                "state_bytes": runs[0]["state"],
                "open_ms": 1e3 * statistics.median(run["open_s"] for run in runs),
                "first_token_ms": 1e3 * statistics.median(run["first_token_s"] for run in runs),
                "rss_bytes": round(statistics.median(run["rss_bytes"] for run in runs)),
            }
            print({key: row[key] for key in ("past", "file_bytes", "open_ms", "first_token_ms", "rss_bytes")})
    ratio = rows[-1]["first_token_ms"] / rows[0]["first_token_ms"]
    print(f"first token after {rows[-1]['past']:,} over {rows[0]['past']:,}: {ratio:.3f}")
    report.write(args.out, rows, PACKAGES, rounds=args.rounds, long_over_short=ratio)


if __name__ == "__main__":
    main()
