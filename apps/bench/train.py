"""Training speed of a 130M B'MOJO beside a Transformer and a Mamba of as many parameters, on one GPU and on two.

    python apps/bench/train.py                      # all cases this machine has GPUs for
    python apps/bench/train.py --gpus 2             # only those of two GPUs
    python apps/bench/train.py --models bmojo --lengths 2048 --limit 120

Each case is a process (or two) of its own running steps of the trainer on random tokens. Cases are compiled first, side
by side, for that takes the CPU; then they are timed, every GPU having one case at a time. Mamba runs on one GPU alone. A
case that fails is a row with `failed` and does not stop the others; results are written after every case, those of
other cases stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

RESULTS = Path(__file__).parent / "results" / "train.json"
PACKAGES = ("torch", "triton", "numpy")
VOCAB, LENGTHS = 32_000, (2048, 8192)

# Equal in parameters within 2%: 131.2, 131.9 and 130.2 million. The Transformer and B'MOJO have 12 layers; Mamba has
# blocks alone, as published.
MODELS: dict[str, dict[str, Any]] = {
    "bmojo": {"preset": "130m"},
    "transformer": {
        "vocab_size": VOCAB, "d_model": 768, "layer_types": ["attention"] * 12, "d_ff": 3200, "n_heads": 12,
        "n_kv_heads": 4, "rope_theta": 10_000.0, "tie_embeddings": True,
    },
    "mamba": {
        "vocab_size": VOCAB, "d_model": 768, "layer_types": ["mamba"] * 28, "d_ff": 0, "tie_embeddings": True,
        "ssm": {"kind": "mamba", "d_state": 16, "d_conv": 4, "expand": 2},
    },
}  # fmt: skip


def make_data(folder: Path, tokens: int) -> None:
    """One long document of random tokens."""
    folder.mkdir()
    np.random.default_rng(0).integers(0, VOCAB, tokens).astype("<u2").tofile(folder / "tokens.bin")
    np.save(folder / "documents.npy", np.array([0, tokens], np.int64))
    info = {
        "format": "bmojo-dataset", "version": 1, "vocab_size": VOCAB, "dtype": "uint16", "n_tokens": tokens,
        "n_documents": 1, "tokenizer_files": [], "sources": [],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(info))


def work(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in this process, which torchrun may have started; what was measured."""
    import torch

    from bmojo_edge.torch.parallel import World
    from bmojo_edge.torch.train import Trainer
    from bmojo_edge.train_config import TrainConfig

    with tempfile.TemporaryDirectory() as folder, World.start(case["device"]) as world:
        tokens = case["tokens"] * world.size
        make_data(Path(folder) / "data", 4 * tokens)
        settings = TrainConfig.from_dict(
            {
                "out": str(Path(folder) / "run"),
                "steps": case["steps"],
                "model": case["model_fields"],
                "data": {
                    "train": str(Path(folder) / "data"),
                    "sequence_length": case["seq_len"],
                    "carry": False,
                },
                "batch": {"tokens": tokens, "rows": case["rows"]},
                "system": {"device": case["device"], "compile": case["compile"]},
            }
        )
        trainer = Trainer(settings, world, None)
        seconds, loss = [], float("nan")
        for step in range(case["steps"]):
            begun, rows = time.perf_counter(), trainer.batches(step)
            loss, _, _ = trainer.step(step, rows)
            seconds.append(time.perf_counter() - begun)
        timed = seconds[len(seconds) // 5 :]
        speed = tokens / statistics.median(timed)
        cuda = world.device.type == "cuda"
        row = {
            "params": sum(p.numel() for p in trainer.parallel.model.parameters()),
            "tokens_per_s": round(speed, 1),
            "mfu": None if trainer.peak is None else round(speed * trainer.flops / (trainer.peak * world.size), 4),
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "device": trainer.device_name,
            "precision": trainer.config.dtype,
            "step_ms": round(1e3 * statistics.median(timed), 2),
            "slowest_step_ms": round(1e3 * max(timed), 2),
            "loss": loss,
            "leads": world.leads,
        }
        trainer.close()
        return row


def start(case: dict[str, Any], steps: int, folder: Path, gpu: int = 0) -> subprocess.Popen[str]:
    """A process for a case, on one GPU or on as many as it takes; its result is a file in `folder`."""
    name = f"{case['model']}-{case['seq_len']}-{case['gpus']}-{steps}"
    order = json.dumps({**case, "steps": steps, "result": str(folder / f"{name}.json")})
    command = [sys.executable]
    if case["gpus"] > 1:
        endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(case["gpus"]), *endpoint]
    log = (folder / f"{name}.log").open("w")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"), "OMP_NUM_THREADS": "1"}
    if case["gpus"] == 1 and case["device"] == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return subprocess.Popen(
        [*command, __file__, "--work", order], stdout=log, stderr=subprocess.STDOUT, env=environment, text=True
    )


def finish(process: subprocess.Popen[str], case: dict[str, Any], steps: int, folder: Path, limit: float) -> Any:
    """A case's result, or the end of what it said in failing."""
    name = f"{case['model']}-{case['seq_len']}-{case['gpus']}-{steps}"
    try:
        process.wait(max(1.0, limit))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return {"failed": "out of time"}
    result = folder / f"{name}.json"
    if process.returncode == 0 and result.is_file():
        return json.loads(result.read_text())
    said = (folder / f"{name}.log").read_text().strip().splitlines()
    return {"failed": next((line for line in reversed(said) if "Error" in line), "\n".join(said[-3:]))[:300]}


def merge(rows: list[dict[str, Any]], out: Path) -> None:
    """Write rows over those of the same cases."""
    from contextlib import suppress

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["seq_len"], row["gpus"]

    old: list[dict[str, Any]] = []
    with suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
        old = json.loads(out.read_text())["rows"]
    found = {key(row): row for row in [*old, *rows]}
    report.write(out, [found[k] for k in sorted(found, key=lambda k: (k[2], k[1], k[0]))], PACKAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32_768, help="of a step, on one GPU")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--side-by-side", type=int, default=1, help="cases of one GPU, each on its own, at a time")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU: tries this script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        case = json.loads(options.work)
        row = work(case)
        if row.pop("leads"):
            Path(case["result"]).write_text(json.dumps(row))
        return
    run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """All cases the options name, within their limit."""
    begun, rows = time.monotonic(), []
    small = {"d_model": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32}
    cases = [
        {
            "model": model,
            "seq_len": length,
            "gpus": gpus,
            "compile": not options.no_compile,
            "tokens": options.tokens,
            "rows": options.tokens // length,
            "device": "cpu" if options.small else "cuda",
            "model_fields": {**MODELS[model], **small, "layer_types": MODELS[model].get("layer_types", ["bmojo"])[:1]}
            if options.small
            else MODELS[model],
        }
        for gpus in options.gpus
        for length in options.lengths
        for model in options.models
        if gpus == 1 or model != "mamba"
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not options.no_compile:
            first = [case for case in cases if case["gpus"] == min(options.gpus)]
            compile_all(first, folder, options.side_by_side, options.limit / 2)
            for case in cases:
                case["compile"] = (folder / f"{case['model']}-{case['seq_len']}.compiled").exists()
            print(f"compiled after {time.monotonic() - begun:.0f} s", flush=True)
        while cases:
            together = [case for case in cases if case["gpus"] == 1][: options.side_by_side] or cases[:1]
            cases = [case for case in cases if case not in together]
            left = options.limit - (time.monotonic() - begun)
            found: list[Any] = [{"failed": "out of time"}] * len(together)
            if left > 10:
                processes = [start(case, options.steps, folder, gpu) for gpu, case in enumerate(together)]
                found = [
                    finish(process, case, options.steps, folder, options.limit - (time.monotonic() - begun))
                    for case, process in zip(together, processes, strict=True)
                ]
            told = ("model", "seq_len", "gpus", "compile", "tokens")
            for case, result in zip(together, found, strict=True):
                rows.append({**{key: case[key] for key in told}, "steps": options.steps, **result})
                print(json.dumps(rows[-1]), flush=True)
            merge(rows, options.out)


def compile_all(cases: list[dict[str, Any]], folder: Path, gpus: int, limit: float) -> None:
    """Run two steps of every case at once; those that get through leave a mark."""
    begun = time.monotonic()
    processes = [start(case, 2, folder, i % gpus) for i, case in enumerate(cases)]
    for case, process in zip(cases, processes, strict=True):
        found = finish(process, case, 2, folder, limit - (time.monotonic() - begun))
        if "failed" in found:
            print(f"{case['model']} {case['seq_len']}: not compiled: {found['failed']}", flush=True)
        else:
            (folder / f"{case['model']}-{case['seq_len']}.compiled").touch()


if __name__ == "__main__":
    main()
