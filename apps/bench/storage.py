"""What storage costs: memory over a long text, and the time of one choice among many blocks.

    python apps/bench/storage.py                     # 200,000 tokens through a tiny model on PyTorch, then choices

Memory is the process's resident set, its peak in each tenth of the text. Choices are timed on stores of random blocks
with the router of a 135M model (3 key/value heads of 64, 9 query heads, 16 queries), files in the system's cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bmojo_edge.config import Config
from bmojo_edge.engine import state_nbytes
from bmojo_edge.recall import WithStorage, shape_for
from bmojo_edge.session_file import weights_fingerprint
from bmojo_edge.storage import Shape, Store

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

RESULTS = Path(__file__).parent / "results"
UNCHECKED: dict[str, Any] = {"config": {}, "tokenizer": "", "weights": "", "folder": None}


def memory(tokens: int) -> list[dict[str, Any]]:
    """Peak resident memory in each tenth of a text of so many tokens."""
    import torch

    from bmojo_edge.torch import Model

    torch.manual_seed(0)
    config = Config.preset("tiny", window=1024, n_sinks=4, ssm=None, n_fading=0, n_eidetic=0)
    lm, process, rng, rows = Model(config).eval(), psutil.Process(), np.random.default_rng(0), []
    identity = {**UNCHECKED, "config": config.to_dict(), "weights": weights_fingerprint(lm)}
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.create(Path(folder) / "store", shape_for(config), identity, ram_bytes=2**20) as store,
    ):
        model: Any = WithStorage(lm, store)
        state, peak, start, done = model.init_state(), 0, time.perf_counter(), 0
        for part in range(10):
            while done < tokens * (part + 1) // 10:
                ids = rng.integers(0, config.vocab_size, (1, 512))
                _, state = model.prefill(ids, state)
                done, peak = done + 512, max(peak, process.memory_info().rss)
            rows.append(
                {"tokens": done, "peak_rss_bytes": peak, "state_bytes": state_nbytes(state), "blocks": len(store),
                 "store_bytes": store.nbytes, "tokens_per_s": done / (time.perf_counter() - start)}
            )  # fmt: skip
            print(rows[-1], flush=True)
            peak = 0
    return rows


def choices(blocks: int) -> dict[str, Any]:
    """Seconds of one choice among so many blocks, by the clock and of the processor."""
    shape, rng = Shape(32, (0,), 0, 2, 3, 64), np.random.default_rng(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.create(Path(folder) / "store", shape, UNCHECKED, disk_bytes=2**34, segment=2**40) as store,
    ):
        branch = store.begin("random", "file")
        for start in range(0, blocks * 32, 2048):
            store.add(branch, start, np.zeros(2048, np.int64), rng.standard_normal((1, 2, 3, 2048, 64)).astype("f2"))
        queries, slots = rng.standard_normal((9, 16, 64)).astype(np.float32), store.visible(store.next_id, 0, 0)
        store.choose(queries, slots, 8)
        store.flush()
        walls, processors = [], []
        for _ in range(5):
            wall, processor = time.perf_counter(), time.process_time()
            store.choose(queries, slots, 8)
            walls.append(time.perf_counter() - wall)
            processors.append(time.process_time() - processor)
        row = {"choice_among": blocks, "choose_s": float(np.median(walls)),
               "choose_cpu_s": float(np.median(processors))}  # fmt: skip
        print(row, flush=True)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--blocks", type=int, nargs="*", default=[1024, 4096], help="stores to choose from")
    parser.add_argument("--out", type=Path, default=RESULTS / "storage.json")
    args = parser.parse_args()
    rows = memory(args.tokens)
    for blocks in args.blocks:
        rows += [choices(blocks)]
    report.write(args.out, rows, ("torch", "numpy"))


if __name__ == "__main__":
    main()
