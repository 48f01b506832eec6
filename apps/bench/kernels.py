"""Times of the Triton kernels beside every published way to do the same, and of whole layers. Writes a JSON.

    python apps/bench/kernels.py                                  # everything, on a machine with an NVIDIA GPU
    python apps/bench/kernels.py --sections selective_scan,layer  # the other rows of the results file stay
    python apps/bench/kernels.py --device cpu --tiny --out /tmp/x.json    # a rehearsal with plain ops

Medians by CUDA events in bfloat16. Sections are first compiled side by side in processes of their own, untimed, then
timed in one process; a peer that is missing or fails is a row with `failed`, and a crash costs one section.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

# A checkout that is not installed, such as on a GPU machine, has its packages here.
sys.path[:0] = [str(Path(__file__).parents[2] / part) for part in ("", "cuda_kernels", "metal_kernels", "converters")]

RESULTS = Path(__file__).parent / "results" / "kernels.json"
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "fla-core")
NAMES = (
    "memory_attention", "selective_scan", "causal_conv", "select_eidetic", "linear_cross_entropy",
    "gated_linear_attention", "layer", "device",
)  # fmt: skip
PARTS = {"memory_attention": 5, "selective_scan": 2, "layer": 3, "linear_cross_entropy": 2}  # processes that compile


def times(run: Any, device: str, timed: bool) -> dict[str, Any]:
    """Milliseconds forward, and forward and backward where there is something to differentiate, and the error."""
    import timing
    import torch

    @torch.no_grad()
    def forward() -> Any:
        return run.call()

    out = forward()
    grad = torch.randn_like(out, dtype=torch.float32).to(out.dtype) if run.inputs else None

    def both() -> Any:
        return torch.autograd.grad(run.call(), run.inputs, grad)

    if not timed:  # compiled is enough
        both() if run.inputs else forward()
        return {}
    error = None if run.error is None else run.error()
    fwd, fwdbwd = timing.median_ms(forward, device), timing.median_ms(both, device) if run.inputs else None
    return {"fwd_ms": fwd, "fwdbwd_ms": fwdbwd, "error": error}


def measured(kernel: str, device: str, tiny: bool, share: tuple[int, int] | None) -> list[dict[str, Any]]:
    """Rows of a section; with a share (k, n) only every n-th run from the k-th on, called once and not timed."""
    import timing
    import torch
    from sections import SECTIONS, Recorded

    rows, seen = [], 0
    for case, engines in SECTIONS[kernel](device, tiny):
        for engine, make in engines.items():
            seen += 1
            row = {"kernel": kernel, **case, "dtype": "bfloat16", "engine": engine}
            if isinstance(make, Recorded):
                rows.append({**row, **make._asdict(), "recorded": True})
            elif share is None or seen % share[1] == share[0]:
                with timing.fail_soft(rows, **row):
                    torch.manual_seed(0)
                    rows.append({**row, **times(make(), device, share is None)})
    return rows


def machine_rates(device: str, tiny: bool) -> list[dict[str, Any]]:
    """What the machine gives at most: bytes a second in a copy, operations a second in a matrix product."""
    import timing
    import torch

    size, n = (2**20, 256) if tiny else (2**31, 8192)
    x = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    y, a = torch.empty_like(x), torch.randn(n, n, device=device).bfloat16()
    copy, product = timing.median_ms(lambda: y.copy_(x), device), timing.median_ms(lambda: a @ a.t(), device)
    row = {
        "kernel": "device",
        "copy_tb_s": round(2e-9 * size / copy, 3),
        "matmul_tflop_s": round(2e-9 * n**3 / product, 1),
    }
    return [{**row, "case": f"copy {size} bytes, product of {n}", "engine": "torch"}]


def section(kernel: str, device: str, tiny: bool, share: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """All rows of one section."""
    if kernel == "layer":
        import layers

        names = list(layers.LAYERS)
        wanted = names if share is None else names[share[0] : share[0] + 1]
        size = (1, 96) if tiny else (4, 8192)
        return layers.rows(device, *size, names=wanted, compiled=not tiny)
    return machine_rates(device, tiny) if kernel == "device" else measured(kernel, device, tiny, share)


def work(kernels: list[str], device: str, tiny: bool, out: Path) -> None:
    """Time sections one after another, a line of JSON for each."""
    for kernel in kernels:
        begun = time.time()
        rows = section(kernel, device, tiny)
        print(f"{kernel}: {time.time() - begun:.0f} s", flush=True)
        with out.open("a") as lines:
            lines.write(json.dumps({"kernel": kernel, "rows": rows}) + "\n")


def child(arguments: list[str], folder: Path, name: str) -> subprocess.Popen[bytes]:
    """This program in a process of its own, which says what it says in a file."""
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([sys.executable, __file__, *arguments], stdout=log, stderr=subprocess.STDOUT)


def compile_all(kernels: list[str], options: list[str], folder: Path, limit: float) -> None:
    """Run every section once, side by side, so that compiled kernels lie in the caches."""
    jobs = [
        (kernel, k, PARTS.get(kernel, 1))
        for kernel in kernels
        if kernel != "device"
        for k in range(PARTS.get(kernel, 1))
    ]
    end = time.time() + limit
    running = [
        child([*options, "--compile", f"{kernel},{k},{n}"], folder, f"compile-{kernel}-{k}") for kernel, k, n in jobs
    ]
    for process in running:
        try:
            process.wait(max(1.0, end - time.time()))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


def time_all(kernels: list[str], options: list[str], folder: Path, limit: float) -> list[dict[str, Any]]:
    """Rows of every section; one that kills its process is a row that says so, and the next begin in a new process."""
    found, end, left, attempt = folder / "rows.jsonl", time.time() + limit, list(kernels), 0
    rows: list[dict[str, Any]] = []
    found.touch()
    while left and time.time() < end:
        process = child([*options, "--work", ",".join(left), "--rows", str(found)], folder, f"work-{attempt}")
        try:
            process.wait(max(1.0, end - time.time()))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        print((folder / f"work-{attempt}.log").read_text(errors="replace")[-4000:], flush=True)
        done = [json.loads(line) for line in found.read_text().splitlines()]
        rows = [row for part in done for row in part["rows"]]
        left = [kernel for kernel in left if kernel not in {part["kernel"] for part in done}]
        if left:
            why = "the process ended" if time.time() < end else "out of time"
            with found.open("a") as lines:
                failed = {"kernel": left[0], "case": "all", "engine": "all", "failed": why}
                lines.write(json.dumps({"kernel": left[0], "rows": [failed]}) + "\n")
            rows, left, attempt = [*rows, failed], left[1:], attempt + 1
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text."""
    lines = []
    for row in rows:
        times = (row.get("fwd_ms"), row.get("fwdbwd_ms"), row.get("error"))
        cells = ["" if x is None else f"{x:.3f}" if n < 2 else f"{x:.0e}" for n, x in enumerate(times)]
        note = row.get("failed") or row.get("split_ms") or row.get("copy_tb_s") or ""
        numbers = " ".join(f"{cell:>8}" for cell in cells)
        lines.append(f"{row['kernel']:22} {row['case']:38} {row['engine']:46} {numbers} {note}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(NAMES), help="which of " + ", ".join(NAMES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that plain ops on a CPU compute in seconds")
    parser.add_argument("--limit", type=float, default=900, help="seconds for compiling, and again for timing")
    parser.add_argument("--commit", help="name of this checkout's commit where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    for hidden in ("--compile", "--work", "--rows"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        kernel, k, n = args.compile.split(",")
        section(kernel, args.device, args.tiny, (int(k), int(n)))
        return
    if args.work:
        work(args.work.split(","), args.device, args.tiny, Path(args.rows))
        return
    kernels = args.sections.split(",")
    if unknown := set(kernels) - set(NAMES):
        parser.error(f"--sections: {', '.join(sorted(unknown))} is none of {', '.join(NAMES)}")
    options = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    begun = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.device == "cuda":
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
            compile_all(kernels, options, folder, args.limit)
            print(f"compiled: {time.time() - begun:.0f} s", flush=True)
        rows = time_all(kernels, options, folder, args.limit)
    kept = []
    if args.out.is_file():
        kept = [row for row in json.loads(args.out.read_text())["rows"] if row["kernel"] not in kernels]
    more = {"gpu": device_name(args.device), **({"commit": args.commit} if args.commit else {})}
    report.write(args.out, [*kept, *rows], PACKAGES, **more)
    print(table(rows))


def device_name(device: str) -> str | None:
    """The GPU, in words."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else None


if __name__ == "__main__":
    main()
