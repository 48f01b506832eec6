"""How fast `bmojo-edge data prepare` cuts text into tokens, and in how much memory, with one process and with all.

    python apps/bench/prepare.py openstax_train.jsonl.xz novels_train.jsonl.xz --vocab 8192

Every run is a process of its own; its memory is the largest of all processes together, sampled 20 times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

RESULTS = Path(__file__).parent / "results" / "prepare.json"


def together(process: psutil.Process) -> int:
    """Bytes that a process and its children hold now; 0 once it is gone."""
    try:
        return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def run(source: Path, vocab: int, jobs: int) -> dict[str, Any]:
    """One preparation, as a row."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from bmojo_edge.cli import main; main()", "data", "prepare", str(source)]
        command += ["--out", f"{folder}/out", "--train-vocab", str(vocab), "--jobs", str(jobs), "--json"]
        began, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, together(watched))
            time.sleep(0.05)
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"preparing {source} failed; run the command by hand: {' '.join(command[3:])}")
        made, used = json.loads(out), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "source": source.name,
        "bytes": source.stat().st_size,
        "vocab": vocab,
        "jobs": jobs,
        "tokens": made["parts"]["all"]["n_tokens"],
        "documents": made["parts"]["all"]["n_documents"],
        "tokens_per_s": made["tokens_per_s"],
        "seconds_in_all": round(time.perf_counter() - began, 1),
        "cpu_seconds_in_all": round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for source in options.sources:
        for jobs in options.jobs:
            rows.append(run(source, options.vocab, jobs))
            print(json.dumps(rows[-1]))
    load = os.getloadavg()[1]
    report.write(options.out, rows, ("bmojo-edge", "sentencepiece", "numpy"), load_average=round(load, 1))


if __name__ == "__main__":
    main()
