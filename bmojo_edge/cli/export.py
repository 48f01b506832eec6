"""`bmojo-edge export`: a model's constant-size step for other runtimes."""

from __future__ import annotations

import json as json_format
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.terminal import console, progress_bar, size

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Export a model's step, with state in and out, for other runtimes.",
)


class Weights(StrEnum):
    """How an export may hold its matrices."""

    float32 = "float32"
    int8 = "int8"
    int4 = "int4"


class HalfWeights(StrEnum):
    """How a Core ML export may hold its matrices."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"
    palettized4 = "palettized4"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub id.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an export of the same kind.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object: path, bytes of each file, seconds, peak memory.")
]


def _require(*packages: str) -> None:
    """Name an extra by a package of its own, before PyTorch is looked for, which the extra brings."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


@contextmanager
def _exporting(model: str, out: Path, json: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Say what is made, how far it is, and in the end what was written and what it took."""
    begun = time.perf_counter()
    console.print(f"Exporting {escape(model)} to {escape(str(out))}", soft_wrap=True)
    with progress_bar() as progress:
        yield progress
    _report(out, json, begun)


@app.command("onnx")
@clear_errors
def onnx(
    model: Model,
    out: Out,
    weights: Annotated[
        Weights, typer.Option(help="int8 and int4: matrices in blocks of 32 with a scale each, the embedding as int8.")
    ] = Weights.float32,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Export to ONNX: graphs for one token, for a chunk and for the eidetic choice, a manifest and the tokenizer.

    The graphs are run and compared with the model before the folder appears. Layers whose cache grows are refused.

    [bold]Examples[/]

    bmojo-edge export onnx smollm2-w1024 --out smollm2-onnx

    bmojo-edge export onnx smollm2-w1024 --out smollm2-int8 --weights int8

    bmojo-edge chat smollm2-int8
    """
    _require("onnx", "onnxscript", "onnxruntime")
    from bmojo_convert.to_onnx import to_onnx

    with _exporting(model, out, json) as progress:
        to_onnx(model, out, weights=weights.value, overwrite=overwrite, progress=progress)


@app.command("coreml")
@clear_errors
def coreml(
    model: Model,
    out: Out,
    weights: Annotated[
        HalfWeights,
        typer.Option(
            help="int8, int4: blocks of 32 with a scale each; palettized4: 16 values for every 16 channels; "
            "float32: arithmetic in float32 too."
        ),
    ] = HalfWeights.float16,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Export to Core ML: one package for iOS 18 and macOS 15 with half-precision states, a manifest and the tokenizer.

    The package is converted, not run: Core ML itself is on Apple systems only. Layers whose cache grows are refused.

    [bold]Examples[/]

    bmojo-edge export coreml smollm2-w1024 --out smollm2-coreml

    bmojo-edge export coreml smollm2-w1024 --out smollm2-int4 --weights int4
    """
    _require("coremltools")
    from bmojo_convert.to_coreml import to_coreml

    with _exporting(model, out, json) as progress:
        to_coreml(model, out, weights=weights.value, overwrite=overwrite, progress=progress)


@app.command("mlxfn")
@clear_errors
def mlxfn(
    model: Model,
    out: Out,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Export to MLX functions for Swift and C++: one .mlxfn file with the weights, a manifest and the tokenizer.

    They run on the kind of device they are made on: for Apple's GPUs, iPhones' too, export on a Mac. The functions are
    run and compared with the model before the folder appears. Layers whose cache grows are refused.

    [bold]Examples[/]

    bmojo-edge export mlxfn smollm2-w1024 --out smollm2-mlxfn

    bmojo-edge chat smollm2-mlxfn
    """
    from bmojo_convert.to_mlxfn import to_mlxfn

    with _exporting(model, out, json) as progress:
        to_mlxfn(model, out, overwrite=overwrite, progress=progress)


def _report(out: Path, json: bool, begun: float) -> None:
    """What was written and what it took: a line a file, or one JSON object."""
    seconds, peak = time.perf_counter() - begun, _peak_memory()
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    if json:
        print(json_format.dumps({"path": str(out), "files": files, "seconds": seconds, "peak_memory": peak}))
        return
    for name, count in files.items():
        console.print(f"  {name:24} {size(count)}")
    console.print(f"[dim]{size(sum(files.values()))} in {seconds:.0f} s. Peak memory: {size(peak)}[/]")


def _peak_memory() -> int:
    """The most memory this process has held."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="ascii")) if status.exists() else None
    if found is not None:  # Linux's ru_maxrss starts at that of the process which started this one
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
