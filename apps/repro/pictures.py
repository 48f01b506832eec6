"""Pictures of docs/reproduction.md."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from apps.repro.cells import STATE, WINDOW
from apps.repro.rows import ORDER, SLOTS, Found, best_rates, by_slots, name_of, plain, usual_slots


def draw_kept(found: Found, out: Path) -> None:
    """Which positions the best B'MOJO keeps at 64 pairs in 256 tokens, a line a test row, a panel a layer."""
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
    figure, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for number, (name, of) in enumerate(by_slots(found).items()):
        axis.plot(*zip(*sorted(of.items()), strict=True), marker="o", label=name, color=f"C{number}")
    axis.set(xlabel="eidetic slots", ylabel="accuracy", ylim=(-0.02, 1.04), xticks=SLOTS)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=140)
    plt.close(figure)
