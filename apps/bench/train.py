"""Training speed of a 130M B'MOJO beside a Transformer and a Mamba of as many parameters, on one GPU and on two.

    python apps/bench/train.py                      # all cases this machine has GPUs for
    python apps/bench/train.py --gpus 2             # only those of two GPUs
    python apps/bench/train.py --models bmojo --lengths 2048 --limit 120

Each case is a process (or two) of its own running steps of the trainer on random tokens. All cases of as many GPUs
start and compile side by side, then they take turns: one has the GPUs and is timed, the others wait. Mamba runs on one
GPU alone. A case that fails is a row with `failed` and does not stop the others; results are written after every case,
those of other cases stay as they are.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

RESULTS = Path(__file__).parent / "results" / "train.json"
PACKAGES = ("torch", "triton", "numpy")
VOCAB, LENGTHS, WARM = 32_000, (2048, 8192), 3

# Equal in parameters within 2%: 131.2, 131.9 and 130.2 million. The Transformer and B'MOJO have 12 layers; Mamba has
# blocks alone, as published.
MODELS: dict[str, dict[str, Any]] = {
    "bmojo": {"preset": "130m", "qk_norm": True},  # which half precision needs: docs/training.md
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

    from bmojo_edge.torch import Trainer, World
    from bmojo_edge.train_config import TrainConfig

    with tempfile.TemporaryDirectory() as folder, World.start(case["device"]) as world:
        tokens = case["tokens"] * world.size
        make_data(Path(folder) / "data", 4 * tokens)
        settings = TrainConfig.from_dict(
            {
                "out": str(Path(folder) / "run"),
                "steps": WARM + case["steps"],
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
        seconds, loss, cuda = [], float("nan"), world.device.type == "cuda"
        for step in range(WARM):
            while not stepped(trainer, step, patient=cuda and world.size == 1):
                time.sleep(1.0)
        if cuda:  # leave the memory to whose turn it is
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with wait_for_turn(case, world.leads):
            for step in range(WARM, WARM + case["steps"]):
                begun, rows = time.perf_counter(), trainer.batches(step)
                loss, _, _ = trainer.step(step, rows)
                seconds.append(time.perf_counter() - begun)
        timed = seconds[len(seconds) // 10 :]  # clocks rise in the first ones
        speed = tokens / statistics.median(timed)
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


def stepped(trainer: Any, step: int, patient: bool) -> bool:
    """Do a step; where `patient`, False if other cases that warm up have taken the memory it needs."""
    import torch

    try:
        trainer.step(step, trainer.batches(step))
        return True
    except torch.OutOfMemoryError:
        if not patient:
            raise
    trainer.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return False


@contextmanager
def wait_for_turn(case: dict[str, Any], leads: bool) -> Iterator[None]:
    """Say that this case is warm, wait until all are, then have the GPUs alone.

    The process that leads takes the turn and tells the others, which must not queue work before: a collective that
    waits for its partners keeps a GPU busy.
    """
    folder = Path(case["folder"])
    turn = folder / f"{case['name']}.turn"
    if not leads:
        while not turn.exists():
            time.sleep(0.02)
        yield
        return
    (folder / f"{case['name']}.warm").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    with (folder / "go").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        turn.touch()
        yield


def start(case: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """A process for a case; its result is a file in `folder`."""
    order = json.dumps({**case, "folder": str(folder)})
    command = [sys.executable]
    if case["gpus"] > 1:
        endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(case["gpus"]), *endpoint]
    log = (folder / f"{case['name']}.log").open("w")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, __file__, "--work", order], stdout=log, stderr=subprocess.STDOUT, env=environment, text=True
    )


def failure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The end of what a case said in failing."""
    said = (folder / f"{case['name']}.log").read_text().strip().splitlines()
    return {"failed": next((line for line in reversed(said) if "Error" in line), "\n".join(said[-3:]))[:300]}


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait()


def merge(rows: list[dict[str, Any]], out: Path) -> None:
    """Write rows over those of the same cases."""

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
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU: tries this script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        case = json.loads(options.work)
        row = work(case)
        if row.pop("leads"):
            (Path(case["folder"]) / f"{case['name']}.json").write_text(json.dumps(row))
        return
    run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """All cases the options name, within their limit."""
    deadline = time.monotonic() + options.limit
    small = {"d_model": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32}
    for place, gpus in enumerate(options.gpus):
        cases = [
            {
                "name": f"{model}-{length}",
                "model": model,
                "seq_len": length,
                "gpus": gpus,
                "compile": not options.no_compile,
                "tokens": options.tokens,
                "steps": options.steps,
                "rows": options.tokens // length,
                "device": "cpu" if options.small else "cuda",
                "model_fields": {**MODELS[model], **small, "layer_types": ["mamba" if model == "mamba" else "bmojo"]}
                if options.small
                else MODELS[model],
            }
            for length in options.lengths
            for model in options.models
            if gpus == 1 or model != "mamba"
        ]
        left = (deadline - time.monotonic()) / (len(options.gpus) - place)
        run_together(cases, time.monotonic() + left, options.out)


def run_together(cases: list[dict[str, Any]], deadline: float, out: Path) -> None:
    """Warm all cases up side by side, then let them take turns; rows are written as they come."""
    begun, limit = time.monotonic(), deadline - time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = {case["name"]: (case, start(case, folder)) for case in cases}

        def done(case: dict[str, Any], found: dict[str, Any]) -> None:
            told = ("model", "seq_len", "gpus", "compile", "tokens", "steps")
            row = {**{key: case[key] for key in told}, **found}
            print(json.dumps(row), flush=True)
            merge([row], out)

        while running:
            time.sleep(0.05)
            cold = [case for case, _ in running.values() if not (folder / f"{case['name']}.warm").exists()]
            late = time.monotonic() - begun > 0.7 * limit and not (folder / "go").exists()
            for case, process in list(running.values()):
                result = folder / f"{case['name']}.json"
                over = time.monotonic() > deadline or (late and case in cold)
                if over and process.poll() is None:
                    stop(process)
                    done(case, {"failed": f"out of time after {time.monotonic() - begun:.0f} s"})
                elif process.poll() is not None:
                    done(case, json.loads(result.read_text()) if result.is_file() else failure(case, folder))
                else:
                    continue
                del running[case["name"]]
            if (late or not cold) and not (folder / "go").exists():
                print(f"{len(running)} cases warm after {time.monotonic() - begun:.0f} s", flush=True)
                (folder / "go").touch()


if __name__ == "__main__":
    main()
