"""`bmojo-edge generate`: continue a prompt."""

from __future__ import annotations

import json as json_format
import time
from typing import Annotated, Any

import typer

from bmojo_edge.cli import options
from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.models import open_model
from bmojo_edge.cli.terminal import console, read_stdin, write


@clear_errors
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue; - reads it from stdin.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model folder or hub id; left out: the default model.")
    ] = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message, through the model's chat template.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, tokens, logprobs, finish_reason, counts.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt, as be.generate does. The answer goes to stdout, everything else to stderr.

    [bold]Examples[/]

    bmojo-edge generate --model DIR --prompt "Once upon a time" --max-tokens 100 --temp 0.8

    bmojo-edge generate --model DIR --prompt "Name three rivers." --chat --json

    cat story.txt | bmojo-edge generate --model DIR --prompt - --stop "THE END"
    """
    sampling = options.chosen(max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop)
    text = read_stdin() if prompt == "-" else prompt
    lm = open_model(model)
    from bmojo_edge.generate import prompt_ids, stream

    ids = prompt_ids(lm, [{"role": "user", "content": text}] if chat else text)
    tokens = stream(lm, ids, **sampling)
    result: dict[str, Any] = {"text": "", "tokens": [], "logprobs": [], "finish_reason": "length"}
    times = [time.perf_counter()]
    for token in tokens:
        times.append(time.perf_counter())
        result["text"] += token.text
        result["tokens"].append(token.id)
        result["logprobs"].append(token.logprob)
        result["finish_reason"] = token.finish_reason
        if not json:
            write(token.text)
    result |= {"prompt_tokens": len(ids), "completion_tokens": len(result["tokens"])}
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
        return
    write("\n")
    speed = f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s" if len(times) > 2 else ""
    console.print(f"[dim]{len(ids)} tokens read, {len(times) - 1} written{speed}[/]")
