"""Writes the measured tables of READMEs and docs from the result files, between markers, so that no number is typed.

python apps/readme_tables.py            # rewrite them
python apps/readme_tables.py --check    # exit 1 where one is not what the files say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DECODE = ROOT / "apps/bench/results/decode.json"
EXPORT = ROOT / "apps/bench/results/export.json"
SESSION = ROOT / "apps/bench/results/session.json"
SERVE = ROOT / "apps/bench/results/serve.json"
KERNELS = ROOT / "apps/bench/results/kernels.json"
PEER = ROOT / "apps/eval/results/peer.json"
TRAIN = ROOT / "apps/bench/results/train.json"
PERPLEXITY = [ROOT / f"apps/eval/results/perplexity-{engine}.json" for engine in ("torch", "mlx")]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decode() -> str:
    """Tokens a second and state against position, each engine and its ratio to the peer."""
    found = _read(DECODE)
    rows = [row for row in found["rows"] if row["model"] != "tiny"]
    peer = {row["position"]: row["decode_tok_s"] for row in rows if row["engine"] != "bmojo-edge"}
    body = [
        [
            f"{row['position']:,}",
            f"{row['engine']}: {row['model']}",
            f"{row['prefill_tok_s']:.0f}" if row["prefill_tok_s"] else "",
            f"{row['decode_tok_s']:.1f}",
            f"{row['decode_tok_s'] / peer[row['position']]:.2f}x",
            f"{row['state_bytes'] / 2**20:.0f} MiB",
        ]
        for row in sorted(rows, key=lambda row: row["position"])
    ]
    small = [row for row in found["rows"] if row["model"] == "tiny"]
    header = ["position", "engine", "prefill tok/s", "decode tok/s", "decode against mlx-lm", "state"]
    return (
        f"{_rows(header, body)}\n\n{rows[0]['dtype']}, {found['machine']}, MLX {found['versions']['mlx']}, "
        f"commit {found['commit']}. A small B'MOJO's time per token at position {small[-1]['position']:,} over that at "
        f"{small[0]['position']:,}: {found['far_over_near']:.3f}."
    )


def perplexity() -> str:
    """Perplexity of each variant and its ratio to full attention."""
    body, notes = [], []
    for path in filter(Path.exists, PERPLEXITY):
        found = _read(path)
        for row in found["rows"]:
            ratio = row["ppl"] / found["rows"][0]["ppl"]
            run = f"{row['engine']}, {row['books']} book{'s' * (row['books'] > 1)}"
            body.append([row["variant"], run, f"{row['ppl']:.2f}", f"{ratio:.3f}"])
        notes.append(f"{found['source']} through {found['rows'][0]['engine']}: {found['machine']}, {found['commit']}")
    header = ["memory", "run", "perplexity", "against full attention"]
    return f"{_rows(header, body)}\n\n" + "; ".join(notes) + "."


def _ms(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f}" if row.get(name) is not None else ""


def kernels() -> str:
    """Every kernel and peer that was timed, and how its time compares with ours on the same case."""
    found = _read(KERNELS)
    rows = [row for row in found["rows"] if row["kernel"] not in ("layer", "device")]
    if not rows:
        return "The kernels by themselves and their peers have not been recorded with this program yet."
    ours = {(r["kernel"], r["case"]): r for r in rows if r["engine"].startswith("bmojo")}
    body = []
    for row in rows:
        own, cells = ours.get((row["kernel"], row["case"]), {}), []
        for name in ("fwd_ms", "fwdbwd_ms"):
            known = row.get(name) and own.get(name) and row is not own
            cells += [_ms(row, name), f"{own[name] / row[name]:.2f}x" if known else ""]
        error = f"{row['error']:.0e}" if row.get("error") is not None else ""
        body.append([row["kernel"], row["case"], row["engine"], *cells, error or row.get("failed", "")])
    header = ["kernel", "case", "engine", "forward", "ours", "and backward", "ours", "error against float64"]
    return f"{_rows(header, body)}\n\n{_where(found)}"


def layers() -> str:
    """Whole layers, and where a step's time goes."""
    found = _read(KERNELS)
    rows = [row for row in found["rows"] if row["kernel"] == "layer" and "failed" not in row]
    parts = ["matrix products", "attention", "scan", "convolution", "selection", "elementwise"]
    body = []
    for row in rows:
        split = row.get("split_ms", {})
        known = {**split, "elementwise": split.get("elementwise", 0) + split.get("rest", 0)} if split else {}
        cells = [f"{known[part]:.2f}" if part in known else "" for part in parts]
        name = [row["engine"], f"{row['params'] / 1e6:.1f} M"]
        body.append([*name, _ms(row, "fwd_ms"), _ms(row, "fwdbwd_ms"), *cells, f"{row['peak_bytes'] / 2**30:.1f} GiB"])
    header = ["layer", "parameters", "forward", "and backward", *parts, "memory"]
    return f"{_rows(header, body)}\n\n{_where(found)}"


def train() -> str:
    """Training speed of a 130M model of each kind, on one GPU and on two."""
    found = _read(TRAIN)
    cell = {(row["model"], row["seq_len"], row["gpus"]): row for row in found["rows"]}

    def against(row: dict[str, Any], other: tuple[str, int, int]) -> str:
        return f"{row['tokens_per_s'] / cell[other]['tokens_per_s']:.2f}x" if other in cell else ""

    body = [
        [
            f"{length:,}", str(gpus), model, f"{row['params'] / 1e6:.0f} M", f"{row['tokens_per_s']:,.0f}",
            f"{100 * row['mfu']:.0f}%", f"{row['peak_bytes'] / 2**30:.0f} GiB",
            *(against(row, (name, length, gpus)) for name in ("transformer", "mamba")),
            against(row, (model, length, 1)) if gpus > 1 else "",
        ]
        for (model, length, gpus), row in cell.items()
    ]  # fmt: skip
    header = ["length", "GPUs", "model", "parameters", "tokens/s", "utilisation", "memory of a GPU"]
    header += ["against Transformer", "against Mamba", "against one GPU"]
    return f"{_rows(header, body)}\n\n{_where({'gpu': found['rows'][0]['device'], **found})}"


def _where(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "python")
    return f"{found['gpu']}; {versions}; commit {found['commit']}."


def session() -> str:
    """What a session costs after a short and a long past."""
    found = _read(SESSION)
    body = [
        [
            f"{row['past']:,}",
            f"{row['file_bytes']:,}",
            f"{row['open_ms']:.1f}",
            f"{row['first_token_ms']:.1f}",
            f"{row['rss_bytes'] / 2**20:.0f} MiB",
            f"{row['peak_bytes_early'] / 2**20:.1f} MiB, {row['peak_bytes'] / 2**20:.1f} MiB",
        ]
        for row in found["rows"]
    ]
    header = [
        "tokens read", "bytes of the file", "open, ms", "open to first token, ms",
        "peak memory of a process that opens", "of the one that read: after at most 100,000 tokens, in the end",
    ]  # fmt: skip
    first, *_, last = found["rows"]
    return (
        f"{_rows(header, body)}\n\nMedians of {found['rounds']} times, the files taking turns; {found['machine']}, "
        f"MLX {found['versions']['mlx']} on the CPU, commit {found['commit']}. First token after {last['past']:,} "
        f"tokens over that after {first['past']:,}: {found['long_over_short']:.3f}."
    )


def export() -> str:
    """ONNX exports beside MLX and PyTorch."""
    found = _read(EXPORT)
    mlx = next(row for row in found["rows"] if row["engine"] == "MLX")
    body = []
    for row in found["rows"]:
        cells = [f"{row['engine']}, {row['weights']}", f"{row['prefill_tok_s']:.0f}", f"{row['decode_tok_s']:.1f}"]
        cells += [f"{row['decode_tok_s'] / mlx['decode_tok_s']:.2f}x", f"{row['peak_bytes'] / 2**30:.1f} GiB"]
        if "kl_mean" in row:
            cells += [f"{row['kl_mean']:.1e}, {row['kl_max']:.1e}", f"{100 * row['same_likeliest']:.1f}%"]
            cells += [f"{row['file_bytes'] / 1e6:.0f} MB"]
            cells += [f"{row['export_seconds']:.0f} s, {row['export_peak_bytes'] / 2**30:.1f} GiB"]
        body.append(cells + [""] * (9 - len(cells)))
    header = [
        "engine, weights", "prefill tok/s", "decode tok/s", "decode against MLX", "memory", "KL: mean, most",
        "same likeliest token", "files", "export: time, memory",
    ]  # fmt: skip
    compared = next(row["positions"] for row in found["rows"] if "kl_mean" in row)
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("mlx", "torch", "onnxruntime"))
    threads = (
        f"{found['threads']} thread{'s' * (found['threads'] > 1)} each" if found["threads"] else "threads as each likes"
    )
    return (
        f"{_rows(header, body)}\n\n{found['model']}, {compared} positions compared, {threads}, MLX with "
        f"{found['blas']}; {found['machine']}, load average {found['load']:.1f} before it began; {versions}, "
        f"commit {found['commit']}."
    )


def serve() -> str:
    """Tokens a second by the number of clients, and the time to the first token of a short and a long conversation."""
    found = _read(SERVE)
    rates = [row for row in found["rows"] if row["kind"] == "throughput"]
    one = rates[0]
    rate = [
        [
            str(row["clients"]),
            f"{row['tok_s']:.1f}",
            f"{row['tok_s'] / one['tok_s']:.2f}x",
            f"{row['step_ms']:.1f}",
            f"{row['model_tok_s']:.1f}",
            f"{row['model_tok_s'] / one['model_tok_s']:.2f}x",
        ]
        for row in rates
    ]
    firsts = [row for row in found["rows"] if row["kind"] == "first token"]
    short = {row["from"]: row for row in sorted(firsts, key=lambda row: (-row["turn"], -row["position"]))}
    first = [
        [
            str(row["turn"]),
            row["from"],
            f"{row['position']:,}",
            str(row["read"]),
            f"{row['first_token_ms']:.1f}",
            f"{row['first_token_ms'] / short[row['from']]['first_token_ms']:.2f}x",
        ]
        for row in sorted(firsts, key=lambda row: (row["from"], row["turn"]))
    ]
    rate_header = ["clients", "tokens/s", "against one", "step of the model alone, ms", "tokens/s of it", "against one"]
    first_header = ["turn", "state from", "position", "tokens read", "first token, ms", "against the short one"]
    return (
        f"{_rows(rate_header, rate)}\n\n{_rows(first_header, first)}\n\n{found['model']}, {found['dtype']}, "
        f"{found['machine']}, MLX {found['versions']['mlx']} on the CPU with {found['blas']}, commit {found['commit']}."
    )


def peer() -> str:
    """What a converted model and transformers score on the same examples, and how often they answer alike."""
    found = _read(PEER)

    def scores(metrics: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())

    body = [
        [
            f"{row['task']}, {'first' if row['seed'] is None else 'random'} {row['examples']}",
            scores(row["bmojo-edge"]),
            scores(row["transformers"]),
            ", ".join(map(str, row["alike"].values())),
            f"{row['largest_difference_nats']:.1e}",
        ]
        for row in found["rows"]
    ]
    engines = " and ".join(dict.fromkeys({"mlx": "MLX", "torch": "PyTorch"}[row["engine"]] for row in found["rows"]))
    header = ["task, examples", "bmojo-edge", "transformers", "answered alike", "log-likelihoods apart, nats, at most"]
    return (
        f"{_rows(header, body)}\n\n{found['rows'][0]['model']}, float32, on {engines}, {found['machine']}, "
        f"transformers {found['versions']['transformers']}, commit {found['commit']}."
    )


TABLES = {
    "README.md": {"decode": decode, "perplexity": perplexity},
    "cuda_kernels/README.md": {"kernels": kernels, "layers": layers},
    "docs/export.md": {"export": export},
    "docs/server.md": {"serve": serve},
    "docs/evaluation.md": {"peer": peer},
    "docs/sessions.md": {"session": session},
    "docs/training.md": {"train": train},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for file, tables in TABLES.items():
        path = ROOT / file
        old = new = path.read_text(encoding="utf-8")
        for name, table in tables.items():
            begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
            assert begin in old, f"{file}: has no place for the table {name}"
            new = re.sub(
                f"{begin}.*?{end}", lambda _, t=table, b=begin, e=end: f"{b}\n{t()}\n{e}", new, flags=re.DOTALL
            )
        if args.check and new != old:
            sys.exit(f"{file}: its tables are not those of the result files; run this script")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
