"""A converted model beside transformers on the same examples: do they choose the same answers?

    python apps/eval/peer.py MODEL PEER --data SETS                    # PEER: a Hugging Face folder, or a .gguf file
    python apps/eval/peer.py MODEL PEER --data SETS --seed 0           # of examples drawn at random
    python apps/eval/peer.py MODEL PEER --data SETS --tasks piqa --limit 50 --engine torch

Both compute in float32 on the CPU from the same token ids: MODEL in ragged batches with forked states, PEER text by
text in whole forward passes. Results are written after every task; other tasks of the file are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

import bmojo_edge as be
from bmojo_edge import evaluation
from bmojo_edge.evaluation import Choices, Example
from bmojo_edge.scoring import Request, Score, request

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

TASKS = "arc_easy,piqa,hellaswag,lambada"
RESULT = Path(__file__).parent / "results" / "peer.json"


def load_peer(path: Path) -> Any:
    """transformers' own reading of a folder or of a GGUF file."""
    where: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if where else path
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()


@torch.inference_mode()
def peer_score(peer: Any, one: Request) -> Score:
    """Log-probability of a continuation in one pass over the whole text."""
    ids, n = torch.tensor([[*one.context, *one.continuation]]), len(one.continuation)
    logprobs = peer(ids, use_cache=False, logits_to_keep=n + 1).logits[0, :-1].float().log_softmax(-1)
    targets = ids[0, -n:]
    same = bool((logprobs.argmax(-1) == targets).all())
    return Score(logprobs.gather(-1, targets[:, None]).sum().item(), same, n)


def row(task: str, examples: Sequence[Example], ours: list[list[Score]], theirs: list[list[Score]]) -> dict[str, Any]:
    """Metrics of both in percent, how many examples they answer alike by each, and how far scores are apart."""
    found: dict[str, Any] = {"task": task, "examples": len(examples)}
    for who, scores in (("bmojo-edge", ours), ("transformers", theirs)):
        metrics = evaluation.result_of(examples, scores).metrics
        found[who] = {name: m.value if name == "perplexity" else 100 * m.value for name, m in metrics.items()}
    questions = [example for example in examples if isinstance(example, Choices)]
    if questions:
        picked = [[evaluation.chosen(e, s) for e, s in zip(questions, x, strict=True)] for x in (ours, theirs)]
        found["alike"] = {name: sum(a[name] == b[name] for a, b in zip(*picked, strict=True)) for name in picked[0][0]}
    else:
        found["alike"] = {"acc": sum(a[0].greedy == b[0].greedy for a, b in zip(ours, theirs, strict=True))}
    apart = [abs(a.logprob - b.logprob) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    found["largest_difference_nats"] = max(apart)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("peer", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--seed", type=int, help="draw the examples at random, as `bmojo-edge eval --seed` does")
    parser.add_argument("--engine", choices=("mlx", "torch"), default="mlx")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.engine == "mlx":
        lm: Any = be.load(given.model, dtype="float32")
    else:
        from bmojo_edge.torch import load

        lm = load(given.model, dtype="float32")
    peer = load_peer(given.peer)
    rows = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.is_file() else []
    draw = None if given.seed is None else Random(given.seed)
    for task in given.tasks.split(","):
        examples = evaluation.read(evaluation.task_path(given.data, task), given.limit, draw)
        ours = evaluation.scores_of(lm, examples, given.batch)
        theirs = [[peer_score(peer, request(lm, *pair)) for pair in evaluation.pairs(e)] for e in examples]
        case = {"model": given.peer.name, "engine": given.engine, "seed": given.seed}
        one = {**case, **row(task, examples, ours, theirs)}
        rows = [x for x in rows if {**x, **case, "task": task} != x] + [one]
        report.write(given.out, rows, ("mlx", "torch", "transformers"), limit=given.limit)
        print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
