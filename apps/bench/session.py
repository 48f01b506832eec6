"""What a long past costs a saved session: time from `Session.open` to the first new token, size of the file, memory.

python apps/bench/session.py

A small B'MOJO model with random weights reads 1,000 and 1,000,000 tokens for real, answers a few questions and is
saved. Then another process opens the files in turns: the median time from `open` to the first token of an answer; and
one for each file, its largest resident memory. Peaks of the process that reads are taken at 100,000 tokens and at the
end. The ratio of the medians is written beside the rows.
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


def reopen(model: Path, files: list[Path], rounds: int) -> list[dict[str, Any]]:
    """Times from `open` to the first token of an answer, the files taking turns, and the process's largest memory."""
    lm = be.load(model)
    times: dict[Path, list[tuple[float, float]]] = {file: [] for file in files}
    for n in range(rounds + 1):
        for file in files if n % 2 else reversed(files):
            start = time.perf_counter()
            session = be.Session.open(file, lm)
            opened = time.perf_counter()
            next(session.say("what was first?", max_tokens=4))
            times[file].append((opened - start, time.perf_counter() - start))
            del session
    medians = [[statistics.median(column) for column in zip(*times[file][1:], strict=True)] for file in files]
    return [{"open_ms": 1e3 * a, "first_token_ms": 1e3 * b, "rss_bytes": peak()} for a, b in medians]


def worker(*arguments: object) -> Any:
    done = subprocess.run([sys.executable, __file__, "--worker", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pasts", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "session.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, first, *rest = args.worker
        if kind == "write":
            print(json.dumps(write(Path(first), Path(rest[0]), int(rest[1]))))
        else:
            print(json.dumps(reopen(Path(rest[0]), [Path(name) for name in rest[1:]], int(first))))
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
        files = [folder / f"{past}.bmojo" for past in args.pasts]
        together = worker("open", args.rounds, folder / "model", *files)
        for row, file, timed in zip(rows, files, together, strict=True):
            (alone,) = worker("open", 1, folder / "model", file)
            row |= {**timed, "rss_bytes": alone["rss_bytes"]}
            print({key: row[key] for key in ("past", "file_bytes", "open_ms", "first_token_ms", "rss_bytes")})
    ratio = rows[-1]["first_token_ms"] / rows[0]["first_token_ms"]
    print(f"first token after {rows[-1]['past']:,} over {rows[0]['past']:,}: {ratio:.3f}")
    report.write(args.out, rows, PACKAGES, rounds=args.rounds, long_over_short=ratio)


if __name__ == "__main__":
    main()
