"""Draws the pictures of docs/reproduction.md and writes its tables from the result files, between markers.

python -m apps.repro.figures            # after a sweep
python -m apps.repro.figures --check    # exit 1 where the page is not what the files say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from apps.repro.cells import STATE
from apps.repro.rows import ORDER, SLOTS, Found, best_rates, by_slots, name_of, plain, usual_recipe, usual_slots
from apps.repro.sweep import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "reproduction.md"
KINDS = ("keys", "values", "queries", "blanks")


def _read(task: str) -> Found:
    return json.loads((RESULTS / f"{task}.json").read_text(encoding="utf-8"))


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison(found: Found) -> str:
    """Every cell of the comparison: memory, accuracy of each seed, accuracy far away."""
    cells = best_rates(usual_slots(plain(found["rows"])))

    def rank(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*key[:2], key[2], key[3], ORDER.index(key[4].split()[0]), key[4])

    body = []
    for key in sorted(cells, key=rank):
        rows = cells[key]
        body.append(
            [
                f"{key[1]}, {key[2]} pairs, width {key[3]}",
                key[4],
                f"{rows[0]['memory_bytes'] / 1024:.0f} KiB",
                f"{rows[0]['lr']:.0e}",
                ", ".join(f"{100 * row['accuracy']:.1f}" for row in rows),
                f"{100 * mean(row['far_accuracy'] for row in rows):.1f}" if "far_accuracy" in rows[0] else "",
                f"{mean(row['steps'] for row in rows):,.0f}",
            ]
        )
    header = ["task", "model", "memory", "learning rate", "accuracy %, a seed each", "at 1,024 %", "steps"]
    devices = ", ".join(dict.fromkeys(row["device"] for row in found["rows"]))
    where = f"{devices}, torch {found['versions']['torch']}, commit {found['commit']}"
    return f"{_rows(header, body)}\n\n{where}; {len(found['rows'])} runs."


def summary(found: Found) -> str:
    """Mean accuracy of each model, the better of with and without positions, at the usual size and enlarged."""
    best: dict[tuple[Any, ...], dict[tuple[str, bool], float]] = defaultdict(dict)
    for key, rows in best_rates(usual_slots(plain(found["rows"]))).items():
        of, which = best[key[:4]], (rows[0]["model"], rows[0]["d_state"] != STATE)
        of[which] = max(mean(row["accuracy"] for row in rows), of.get(which, 0.0))
    columns = ("bmojo", "bmojo-f", "hybrid", "mamba", "window", "transformer")
    body = []
    for _, length, pairs, width in sorted(best, key=lambda key: (key[1], key[3], key[2])):
        of = best["mqar", length, pairs, width]
        if {model for model, _ in of} == {*columns}:
            cells = [
                " / ".join(f"{100 * of[model, larger]:.1f}" for larger in (False, True) if (model, larger) in of)
                for model in columns
            ]
            body.append([f"{length} tokens, {pairs} pairs, width {width}", *cells])
    return _rows(["task", *columns], body)


def memory(found: Found) -> str:
    """What each model of the comparison at 256 tokens, width 64, may remember, by kind."""
    rows = [row for row in usual_slots(plain(found["rows"])) if (row["seq_len"], row["d_model"]) == (256, 64)]
    named = {name_of({**row, "rotary": False}): row for row in rows}  # positions take no memory
    body = []
    for name, row in sorted(named.items(), key=lambda item: (ORDER.index(item[1]["model"]), item[1]["memory_bytes"])):
        kinds = [f"{row['memory'][kind] / 1024:.1f}" for kind in ("ssm", "eidetic", "rings", "total")]
        body.append([name, *kinds, f"{row['params']:,}"])
    return _rows(["model", "SSM state, KiB", "eidetic", "keys and values", "all", "parameters"], body)


def slots(found: Found) -> str:
    """`by_slots` as a table."""
    body = [[name, *(f"{100 * of[n]:.1f}" if n in of else "" for n in SLOTS)] for name, of in by_slots(found).items()]
    return _rows(["slots", *map(str, SLOTS)], body)


def reach(found: Found) -> str:
    """How far back B'MOJO-F answers, by its fading length, in the small runs made for this."""
    body = []
    for row in sorted(found["rows"], key=lambda row: row["options"]["n_fading"]):
        n, shares = row["options"]["n_fading"], [f"{100 * right / asked:.0f}" for _, asked, right in row["by_distance"]]
        body.append([str(n), str(2 * (row["window"] + n)), f"{100 * row['accuracy']:.1f}", *shares])
    distances = [distance for distance, _, _ in found["rows"][0]["by_distance"]]
    header = ["fading", "reach", "accuracy %", *(f"from {d:g}" for d in distances)]
    return f"{_rows(header, body)}\n\n{found['machine']}, torch {found['versions']['torch']}."


def repeated(found: Found) -> str:
    """What was run on the same examples in every epoch: the best learning rate of each."""
    rows = [row for row in found["rows"] if not row["fresh"]]
    body = []
    for batch in sorted({row["batch"] for row in rows}, reverse=True):
        for key, best in best_rates(row for row in rows if row["batch"] == batch).items():
            name = [f"{key[2]} pairs", key[4], str(batch), f"{best[0]['lr']:.0e}"]
            body.append([*name, f"{100 * best[0]['accuracy']:.1f}", f"{100 * best[0]['far_accuracy']:.1f}"])
    header = ["task", "model", "batch", "learning rate", "accuracy %", "at 1,024 %"]
    return _rows(header, sorted(body, key=lambda row: (row[0], -int(row[2]))))


def choices(found: Found) -> str:
    """Accuracy when one choice of B'MOJO is changed."""
    changed = [row for row in usual_recipe(found["rows"]) if row["options"] or row["ssm_lr"] != 1.0]
    body = []
    for row in sorted(changed, key=lambda row: -row["accuracy"]):
        what = [f"{name} {json.dumps(value)}" for name, value in row["options"].items()]
        what += [f"SSM learning rate x{row['ssm_lr']:g}"] if row["ssm_lr"] != 1.0 else []
        body.append([", ".join(what), f"{100 * row['accuracy']:.1f}", f"{row['steps']:,}"])
    return _rows(["change", "accuracy %", "steps"], body)


def kept(found: Found) -> str:
    """What the eidetic memory of each layer holds after a row, for seed 0 of every B'MOJO in the comparison."""
    body = []
    best = best_rates(usual_slots(plain(found["rows"])))
    for key in sorted(best, key=lambda key: (key[1], key[3], key[2], key[4])):
        row = best[key][0]
        for layer, share in enumerate(row.get("kept", {}).get("share", [])):
            what = f"{row['seq_len']}, {row['pairs']} pairs, width {row['d_model']}, {name_of(row)}, {row['lr']:.0e}"
            cells = [f"{100 * share[name]:.0f}" if name in share else "" for name in KINDS]
            body.append([what, f"{100 * row['accuracy']:.1f}", str(layer), *cells])
    header = ["task, model, learning rate", "accuracy %", "layer", *(f"{name} kept %" for name in KINDS)]
    return _rows(header, body)


def tables() -> dict[str, Callable[[], str]]:
    """What stands between each pair of markers, for the files there are."""
    found = {path.stem: _read(path.stem) for path in sorted(RESULTS.glob("*.json"))}
    made: dict[str, Callable[[], str]] = {task: lambda task=task: comparison(found[task]) for task in found}
    if "mqar" in found:
        made["choices"] = lambda: choices(found["mqar"])
        made["kept"] = lambda: kept(found["mqar"])
        made["slots"] = lambda: slots(found["mqar"])
        made["summary"] = lambda: summary(found["mqar"])
        made["memory"] = lambda: memory(found["mqar"])
        made["repeated"] = lambda: repeated(found["mqar"])
    if (RESULTS / "reach" / "mqar.json").exists():
        made["reach"] = lambda: reach(_read("reach/mqar"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = new = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        new = re.sub(f"{begin}.*?{end}", lambda _, t=table, b=begin, e=end: f"{b}\n{t()}\n{e}", new, flags=re.DOTALL)
    if args.check:
        sys.exit(0 if new == old else f"{PAGE}: its tables are not those of the result files; run this program")
    PAGE.write_text(new, encoding="utf-8")
    if (RESULTS / "mqar.json").exists():
        from apps.repro import pictures

        out = PAGE.parent / "pictures"
        out.mkdir(exist_ok=True)
        pictures.draw_memory(_read("mqar"), out / "recall.png")
        pictures.draw_kept(_read("mqar"), out / "kept.png")
        pictures.draw_distance(_read("mqar"), out / "distance.png")
        pictures.draw_slots(_read("mqar"), out / "slots.png")


if __name__ == "__main__":
    main()
