"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bmojo_edge.generate import Options

_SAMPLING = "Sampling"

_TEMPERATURE = {"min": 0.0, "rich_help_panel": _SAMPLING}

Temperature = Annotated[float, typer.Option("--temp", help="Temperature; 0 is greedy.", **_TEMPERATURE)]
ChatTemperature = Annotated[
    float | None, typer.Option("--temp", help="Temperature; left out: 0.6, greedy with --prompt.", **_TEMPERATURE)
]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this mass.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[
    int, typer.Option(min=0, help="Keep this many of the likeliest tokens; 0: all.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the likeliest.", rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, tokens already seen become less likely.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes the draws repeatable.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End before this text; may be given several times.", rich_help_panel=_SAMPLING),
]
MaxTokens = Annotated[int, typer.Option(min=0, help="The longest an answer may be, in tokens.")]


def chosen(
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None = None,
) -> Options:
    """The options as `stream` takes them; a misused one ends the program with code 2, before a model is loaded."""
    from bmojo_edge.sampling import Sampling, SamplingError
    from bmojo_edge.stopping import StopStrings

    try:
        Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty)
    except SamplingError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        StopStrings(stop or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
    }
