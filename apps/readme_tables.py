"""Writes the measured tables of README.md from the result files, between markers, so that no number is typed.

python apps/readme_tables.py            # rewrite README.md
python apps/readme_tables.py --check    # exit 1 where README.md is not what the files say
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = ROOT / "README.md"
    old = new = path.read_text(encoding="utf-8")
    for name, table in (("decode", decode), ("perplexity", perplexity)):
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        new = re.sub(f"{begin}.*?{end}", lambda _, t=table, b=begin, e=end: f"{b}\n{t()}\n{e}", new, flags=re.DOTALL)
    if args.check:
        sys.exit(0 if new == old else "README.md: its tables are not those of the result files; run this script")
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
