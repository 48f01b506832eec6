"""Perplexity of a converted Transformer on whole books: full attention, a window with sinks, a window without.

    python apps/eval/perplexity.py BOOKS.jsonl.xz                      # all books through PyTorch
    python apps/eval/perplexity.py BOOKS.jsonl.xz --engine mlx --count 1

BOOKS is JSON lines with a "text" each, plain or .xz. Every variant has the same weights; only the memories differ.
The text is fed in blocks with the carried state, exactly as a long conversation would be.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import bmojo_edge as be
from bmojo_edge.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

VARIANTS: dict[str, dict[str, Any]] = {
    "full attention": {},
    "window 512, 4 sinks": {"window": 512, "n_sinks": 4, "chunk": 64},
    "window 512, no sinks": {"window": 512, "n_sinks": 0, "chunk": 64},
    "window 1024, 4 sinks": {"window": 1024, "n_sinks": 4, "chunk": 64},
    "window 512, 4 sinks, 256 eidetic": {"window": 512, "n_sinks": 4, "chunk": 64, "n_eidetic": 256},
}
RESULTS = Path(__file__).parent / "results"
BLOCK = 512

LogLikelihoods = Callable[[np.ndarray], Iterator[np.ndarray]]  # tokens (t,) -> log p of each token but the first


def books(path: Path, count: int) -> list[str]:
    """The texts of the first `count` lines."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(count), lines, strict=False)]


def variant_config(config: be.Config, memories: dict[str, Any]) -> be.Config:
    """The same weights as `attention` layers, or as windowed bmojo layers with the given memories."""
    kind = "bmojo" if memories else "attention"
    memories = {"n_eidetic": 0, "n_fading": 0, **memories}
    return config.replace(layer_types=(kind,) * len(config.layer_types), attention_window=None, **memories)


def torch_engine(config: be.Config, weights: Any, device: str) -> LogLikelihoods:
    """Log-likelihoods through the PyTorch twin."""
    import torch

    from bmojo_edge.torch import Model

    model = Model(config)
    model.load_state_dict({name: torch.from_numpy(np.asarray(weights[name], np.float32)) for name in weights})
    model = model.to(device).eval()

    @torch.inference_mode()
    def run(tokens: np.ndarray) -> Iterator[np.ndarray]:
        ids, state = torch.from_numpy(tokens).to(device)[None], model.init_state()
        for begin in range(0, len(tokens) - 1, BLOCK):
            block, target = ids[:, begin : begin + BLOCK], ids[:, begin + 1 : begin + BLOCK + 1]
            block = block[:, : target.shape[1]]
            logits, state = model(block, state)
            chosen = torch.log_softmax(logits.float(), -1).gather(-1, target[..., None])
            yield chosen[0, :, 0].cpu().numpy()

    return run


def mlx_engine(config: be.Config, weights: Any, device: str) -> LogLikelihoods:
    """Log-likelihoods through the MLX twin, from a folder saved for it."""
    import tempfile

    import mlx.core as mx

    with tempfile.TemporaryDirectory() as folder:
        be.checkpoint.save(Path(folder) / "variant", config, {name: weights[name] for name in weights})
        lm = be.load(Path(folder) / "variant")

    def run(tokens: np.ndarray) -> Iterator[np.ndarray]:
        state = lm.init_state()
        for begin in range(0, len(tokens) - 1, BLOCK):
            target = mx.array(tokens[begin + 1 : begin + BLOCK + 1])
            logits, state = lm.forward(mx.array(tokens[begin : begin + len(target)])[None], state)
            logits = logits[0].astype(mx.float32)
            chosen = mx.take_along_axis(logits, target[:, None], -1)[:, 0] - mx.logsumexp(logits, -1)
            mx.eval(chosen, state)
            yield np.array(chosen)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--model", type=Path, help="a converted Transformer; default: the default model")
    parser.add_argument("--engine", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--device", default="cpu", help="for torch: cpu, cuda or mps")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="how many books, from the start")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS)[:3], choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="default: results/perplexity-ENGINE.json beside this script")
    args = parser.parse_args()
    if args.model is None:
        from bmojo_convert.default import ensure_default_model

        args.model = ensure_default_model()
    config, weights = be.checkpoint.read(args.model)
    tokenizer = Tokenizer.load(args.model)
    texts = [np.array(tokenizer.encode(text)[: args.tokens]) for text in books(args.books, args.count)]
    engine = torch_engine if args.engine == "torch" else mlx_engine
    rows = []
    for name in args.variants:
        run, logs, start = engine(variant_config(config, VARIANTS[name]), weights, args.device), [], time.perf_counter()
        for n, tokens in enumerate(texts):
            logs.append(np.concatenate(list(run(tokens))))
            print(f"{name}: book {n + 1} of {len(texts)}, ppl {math.exp(-logs[-1].mean()):.2f}", file=sys.stderr)
        seconds = time.perf_counter() - start
        row = {
            "variant": name,
            "engine": args.engine,
            "device": args.device,
            "books": len(texts),
            "tokens": sum(map(len, texts)),
            "ppl": math.exp(-np.concatenate(logs).mean()),
            "ppl_after_1024": math.exp(-np.concatenate([x[1023:] for x in logs]).mean()),
            "tokens_per_s": sum(map(len, texts)) / seconds,
        }
        rows.append(row)
        ratio = row["ppl"] / rows[0]["ppl"]
        print(f"{name:36} ppl {row['ppl']:7.2f}  after 1,024: {row['ppl_after_1024']:7.2f}  x{ratio:.3f}", flush=True)
    out = args.out or RESULTS / f"perplexity-{args.engine}.json"
    report.write(out, rows, ("torch", "mlx", "numpy"), model=args.model.name, source=args.books.name)


if __name__ == "__main__":
    main()
