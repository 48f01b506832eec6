"""ONNX exports beside the model they were made from: KL to MLX, likeliest tokens, speed beside MLX and PyTorch.

    make bench BENCHES=export                                # the default model, Shakespeare, ten minutes on 2 cores
    python apps/bench/export.py --model DIR --text FILE --weights float32 int8

Exports are made by the command line in a process of its own, which tells its time and memory. They are kept in
--exports: a second run finds them. Compared are the logits after each of the first `chunk` tokens, fed one by one; at
the end of each chunk from there to --read, fed whole; and after each of --tokens more, one by one. Engines then take
turns at decoding, each in a process of its own, each with the same tokens behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import bmojo_edge as be
from bmojo_edge.engine import evaluate
from bmojo_edge.scoring import divergences, predictions

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

ROOT = Path(__file__).parents[2]
WEIGHTS = ("float32", "int8", "int4")
PACKAGES = ("mlx", "torch", "onnxruntime", "onnx", "numpy")
COMMAND = "from bmojo_edge.cli import main; main()"
TURN = 4  # tokens an engine decodes before the next has its turn


def export(model: Path, folder: Path, weights: str) -> dict[str, Any]:
    """Make an export where it is missing; what the command told of it is kept beside it."""
    told = folder.with_name(f"{folder.name}.json")
    if not (folder / "manifest.json").is_file() or not told.is_file():
        command = [sys.executable, "-c", COMMAND, "export", "onnx", str(model), "--out", str(folder)]
        command += ["--weights", weights, "--overwrite", "--json"]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        told.write_text(run.stdout, encoding="utf-8")
    return json.loads(told.read_text(encoding="utf-8"))


def opened(engine: str, path: Path, threads: int = 0) -> Any:
    """A model of an engine, with the face of `engine.LM`. threads: 0 = as the engine likes."""
    if engine == "PyTorch":
        import torch

        from bmojo_edge.torch import load

        if threads:
            torch.set_num_threads(threads)
        return load(path).eval()
    if engine == "onnxruntime":
        from bmojo_edge.onnx_runner import OnnxModel

        return OnnxModel.load(path, threads=threads)
    return be.load(path)


# --- quality --------------------------------------------------------------------------------------------------------


def calls(chunk: int, read: int, tokens: int) -> list[int]:
    """How many tokens each call gets."""
    return [1] * chunk + [chunk] * (read // chunk - 1) + [1] * tokens


def quality(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """KL(MLX || export) in nats, and how often both find the same token likeliest."""
    kl, same = divergences(ours, theirs), ours.argmax(-1) == theirs.argmax(-1)
    return {
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "same_likeliest": float(same.mean()),
        "positions": len(kl),
    }


# --- speed ----------------------------------------------------------------------------------------------------------


def work(engine: str, path: Path, ids: np.ndarray, threads: int) -> None:
    """Read `ids`, then decode TURN tokens for each line read; one JSON line each time."""
    lm = opened(engine, path, threads)
    begun, state = time.perf_counter(), lm.init_state()
    logits, state = lm.prefill(ids[None], state)
    token = int(evaluate(logits, state).argmax())
    print(json.dumps({"prefill_tok_s": len(ids) / (time.perf_counter() - begun)}), flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(TURN):
            begun = time.perf_counter()
            logits, state = lm.decode_one_token(np.array([token], np.int32), state)
            token = int(evaluate(logits, state).argmax())
            times.append(time.perf_counter() - begun)
        print(json.dumps({"times": times, "peak_bytes": report.peak_bytes()}), flush=True)


class Worker:
    """A process with one engine in it."""

    def __init__(self, engine: str, path: Path, ids: np.ndarray, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", engine, str(path), json.dumps(ids.tolist())]
        command += ["--threads", str(threads)]
        blas = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)} if threads else {}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | blas
        )
        self.first = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("export.py: the process of an engine ended; its error is above")
        return json.loads(line)

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


def speeds(
    engines: dict[str, tuple[str, Path]], ids: np.ndarray, rounds: int, threads: int
) -> dict[str, dict[str, float]]:
    """Tokens a second and resident memory of each engine by name."""
    workers = {name: Worker(engine, path, ids, threads) for name, (engine, path) in engines.items()}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for n in range(rounds + 1):
        for name, worker in workers.items():
            found = worker.turn()
            if n:  # the first turn pays for what is not warm
                answers[name].append(found)
    return {
        name: {
            **worker.first,
            "decode_tok_s": 1 / statistics.median(x for answer in answers[name] for x in answer["times"]),
            "peak_bytes": answers[name][-1]["peak_bytes"],
        }
        for name, worker in workers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a windowed folder made by convert; default: the default model")
    parser.add_argument("--text", type=Path, default=ROOT / "tests/data/shakespeare.txt")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--exports", type=Path, default=ROOT / "build/exports", help="where exports are kept")
    parser.add_argument("--read", type=int, help="tokens before the last ones; default: the window")
    parser.add_argument("--tokens", type=int, default=192, help="tokens decoded after those")
    parser.add_argument("--rounds", type=int, default=8, help=f"turns of {TURN} tokens in the comparison of speed")
    parser.add_argument("--threads", type=int, default=0, help="of every engine; default: as each likes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/export.json")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker[0], Path(args.worker[1]), np.array(json.loads(args.worker[2]), np.int32), args.threads)
    if args.model is None:
        from bmojo_convert.default import ensure_default_model

        args.model = ensure_default_model()
    load = os.getloadavg()[0]  # before this program adds its own
    args.exports.mkdir(parents=True, exist_ok=True)
    folders = {weights: args.exports / f"{args.model.name}-{weights}" for weights in args.weights}
    told = {weights: export(args.model, folder, weights) for weights, folder in folders.items()}

    lm = opened("MLX", args.model)
    assert lm.tokenizer is not None
    sizes = calls(lm.config.chunk_size, args.read or lm.config.window, args.tokens)
    ids = np.array(lm.tokenizer.encode(args.text.read_text(encoding="utf-8")[: 20 * sum(sizes)]), np.int32)
    ids = ids[: sum(sizes)]
    ours = predictions(lm, ids, sizes)
    del lm
    engines = {"MLX": ("MLX", args.model), "PyTorch": ("PyTorch", args.model)}
    rows: dict[str, dict[str, Any]] = {name: {"engine": name, "weights": "float32"} for name in engines}
    for weights, folder in folders.items():
        name = f"onnxruntime {weights}"
        engines[name] = "onnxruntime", folder
        found = quality(ours, predictions(opened("onnxruntime", folder), ids, sizes))
        export_told = {"export_seconds": told[weights]["seconds"], "export_peak_bytes": told[weights]["peak_memory"]}
        size = sum(told[weights]["files"].values())
        rows[name] = {"engine": "onnxruntime", "weights": weights, **found, **export_told, "file_bytes": size}
        print(name, found, flush=True)
    for name, found in speeds(engines, ids[: args.read or 1024], args.rounds, args.threads).items():
        rows[name] |= found
        print(name, found, flush=True)
    blas = "OpenBLAS" if "openblas" in os.environ.get("LD_PRELOAD", "") else "the BLAS in its wheel"
    how = {"model": args.model.name, "text": args.text.name, "threads": args.threads, "blas": blas, "load": load}
    report.write(args.out, list(rows.values()), PACKAGES, **how)


if __name__ == "__main__":
    main()
