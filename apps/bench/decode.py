"""Decode and prefill speed, state and memory against position, beside mlx-lm with the same weights and dtype.

    python apps/bench/decode.py                          # SmolLM2 (the default model), about 15 minutes on 2 cores
    python apps/bench/decode.py --positions 128 1024     # a first look
    python apps/bench/decode.py --plot                   # only draw results/decode.png again

Every engine runs in a process of its own, so resident memory is its own, and the engines take turns at every position,
so that both see the machine in the same mood. Speed does not depend on what a cache holds: beyond --prefill tokens the
caches of all engines are filled with random numbers instead of read text, and such rows have no prefill_tok_s.
The last part moves a small B'MOJO model for real to position 100,000 and times it against itself at position 1,000.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import bmojo_edge as be

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

RESULTS = Path(__file__).parent / "results"
OURS_WINDOWED, OURS_FULL, PEER = "windowed", "full", "mlx-lm"  # what a worker holds
PACKAGES = ("mlx", "mlx-lm", "numpy")
WARM, TIMED = 4, 24


# --- engines: each holds a model and a cache and can be put at a position -------------------------------------------


class Ours:
    """Our model: windowed as stored, or the same weights with full attention."""

    def __init__(self, model: Path, full: bool) -> None:
        import tempfile

        if full:
            with tempfile.TemporaryDirectory() as folder:
                config, weights = be.checkpoint.read(model)
                layers = ("attention",) * len(config.layer_types)
                be.checkpoint.save(Path(folder) / "full", config.replace(layer_types=layers), weights)
                self.lm = be.load(Path(folder) / "full")
        else:
            self.lm = be.load(model)
        self.vocab_size, self.dtype = self.lm.config.vocab_size, self.lm.config.dtype
        self.state: Any = None

    def place(self, position: int, prefill: bool) -> float | None:
        import mlx.core as mx

        self.state = None
        if prefill:
            self.state = self.lm.init_state()
            tokens = mx.random.randint(0, self.vocab_size, (1, position))
            start = time.perf_counter()
            logits, self.state = self.lm.prefill(tokens, self.state)
            mx.eval(logits, self.state)
            return position / (time.perf_counter() - start)
        from bmojo_edge.state import map_leaves, state_spec

        # Positions of kept tokens and the counters are set, everything else is noise of the right shape.
        spec = state_spec(self.lm.config, 1, position)
        dtypes = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
        state = map_leaves(
            lambda leaf: (
                mx.random.normal(leaf.shape).astype(dtypes[leaf.dtype])
                if leaf.dtype in dtypes
                else mx.arange(leaf.shape[-1], dtype=mx.int64) + mx.zeros(leaf.shape, mx.int64)
            ),
            spec,
        )
        self.state = state._replace(position=mx.array([position], dtype=mx.int64), offset=mx.array([0], dtype=mx.int64))
        mx.eval(self.state)
        return None

    def step(self, token: int) -> int:
        import mlx.core as mx

        logits, self.state = self.lm.decode_one_token(mx.array([token]), self.state)
        token_out = mx.argmax(logits, axis=-1)
        mx.eval(token_out, self.state)
        return int(np.array(token_out)[0])

    def state_bytes(self) -> int:
        from bmojo_edge.state import leaves

        return sum(leaf.nbytes for _, leaf in leaves(self.state))


class MlxLm:
    """mlx-lm's own Llama with our weights under its names, and its growing cache."""

    def __init__(self, model: Path) -> None:
        import mlx.core as mx
        from mlx_lm.models import llama

        config, weights = be.checkpoint.read(model)
        args = llama.ModelArgs(
            model_type="llama",
            hidden_size=config.d_model,
            num_hidden_layers=len(config.layer_types),
            intermediate_size=config.d_ff,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.d_head,
            rms_norm_eps=config.norm_eps,
            vocab_size=config.vocab_size,
            rope_theta=config.rope_theta or 10000.0,
            tie_word_embeddings=config.tie_embeddings,
        )
        names = {
            "embed.": "embed_tokens.", ".mixer.": ".self_attn.", ".mlp_norm.": ".post_attention_layernorm.",
        }  # fmt: skip
        renamed = []
        for name in weights:
            new = name
            for ours, theirs in names.items():
                new = new.replace(ours, theirs)
            if new.count(".") == 3 and new.endswith(".norm.weight"):
                new = new.replace(".norm.", ".input_layernorm.")
            new = new if new.startswith("lm_head") else f"model.{new}"
            renamed.append((new, mx.array(np.asarray(weights[name], np.float32)).astype(getattr(mx, config.dtype))))
        self.model = llama.Model(args)
        self.model.load_weights(renamed, strict=True)
        mx.eval(self.model.parameters())
        self.config, self.vocab_size, self.dtype = config, config.vocab_size, config.dtype

    def place(self, position: int, prefill: bool) -> float | None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        self.cache = make_prompt_cache(self.model)
        if not prefill:
            for cache in self.cache:
                shape = (1, self.config.kv_heads, position, self.config.d_head)
                cache.update_and_fetch(*(mx.random.normal(shape).astype(getattr(mx, self.dtype)) for _ in range(2)))
            mx.eval([c.state for c in self.cache])
            return None
        tokens = mx.random.randint(0, self.vocab_size, (1, position))
        hidden, start = tokens, time.perf_counter()
        for begin in range(0, position, 512):  # mlx-lm's loop: the head only runs for the last token
            block = tokens[:, begin : begin + 512]
            hidden = self.model.model(block, cache=self.cache)
            mx.eval([c.state for c in self.cache])
        mx.eval(self.model.model.embed_tokens.as_linear(hidden[:, -1]) if self.config.tie_embeddings
                else self.model.lm_head(hidden[:, -1]))  # fmt: skip
        return position / (time.perf_counter() - start)

    def step(self, token: int) -> int:
        import mlx.core as mx

        out = mx.argmax(self.model(mx.array([[token]]), cache=self.cache)[:, -1], axis=-1)
        mx.eval(out)
        return int(np.array(out)[0])

    def state_bytes(self) -> int:
        return sum(part.nbytes for cache in self.cache for part in (cache.keys, cache.values))


# --- worker processes -----------------------------------------------------------------------------------------------


def work(engine: str, model: Path) -> None:
    """Answer one JSON line for each JSON line read: place at a position, or time some tokens."""
    import psutil

    held = MlxLm(model) if engine == PEER else Ours(model, full=engine == OURS_FULL)
    held.place(64, prefill=True)  # what runs first pays for pages and threads
    print(json.dumps({"dtype": held.dtype}), flush=True)
    token = 1
    for line in sys.stdin:
        order = json.loads(line)
        if "position" in order:
            answer: dict[str, Any] = {"prefill_tok_s": held.place(order["position"], order["prefill"])}
            for _ in range(WARM):
                token = held.step(token)
        else:
            times = []
            for _ in range(order["tokens"]):
                start = time.perf_counter()
                token = held.step(token)
                times.append(time.perf_counter() - start)
            rss = psutil.Process().memory_info().rss
            answer = {"times": times, "state_bytes": held.state_bytes(), "rss_bytes": rss}
        print(json.dumps(answer), flush=True)


class Worker:
    """A process with one engine in it."""

    def __init__(self, engine: str, model: Path) -> None:
        self.engine = engine
        command = [sys.executable, __file__, "--worker", engine, "--model", str(model)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.dtype = self._answer()["dtype"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"decode.py: the process of {self.engine!r} ended; its error is above")
        return json.loads(line)

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()


def compare(model: Path, positions: list[int], prefill_up_to: int, engines: list[str]) -> list[dict[str, Any]]:
    """One row for each engine and position; the engines take turns, 4 tokens at a time."""
    workers, rows = [Worker(engine, model) for engine in engines], []
    for position in positions:
        prefill = position <= prefill_up_to
        placed = [w.ask(position=position, prefill=prefill) for w in workers]
        answers: list[list[dict[str, Any]]] = [[] for _ in workers]
        for _ in range(TIMED // 4):
            for answer, w in zip(answers, workers, strict=True):
                answer.append(w.ask(tokens=4))
        for w, place, answer in zip(workers, placed, answers, strict=True):
            seconds = statistics.median(t for a in answer for t in a["times"])
            rows.append(
                {
                    "engine": PEER if w.engine == PEER else "bmojo-edge",
                    "model": model.name if w.engine == OURS_WINDOWED else f"{model.name}, full attention",
                    "dtype": w.dtype,
                    "position": position,
                    "prefill_tok_s": place["prefill_tok_s"],
                    "decode_tok_s": 1 / seconds,
                    "ms_per_token": 1e3 * seconds,
                    "state_bytes": answer[-1]["state_bytes"],
                    "rss_bytes": answer[-1]["rss_bytes"],
                }
            )
            print(
                "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in rows[-1].items()), flush=True
            )
    return rows


def flatness(near: int, far: int, rounds: int) -> list[dict[str, Any]]:
    """A small B'MOJO model moved for real: its time per token at `far` against `near`, in alternating rounds."""
    import mlx.core as mx
    import psutil

    from bmojo_edge.mlx import Model
    from bmojo_edge.state import leaves

    config = be.Config.preset("tiny")
    lm = Model(config)
    mx.eval(lm.parameters())
    states, state, position = {}, lm.init_state(), 0
    for goal in (near, far):
        while position < goal:
            n = min(10_000, goal - position)
            logits, state = lm.prefill(mx.random.randint(0, config.vocab_size, (1, n)), state)
            mx.eval(logits, state)
            position += n
        states[goal] = state
    del state
    times: dict[int, list[float]] = {near: [], far: []}
    for n in range(rounds):
        for goal in (near, far) if n % 2 else (far, near):
            state = states.pop(goal)
            start = time.perf_counter()
            for _ in range(config.chunk_size):  # a whole chunk, so every round promotes once
                logits, state = lm.decode_one_token(mx.array([1]), state)
                mx.eval(logits, state)
            times[goal].append((time.perf_counter() - start) / config.chunk_size)
            states[goal] = state
            del state
    return [
        {
            "engine": "bmojo-edge",
            "model": "tiny",
            "dtype": config.dtype,
            "position": goal,
            "prefill_tok_s": None,
            "decode_tok_s": 1 / statistics.median(seconds),
            "ms_per_token": 1e3 * statistics.median(seconds),
            "state_bytes": sum(leaf.nbytes for _, leaf in leaves(states[goal])),
            "rss_bytes": psutil.Process().memory_info().rss,
        }
        for goal, seconds in times.items()
    ]


def plot(results: Path) -> Path:
    """State bytes and milliseconds a token against position, one line an engine."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads(results.read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if row["model"] != "tiny"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for engine, model in dict.fromkeys((row["engine"], row["model"]) for row in rows):
        mine = sorted((r for r in rows if (r["engine"], r["model"]) == (engine, model)), key=lambda r: r["position"])
        x = [r["position"] for r in mine]
        left.plot(x, [r["state_bytes"] / 2**20 for r in mine], marker="o", label=f"{engine}: {model}")
        right.plot(x, [r["ms_per_token"] for r in mine], marker="o")
    for axes, title in ((left, "state, MiB"), (right, "ms per token")):
        axes.set(title=title, xlabel="position", xscale="log", ylim=(0, None))
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['dtype']}: {found['machine']}", fontsize=9)
    out = results.with_suffix(".png")
    figure.savefig(out, dpi=150)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a windowed folder made by convert; default: the default model")
    parser.add_argument("--positions", type=int, nargs="+", default=[128, 1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--prefill", type=int, default=8192, help="positions up to here are reached by reading tokens")
    parser.add_argument(
        "--far", type=int, default=100_000, help="where the small model is timed against position 1,000"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from --out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.model)
    if not args.plot:
        if args.model is None:
            from bmojo_convert.default import ensure_default_model

            args.model = ensure_default_model()
        rows = compare(args.model, args.positions, args.prefill, [OURS_WINDOWED, OURS_FULL, PEER])
        small = flatness(1000, args.far, args.rounds)
        ratio = small[1]["ms_per_token"] / small[0]["ms_per_token"]
        print(f"time per token at {args.far} over 1000: {ratio:.3f}")
        report.write(args.out, rows + small, PACKAGES, far_over_near=ratio)
    print(plot(args.out))
    return None


if __name__ == "__main__":
    main()
