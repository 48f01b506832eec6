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
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from apps.repro.cells import EIDETIC, STATE, WINDOW, Cell, Row
from apps.repro.sweep import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "reproduction.md"
ORDER = ("transformer", "bmojo", "bmojo-f", "hybrid", "mamba", "window")
SLOTS = (16, 32, 64, 96, 128, 192)
KINDS = ("keys", "values", "queries", "blanks")
Found = dict[str, Any]


def _read(task: str) -> Found:
    return json.loads((RESULTS / f"{task}.json").read_text(encoding="utf-8"))


def name_of(row: Row) -> str:
    """A model as tables and legends name it: positions, an enlarged state or another number of slots are told."""
    more = ["rotary"] if row["rotary"] else []
    if row["d_state"] != STATE:
        more.append(f"state {row['d_state']}" + (f", {row['expand']}x wide" if row["expand"] != 2 else ""))
    if row["model"] == "bmojo" and row["n_eidetic"] != EIDETIC:
        more.append(f"{row['n_eidetic']} slots")
    return f"{row['model']} ({', '.join(more)})" if more else row["model"]


def plain(rows: Iterable[Row]) -> list[Row]:
    """Rows of the comparison itself, without changed options, on fresh examples."""
    return [row for row in usual_recipe(rows) if not row["options"] and row["ssm_lr"] == 1.0]


def usual_recipe(rows: Iterable[Row]) -> list[Row]:
    """Rows of models with the usual window, trained on fresh examples for the usual time."""
    usual = {"fresh": True, "window": WINDOW, "epochs": Cell.epochs}
    return [row for row in rows if all(row[name] == value for name, value in usual.items())]


def usual_slots(rows: Iterable[Row]) -> list[Row]:
    """Rows of models that have the usual number of slots, or none."""
    return [row for row in rows if row["n_eidetic"] in (0, EIDETIC)]


def best_rates(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by cell (task, length, pairs, width, model), those of the learning rate with the best seed 0 only."""
    cells: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["task"], row["seq_len"], row["pairs"], row["d_model"], name_of(row)].append(row)
    found = {}
    for key, tried in cells.items():
        first = [row for row in tried if row["seed"] == 0]
        lr = max(first or tried, key=lambda row: (row["accuracy"], -row["steps"]))["lr"]
        found[key] = sorted((row for row in tried if row["lr"] == lr), key=lambda row: row["seed"])
    return found


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


def memory(found: Found) -> str:
    """What each model of the comparison at 256 tokens, width 64, may remember, by kind."""
    rows = {
        name_of(row): row for row in usual_slots(plain(found["rows"])) if (row["seq_len"], row["d_model"]) == (256, 64)
    }
    body = []
    for name in sorted(rows, key=lambda name: (ORDER.index(rows[name]["model"]), rows[name]["memory_bytes"])):
        parts, row = rows[name]["memory"], rows[name]
        if not row["rotary"] or row["d_state"] != STATE:  # positions take no memory
            kinds = [f"{parts[kind] / 1024:.1f}" for kind in ("ssm", "eidetic", "rings", "total")]
            body.append([name.replace("rotary, ", ""), *kinds, f"{row['params']:,}"])
    return _rows(["model", "SSM state, KiB", "eidetic", "keys and values", "all", "parameters"], body)


def by_slots(found: Found) -> dict[str, dict[int, float]]:
    """Accuracy of seed 0 by the number of eidetic slots, the best learning rate of each, by pairs and positions."""
    rows = [row for row in plain(found["rows"]) if row["model"] == "bmojo" and row["seed"] == 0]
    rows = [row for row in rows if (row["seq_len"], row["d_model"]) == (256, 64)]
    groups: dict[str, dict[int, float]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (-row["pairs"], not row["rotary"])):
        of = groups[f"{row['pairs']} pairs, {'rotary' if row['rotary'] else 'no'} positions"]
        of[row["n_eidetic"]] = max(row["accuracy"], of.get(row["n_eidetic"], 0.0))
    return {name: of for name, of in groups.items() if len(of) > 1}


def slots(found: Found) -> str:
    """`by_slots` as a table."""
    body = [[name, *(f"{100 * of[n]:.1f}" if n in of else "" for n in SLOTS)] for name, of in by_slots(found).items()]
    return _rows(["slots", *map(str, SLOTS)], body)


def reach(found: Found) -> str:
    """How far back B'MOJO-F answers, by its fading length, in the small runs made for this."""
    rows = found["rows"]
    body = []
    for row in sorted(rows, key=lambda row: row["options"]["n_fading"]):
        n, shares = row["options"]["n_fading"], {d: right / asked for d, asked, right in row["by_distance"]}
        cells = [f"{100 * share:.0f}" for _, share in sorted(shares.items())]
        body.append([str(n), str(2 * (row["window"] + n)), f"{100 * row['accuracy']:.1f}", *cells])
    distances = sorted(d for d, _, _ in rows[0]["by_distance"])
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


def draw_kept(found: Found, out: Path) -> None:
    """Which positions the best B'MOJO keeps at 64 pairs in 256 tokens, a line a test row, a panel a layer."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in usual_slots(plain(found["rows"])) if row.get("kept")]
    rows = [row for row in rows if (row["pairs"], row["seq_len"], row["d_model"]) == (64, 256, 64)]
    best = max(rows, key=lambda row: row["accuracy"])
    layers, columns = best["kept"]["positions"], range(best["seq_len"])
    figure, axes = plt.subplots(len(layers), 1, figsize=(9, 3.2), sharex=True, squeeze=False, layout="constrained")
    for layer, (axis, examples) in enumerate(zip(axes[:, 0], layers, strict=True)):
        start = 2 * best["pairs"]
        for y, shown in enumerate(examples):
            positions = [int(p) for p in shown.split()]
            for parity, colour, name in ((0, "tab:blue", "keys"), (1, "tab:orange", "values")):
                x = [p for p in positions if p < start and p % 2 == parity]
                axis.scatter(x, [y] * len(x), marker="|", s=90, color=colour, label=name if y == 0 else None)
            x = [p for p in positions if p >= start]
            axis.scatter(x, [y] * len(x), marker="|", s=90, color="0.6", label="later tokens" if y == 0 else None)
        axis.axvline(start - 0.5, color="0.8", linewidth=1)
        axis.set(ylabel=f"layer {layer}\ntest row", yticks=range(len(examples)), xlim=(-1, columns[-1] + 1))
        axis.invert_yaxis()
    axes[0][0].legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    axes[-1][0].set(xlabel="position of a token that the eidetic memory holds after the row")
    figure.savefig(out, dpi=140)
    plt.close(figure)


def draw_memory(found: Found, out: Path) -> None:
    """Accuracy against bytes remembered, one panel a difficulty."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    cells = best_rates(usual_slots(plain(found["rows"])))
    panels = sorted({key[:4] for key in cells}, key=lambda key: (key[1], key[3], key[2]))
    panels = [panel for panel in panels if len({key[4].split()[0] for key in cells if key[:4] == panel}) == len(ORDER)]
    lines = -(-len(panels) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(10.5, 3.1 * lines), sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for model in ORDER:
            points: dict[float, float] = {}  # the better of with and without positions
            for key, rows in cells.items():
                if key[:4] == panel and rows[0]["model"] == model:
                    x, y = rows[0]["memory_bytes"] / 1024, mean(row["accuracy"] for row in rows)
                    points[x] = max(y, points.get(x, 0.0))
            axis.plot(*zip(*sorted(points.items()), strict=True) if points else ((), ()), marker="o", label=model)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set(xlabel="memory, KiB", title=f"{panel[1]} tokens, {panel[2]} pairs, width {panel[3]}")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="accuracy", ylim=(-0.02, 1.04))
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(ORDER))
    figure.savefig(out, dpi=140)
    plt.close(figure)


def draw_distance(found: Found, out: Path) -> None:
    """Accuracy against the distance of a key from the question, the best run of each model at 16 and 32 pairs.

    Dashed: SSM, hybrid and B'MOJO-F with B'MOJO's memory.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in usual_slots(plain(found["rows"])) if row.get("by_distance")]
    rows = [row for row in rows if (row["seq_len"], row["d_model"]) == (256, 64)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, pairs in zip(axes, (16, 32), strict=True):
        for number, model in enumerate(name for name in ORDER if any(row["model"] == name for row in rows)):
            for larger, line in ((False, "-"), (True, "--")):
                of = [row for row in rows if (row["model"], row["pairs"]) == (model, pairs)]
                of = [row for row in of if (row["d_state"] != STATE) == larger]
                if of:
                    best = max(of, key=lambda row: row["accuracy"])
                    x, asked, right = zip(*best["by_distance"], strict=True)
                    y = [b / a for a, b in zip(asked, right, strict=True)]
                    axis.plot(x, y, line, marker=".", color=f"C{number}", label=name_of(best))
        for reach in (WINDOW, 4 * WINDOW):
            axis.axvline(reach, color="0.8", linewidth=1)
        axis.set(title=f"{pairs} pairs", xlabel="tokens between key and question")
    axes[0].set(ylabel="accuracy", ylim=(-0.02, 1.04))
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(out, dpi=140)
    plt.close(figure)


def draw_slots(found: Found, out: Path) -> None:
    """Accuracy against the number of eidetic slots."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for number, (name, of) in enumerate(by_slots(found).items()):
        axis.plot(*zip(*sorted(of.items()), strict=True), marker="o", label=name, color=f"C{number}")
    axis.set(xlabel="eidetic slots", ylabel="accuracy", ylim=(-0.02, 1.04), xticks=SLOTS)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=140)
    plt.close(figure)


def tables() -> dict[str, Callable[[], str]]:
    """What stands between each pair of markers, for the files there are."""
    found = {path.stem: _read(path.stem) for path in sorted(RESULTS.glob("*.json"))}
    made: dict[str, Callable[[], str]] = {task: lambda task=task: comparison(found[task]) for task in found}
    if "mqar" in found:
        made["choices"] = lambda: choices(found["mqar"])
        made["kept"] = lambda: kept(found["mqar"])
        made["slots"] = lambda: slots(found["mqar"])
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
        pictures = PAGE.parent / "pictures"
        pictures.mkdir(exist_ok=True)
        draw_memory(_read("mqar"), pictures / "recall.png")
        draw_kept(_read("mqar"), pictures / "kept.png")
        draw_distance(_read("mqar"), pictures / "distance.png")
        draw_slots(_read("mqar"), pictures / "slots.png")


if __name__ == "__main__":
    main()
