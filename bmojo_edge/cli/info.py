"""`bmojo-edge info`: what a model folder holds and what it costs to run."""

from __future__ import annotations

import itertools
import json as json_format
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.terminal import size


@clear_errors
def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder of ours.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Tell what a model folder holds: layers, parameters, bytes of weights, and bytes of state, for ever.

    [bold]Examples[/]

    bmojo-edge info DIR

    bmojo-edge info DIR --json
    """
    facts = describe(folder)
    if json:
        print(json_format.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print_facts(facts)


def describe(folder: Path) -> dict[str, Any]:
    """The facts of a model folder. Raises CheckpointError naming what is wrong with it."""
    import numpy as np

    from bmojo_edge import checkpoint
    from bmojo_edge.parameters import parameter_count
    from bmojo_edge.special_cases import special_case
    from bmojo_edge.state import GROWTH

    config, weights = checkpoint.read(folder)
    stored = [weights.info(name) for name in weights]
    quantization = config.quantization
    return {
        "path": str(folder),
        "special_case": special_case(config),
        "layers": len(config.layer_types),
        "layer_types": list(config.layer_types),
        "parameters": parameter_count(config),
        "weight_bytes": sum(math.prod(info.shape) * np.dtype(info.dtype).itemsize for info in stored),
        "dtype": config.dtype,
        "quantization": None
        if quantization is None
        else {"bits": quantization.bits, "group_size": quantization.group_size},
        "experts": None
        if config.experts is None
        else {"n": config.experts.n, "per_token": config.experts.per_token, "layers": list(config.experts.layers)},
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "window": config.window,
        "n_fading": config.n_fading,
        "n_eidetic": config.n_eidetic,
        "n_sinks": config.n_sinks,
        "state_bytes": config.state_bytes(),
        "growing_layers": list(config.growing_layers),
        "state_bytes_per_1k_tokens": (config.state_bytes(tokens=4 * GROWTH) - config.state_bytes())
        * 1000
        // (4 * GROWTH),
    }


def ranges(numbers: list[int]) -> str:
    """Ascending numbers in words, runs of three and more as first-last: "0, 2-5, 9"."""
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        parts += [f"{found[0]}-{found[-1]}"] if len(found) > 2 else map(str, found)
    return ", ".join(parts)


def print_facts(facts: dict[str, Any]) -> None:
    """The facts as a table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    quantized = facts["quantization"]
    stored = facts["dtype"] + (
        f", {quantized['bits']} bits in groups of {quantized['group_size']}" if quantized else ""
    )
    growing = len(facts["growing_layers"])
    state = f"{size(facts['state_bytes'])} ({facts['state_bytes']:,} bytes), for ever"
    if growing:
        more = f"{size(facts['state_bytes_per_1k_tokens'])} for every 1,000 tokens"
        which = f"layer{'s' * (growing > 1)} {ranges(facts['growing_layers'])}"
        state += f", and {more}: {growing} of {facts['layers']} layers attend to everything ({which})"
    experts = facts["experts"]
    memories = [f"window {facts['window']:,}"] if "bmojo" in facts["layer_types"] else []
    names = {"n_fading": "fading", "n_eidetic": "eidetic", "n_sinks": "sinks"}
    memories += [f"{name} {facts[key]:,}" for key, name in names.items() if memories and facts[key]]
    for label, value in (
        ("model", facts["path"]),
        ("is a", facts["special_case"]),
        ("layers", f"{facts['layers']}, {facts['d_model']:,} wide"),
        ("memories", ", ".join(memories)),
        (
            "experts",
            experts and f"{experts['n']}, {experts['per_token']} a token, in layers {ranges(experts['layers'])}",
        ),
        ("vocabulary", f"{facts['vocab_size']:,} tokens"),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", f"{size(facts['weight_bytes'])} ({facts['weight_bytes']:,} bytes), {stored}"),
        ("state", state),
    ):
        if value:
            table.add_row(label, escape(value))
    Console(highlight=False).print(table)
