"""Passkey retrieval: five digits hidden in a long text of books, asked for at its end, with and without storage.

    python apps/eval/passkey.py BOOKS.jsonl.xz --device cuda --dtype bfloat16      # the whole table
    python apps/eval/passkey.py BOOKS.jsonl.xz --engine mlx --cases 8192:3
    python apps/eval/passkey.py BOOKS.jsonl.xz --device cuda --dtype bfloat16 --cost 131072 --cases
    python apps/eval/passkey.py --merge one.json two.json          # what was run apart, into --out

BOOKS is JSON lines with a "text" each, plain or .xz. Every text is cut to the same number of tokens, the key is never
in the last window, and keys are spread evenly over the rest. An answer counts if it begins with the five digits.
--cost reads and goes on with one text, with and without storage by short turns. Results are written after every case
and taken up again: a case that is there is not run again (--again: it is). Nothing is timed before a first, short run.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import bmojo_edge as be
from bmojo_edge.recall import TOP_K, WithStorage, shape_for
from bmojo_edge.session_file import identity
from bmojo_edge.storage import WRITERS, Store
from bmojo_edge.tensors import as_numpy

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

NEEDLE = " The pass key is {key}. Remember it. The pass key is {key}. "
QUESTION = "\n\nWhat is the pass key? Remember it. The pass key is"
CASES = ("8192:50", "32768:20", "131072:5")
RESULTS = Path(__file__).parent / "results"
ANSWER_TOKENS = 7
WARM_UP = 1600  # tokens: more than a window, no multiple of a call
PART, STEPS = 4096, 16  # tokens of a turn of --cost, read and decoded


class Trials(NamedTuple):
    """Texts of one length with a key in each."""

    tokens: np.ndarray  # (b, t)
    keys: list[str]
    places: list[int]  # where the needle begins
    needle: int  # its tokens


def text_tokens(path: Path, tokenizer: Any, wanted: int) -> np.ndarray:
    """The first tokens of the books, one after the other, at least `wanted` of them where there are so many."""
    found: list[int] = []
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            found += tokenizer.encode(json.loads(line)["text"])
            if len(found) >= wanted:
                break
    return np.array(found, np.int32)


def make_trials(text: np.ndarray, tokenizer: Any, length: int, count: int, window: int) -> Trials:
    """`count` texts of `length` tokens, each from another place of the books, keys at even depths."""
    rng = np.random.default_rng(length)
    question, rows, keys, places = tokenizer.encode(QUESTION), [], [], []
    needle: list[int] = []
    for i in range(count):
        key = str(rng.integers(10_000, 100_000))
        needle = tokenizer.encode(NEEDLE.format(key=key))
        hay = length - len(needle) - len(question)
        begin = int(i * max(len(text) - hay, 0) / max(count, 1))
        piece = np.resize(text[begin : begin + hay], hay).tolist()
        at = int((i + 0.5) / count * (length - window - 256))
        rows.append([*piece[:at], *needle, *piece[at:], *question])
        keys.append(key)
        places.append(at)
    return Trials(np.array(rows, np.int32), keys, places, len(needle))


def load(engine: str, folder: Path, dtype: str | None, device: str) -> Any:
    """A model of either twin."""
    if engine == "mlx":
        return be.load(folder, dtype=dtype)
    from bmojo_edge.torch import load as load_torch

    return load_torch(folder, dtype=dtype, device=device)


def device_name(device: str) -> str:
    """What a result was measured on."""
    if device == "cpu":
        return device
    import torch

    return torch.cuda.get_device_name()


def wait(device: str) -> None:
    """Return once a GPU has done what it was given."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def answer(lm: Any, state: Any, logits: Any, device: str) -> tuple[list[str], Any, float]:
    """Greedy answers of every row, the state, and tokens per second of a row."""
    ids = [as_numpy(logits).astype(np.float32).argmax(-1)]
    start = time.perf_counter()
    for _ in range(ANSWER_TOKENS - 1):
        logits, state = lm.decode_one_token(ids[-1].astype(np.int64), state)
        ids.append(as_numpy(logits).astype(np.float32).argmax(-1))
    wait(device)
    speed = (ANSWER_TOKENS - 1) / (time.perf_counter() - start)
    return [lm.tokenizer.decode(row.tolist()) for row in np.stack(ids, axis=1)], state, speed


def recalled_needle(state: Any, layer: int, trials: Trials) -> list[bool]:
    """Whether the blocks that hold the first key are among those recalled."""
    positions = as_numpy(state.layers[layer].recalled.positions)
    return [
        bool(np.isin(np.arange(at + 2, at + trials.needle // 2), row).mean() > 0.9)
        for at, row in zip(trials.places, positions, strict=True)
    ]


def warm_up(lm: Any, trials: Trials, storage: bool, args: argparse.Namespace, rows: int) -> None:
    """The first tokens of the texts, read and answered: kernels are compiled, memory is taken."""
    tokens = trials.tokens[:rows, :WARM_UP]
    with tempfile.TemporaryDirectory() as folder:
        for lm_used, store in opened(lm, storage, Path(folder) / "store", args):
            read = lm_used.prefill if store is None else lm_used.prefill_prompt
            logits, state = read(tokens, lm_used.init_state(len(tokens)))
            answer(lm_used, state, logits, args.device)


def run_case(lm: Any, trials: Trials, storage: bool, args: argparse.Namespace, rows: int) -> dict[str, Any]:
    """One length, with or without storage, `rows` texts at a time."""
    answers: list[str] = []
    found: list[bool] = []
    seconds, writing, speeds, stored = 0.0, 0.0, [], 0
    warm_up(lm, trials, storage, args, rows)
    for begin in range(0, len(trials.keys), rows):
        part = Trials(
            trials.tokens[begin : begin + rows],
            trials.keys[begin : begin + rows],
            trials.places[begin : begin + rows],
            trials.needle,
        )
        with tempfile.TemporaryDirectory() as folder:
            for lm_used, store in opened(lm, storage, Path(folder) / "store", args):
                wait(args.device)
                start = time.perf_counter()
                state = lm_used.init_state(len(part.keys))
                if store is None:
                    logits, state = lm_used.prefill(part.tokens, state)
                else:
                    logits, state = lm_used.prefill_prompt(part.tokens, state)
                wait(args.device)
                seconds += time.perf_counter() - start
                if store is not None:
                    found += recalled_needle(state, store.shape.layers[-1], part)
                texts, state, speed = answer(lm_used, state, logits, args.device)
                answers += texts
                speeds.append(speed)
                if store is not None:
                    start = time.perf_counter()
                    store.flush()
                    writing += time.perf_counter() - start
                    stored += store.nbytes
    exact = [text.strip().startswith(key) for text, key in zip(answers, trials.keys, strict=True)]
    return {
        "tokens": trials.tokens.shape[1],
        "storage": storage,
        "top_k": args.top_k if storage else 0,
        "layers": args.layers if storage else None,
        "trials": len(exact),
        "exact": sum(exact),
        "accuracy": sum(exact) / len(exact),
        "recalled": sum(found) / len(found) if storage else None,
        **on_what(lm, args),
        "rows_at_once": min(rows, len(exact)),
        "prefill_tok_s": trials.tokens.size / seconds,
        "decode_tok_s": float(np.median(speeds)),
        "flush_after_answer_s": writing if storage else None,
        "store_bytes": stored,
        "details": [
            {"depth": at / trials.tokens.shape[1], "key": key, "answer": text, "exact": ok}
            for at, key, text, ok in zip(trials.places, trials.keys, answers, exact, strict=True)
        ],
    }


def on_what(lm: Any, args: argparse.Namespace) -> dict[str, str]:
    """What tells rows of different machines apart."""
    return {
        "engine": args.engine, "device": device_name(args.device), "dtype": lm.config.dtype, "commit": report.commit(),
        "machine": report.machine(),
    }  # fmt: skip


def opened(lm: Any, storage: bool, folder: Path, args: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """The model, with a fresh store where there is to be one."""
    if not storage:
        yield lm, None
        return
    options = {"ram_bytes": 2**32, "writers": args.writers}
    shape = shape_for(lm.config)
    if args.layers is not None:
        shape = shape._replace(layers=tuple(range(args.layers, len(lm.config.layer_types))))
    with Store.create(folder, shape, identity(lm), disk_bytes=2**35, **options) as store:
        yield WithStorage(lm, store, top_k=args.top_k), store


class Side:
    """One of two that read the same text by turns: a model, its state and what its parts took, in seconds."""

    def __init__(self, lm: Any, store: Any, batch: int, device: str) -> None:
        self.lm, self.store, self.device = lm, store, device
        self.state, self.logits = lm.init_state(batch), None
        self.read_s: list[float] = []
        self.flush_s: list[float] = []
        self.decode_s: list[float] = []

    def read(self, tokens: np.ndarray) -> None:
        """Take in tokens (b, t); what the writer has still to do then is a number of its own."""
        start = time.perf_counter()
        self.logits, self.state = self.lm.prefill(tokens, self.state)
        wait(self.device)
        self.read_s.append(time.perf_counter() - start)
        if self.store is not None:
            self.store.flush()
        self.flush_s.append(time.perf_counter() - start - self.read_s[-1])

    def go_on(self, steps: int) -> None:
        """Decode greedily, as one who samples does: logits come to the host after every token."""
        start = time.perf_counter()
        for _ in range(steps):
            token = as_numpy(self.logits).astype(np.float32).argmax(-1).astype(np.int64)
            self.logits, self.state = self.lm.decode_one_token(token, self.state)
        as_numpy(self.logits)
        self.decode_s.append(time.perf_counter() - start)


def cost(lm: Any, text: np.ndarray, length: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens per second of reading `length` tokens and of going on, with and without storage.

    Both read the same text by turns, PART tokens a turn, and then decode by turns; who begins changes with every
    turn. So a machine that changes its pace favours neither. Choices are counted in.
    """
    tokens = np.resize(text, (args.cost_rows, length))
    for storage in (False, True):
        warm_up(lm, Trials(tokens, [], [], 0), storage, args, args.cost_rows)
    with tempfile.TemporaryDirectory() as folder:
        for lm_used, store in opened(lm, True, Path(folder) / "store", args):
            sides = [Side(lm, None, len(tokens), args.device), Side(lm_used, store, len(tokens), args.device)]
            for turn, first in enumerate(range(0, length, PART)):
                for side in sides[:: 1 - 2 * (turn % 2)]:
                    side.read(tokens[:, first : first + PART])
            for side in sides:
                side.go_on(8)
                side.decode_s.clear()
            for turn in range(args.steps // STEPS):
                for side in sides[:: 1 - 2 * (turn % 2)]:
                    side.go_on(STEPS)
            for side in sides:
                yield {
                    "cost_after": length, "rows_at_once": len(tokens), "storage": side.store is not None,
                    "steps": STEPS * len(side.decode_s), "prefill_tok_s": tokens.size / sum(side.read_s),
                    "decode_tok_s": STEPS * len(side.decode_s) / sum(side.decode_s), "flush_s": sum(side.flush_s),
                    "read_s": [round(s, 4) for s in side.read_s], "decode_s": [round(s, 4) for s in side.decode_s],
                **on_what(lm, args),
                }  # fmt: skip


def cost_in_words(rows: list[dict[str, Any]]) -> str:
    """What storage costs, and between what it lies with 95% when turns are drawn anew (a bootstrap)."""
    rng, said = np.random.default_rng(0), []
    without, stored = sorted(rows, key=lambda row: row["storage"])
    for what, name in (("reading", "read_s"), ("decoding", "decode_s")):
        ours, theirs = np.array(stored[name]), np.array(without[name])
        drawn = rng.integers(0, len(ours), (10_000, len(ours)))
        low, high = np.percentile(1 - theirs[drawn].sum(1) / ours[drawn].sum(1), (2.5, 97.5))
        said.append(f"{what} {1 - theirs.sum() / ours.sum():.1%} ({low:.1%} to {high:.1%})")
    return f"storage costs after {stored['cost_after']:,} tokens: {', '.join(said)}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy by length, with and without storage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for storage, label in ((True, "window, sinks and storage"), (False, "window and sinks")):
        most: dict[int, dict[str, Any]] = {}  # of runs of one length the one with most texts
        for r in rows:
            if (
                r["storage"] is storage
                and "tokens" in r
                and r["trials"] > most.get(r["tokens"], {"trials": 0})["trials"]
            ):
                most[r["tokens"]] = r
        mine = sorted((r["tokens"], r["accuracy"], r["trials"]) for r in most.values())
        if mine:
            lengths, accuracy, _ = zip(*mine, strict=True)
            axes.plot(lengths, accuracy, marker="o", label=label)
            for x, y, n in mine if storage else []:
                axes.annotate(f"{round(y * n)}/{n}", (x, y), textcoords="offset points", xytext=(0, -14), ha="center")
    axes.set(xscale="log", xlabel="tokens", ylabel="keys found", ylim=(-0.05, 1.08), title="Passkey retrieval")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:.0f}K")
    axes.set_xticks(sorted({r["tokens"] for r in rows if "tokens" in r}))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def merged(paths: list[Path], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows, and those of other result files in place of rows of the same cases."""

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("tokens", "cost_after", "storage", "engine", "dtype", "device"))

    new = [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    again = {case(row) for row in new}
    return [row for row in rows if case(row) not in again] + new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, nargs="?")
    parser.add_argument("--model", type=Path, help="a windowed Transformer; default: the default model")
    parser.add_argument("--engine", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--device", default="cpu", help="for torch: cpu or cuda")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: as stored")
    parser.add_argument("--cases", nargs="*", default=CASES, metavar="TOKENS:TRIALS")
    parser.add_argument("--rows", type=int, default=262_144, help="tokens of all texts that run at once, at most")
    parser.add_argument("--writers", type=int, default=WRITERS, help="threads that write the store")
    parser.add_argument("--top-k", type=int, default=TOP_K, help="blocks that are recalled")
    parser.add_argument("--layers", type=int, metavar="FIRST", help="store layers from here on; default: all")
    parser.add_argument("--cost", type=int, metavar="TOKENS", help="also measure speed with and without storage")
    parser.add_argument("--cost-rows", type=int, default=1, help="texts at once for --cost")
    parser.add_argument("--steps", type=int, default=600, help="tokens that --cost decodes")
    parser.add_argument("--only", choices=("with", "without"), help="storage")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="only add the rows of other result files")
    parser.add_argument("--out", type=Path, default=RESULTS / "passkey.json")
    args = parser.parse_args()
    rows = [] if not args.out.exists() or args.again else json.loads(args.out.read_text(encoding="utf-8"))["rows"]
    if args.merge:
        first = args.out if args.out.exists() else args.merge[0]  # one model and source; rows say where they ran
        head = json.loads(first.read_text(encoding="utf-8"))
        rows = merged(args.merge, rows)
        report.write(args.out, rows, (), **{key: head[key] for key in head if key != "rows"})
        draw(rows, args.out.with_suffix(".svg"))
        return
    if args.books is None:
        parser.error("BOOKS is missing")
    if args.steps < STEPS:
        parser.error(f"--steps: at least a turn of {STEPS}, got {args.steps}")
    if args.model is None:
        from bmojo_convert.default import ensure_default_model

        args.model = ensure_default_model()
    lm = load(args.engine, args.model, args.dtype, args.device)
    cases = [tuple(map(int, case.split(":"))) for case in args.cases]
    longest = max([length for length, _ in cases] + [args.cost or 0])
    text = text_tokens(args.books, lm.tokenizer, 4 * longest)

    def keep(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        report.write(args.out, rows, ("torch", "mlx", "numpy"), model=args.model.name, source=args.books.name)

    for storage in (True, False):
        if args.only and (args.only == "with") is not storage:
            continue
        for length, count in cases:
            done = [(r.get("tokens"), r.get("storage"), r["engine"], r["dtype"]) for r in rows]
            if (length, storage, args.engine, lm.config.dtype) in done:
                continue
            trials = make_trials(text, lm.tokenizer, length, count, lm.config.window)
            row = run_case(lm, trials, storage, args, max(1, args.rows // length))
            keep([row])
            shown = {key: row[key] for key in row if key != "details"}
            print(json.dumps(shown), flush=True)
    if args.cost:
        both = list(cost(lm, text, args.cost, args))
        keep(both)
        for row in both:
            print(json.dumps({key: row[key] for key in row if key not in ("read_s", "decode_s")}))
        print(cost_in_words(both))
    if not args.no_plot:
        draw(rows, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
