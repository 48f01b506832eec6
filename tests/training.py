"""What tests of training share: small data folders, settings of seconds, and runs in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from bmojo_edge.dataset import Dataset
from bmojo_edge.train_config import TrainConfig

VOCAB = 37
SMALL: dict[str, Any] = {
    "d_model": 12, "d_ff": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "window": 6, "chunk": 3, "n_eidetic": 4,
    "n_sinks": 1, "rope_theta": 100.0, "layer_types": ["bmojo", "mamba"],
    "ssm": {"kind": "mamba", "d_state": 3, "d_conv": 2, "expand": 2, "dt_rank": 2},
}  # fmt: skip


def make_data(folder: Path, sizes: list[int], seed: int = 0, vocab: int = VOCAB) -> Dataset:
    """A prepared data folder with documents of these sizes, their tokens random."""
    folder.mkdir(parents=True)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    np.random.default_rng(seed).integers(0, vocab, offsets[-1]).astype("<u2").tofile(folder / "tokens.bin")
    np.save(folder / "documents.npy", offsets)
    info = {
        "format": "bmojo-dataset", "version": 1, "vocab_size": vocab, "dtype": "uint16", "n_tokens": int(offsets[-1]),
        "n_documents": len(sizes), "tokenizer_files": [], "sources": [],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(info))
    return Dataset.open(folder)


def settings(root: Path, name: str = "run", **fields: Any) -> TrainConfig:
    """Settings of a run of 6 steps of 4 rows of 12 tokens; tables in `fields` are merged with these."""
    if not (root / "data").exists():
        make_data(root / "data", [40, 7, 90, 3, 25, 61, 33, 12, 80, 5])
    base: dict[str, Any] = {
        "out": str(root / name),
        "steps": 6,
        "model": SMALL,
        "data": {"train": str(root / "data"), "sequence_length": 12},
        "batch": {"tokens": 48, "rows": 2},
        "optimizer": {"lr": 1e-2, "warmup": 0.2},
        "system": {"device": "cpu"},
        "checkpoints": {"every": 2, "keep": 2},
    }
    for key, value in fields.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and key in base and key != "model" else value
    return TrainConfig.from_dict(base)


def losses(config: TrainConfig) -> list[float]:
    """The losses in a run's log."""
    lines = (Path(config.out) / "log.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


# --- processes --------------------------------------------------------------------------------------------------------


def _train(config: TrainConfig, resume: bool, environment: dict[str, str]) -> None:
    """The work of a process: train, with what torchrun would have set."""
    import warnings

    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)  # torch's own
    from bmojo_edge.torch.train import train

    train(config, resume)


def start(config: TrainConfig, resume: bool = False, processes: int = 1) -> list[BaseProcess]:
    """Processes that train; on the CPU they come from a server that has imported torch already."""
    if config.system.device == "cuda":  # which a forked process may not use
        context: Any = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bmojo_edge.torch.train"])
    environment = {"WORLD_SIZE": "1"}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started: list[BaseProcess] = []
    for rank in range(processes):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_train, args=(config, resume, own), daemon=True)
        process.start()
        started.append(process)
    return started


def finish(processes: list[BaseProcess], seconds: float = 240) -> None:
    """Wait until processes have ended well."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(processes)
