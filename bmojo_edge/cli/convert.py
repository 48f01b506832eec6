"""`bmojo-edge convert`: a published checkpoint into a model folder of ours."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.info import describe, print_facts
from bmojo_edge.cli.terminal import console, progress_bar

_MEMORIES = "Memories (left out: the source's own)"
_QUANTIZATION = "Quantisation"


class Dtype(StrEnum):
    """What weights can be stored as."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Bits(StrEnum):
    """What weights can be quantised to."""

    four = "4"
    eight = "8"


class GroupSize(StrEnum):
    """How many weights can share a scale."""

    g32 = "32"
    g64 = "64"
    g128 = "128"


@clear_errors
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A Hugging Face folder or hub id, a GGUF file, or a model of ours (a folder or .pt)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens each layer keeps verbatim.", rich_help_panel=_MEMORIES)
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(min=0, help="First tokens kept for ever; 4 where a window is given.", rich_help_panel=_MEMORIES),
    ] = None,
    fading: Annotated[
        int | None, typer.Option(min=0, help="Slots of fading memory, with an SSM.", rich_help_panel=_MEMORIES)
    ] = None,
    eidetic: Annotated[
        int | None, typer.Option(min=0, help="Slots for surprising old tokens.", rich_help_panel=_MEMORIES)
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens between choices of eidetic tokens.", rich_help_panel=_MEMORIES)
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Left out: float16 on Apple silicon, float32 elsewhere.")] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Quantise to --q-bits.", rich_help_panel=_QUANTIZATION)
    ] = False,
    q_bits: Annotated[
        Bits | None, typer.Option(help="Bits a weight; 4 where only -q is given.", rich_help_panel=_QUANTIZATION)
    ] = None,
    q_group_size: Annotated[
        GroupSize | None, typer.Option(help="Weights that share a scale; 64.", rich_help_panel=_QUANTIZATION)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder of ours.")] = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to a model folder of ours, checked against the source's logits before it appears.

    With --window a Transformer becomes one that runs in constant memory.

    [bold]Examples[/]

    bmojo-edge convert HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2 --window 1024 --sinks 4

    bmojo-edge convert llama.gguf --out llama --dtype bfloat16

    bmojo-edge convert qwen3-folder --out qwen3-4bit -q --q-bits 4
    """
    if (q_bits or q_group_size) and not quantize:
        given = "--q-bits" if q_bits else "--q-group-size"
        raise typer.BadParameter(f"{given} does nothing without -q")
    from bmojo_convert import convert as run

    console.print(f"Converting {escape(source)} to {escape(str(out))}", soft_wrap=True)
    with progress_bar() as progress:
        made = run(
            source,
            out,
            window=window,
            sinks=sinks,
            fading=fading,
            eidetic=eidetic,
            chunk=chunk,
            dtype=dtype and dtype.value,
            q_bits=int(q_bits or 4) if quantize else None,
            q_group_size=int(q_group_size or 64),
            overwrite=overwrite,
            progress=progress,
        )
    print_facts(describe(made))
