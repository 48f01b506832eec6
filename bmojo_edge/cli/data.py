"""`bmojo-edge data prepare`: text into the memory-mapped tokens that training reads."""

from __future__ import annotations

import json as json_format
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.terminal import console, progress_bar

if TYPE_CHECKING:
    from bmojo_edge.prepare import Prepared

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Prepare text for training.")

_TOKENS = "Tokens"


@app.command("prepare")
@clear_errors
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Text files, JSONL (each also .gz, .xz or .zst), Parquet, folders of these, a data set saved by the "
            "datasets library, or its hub id.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A tokenizer.json, a tokenizer.model, or a folder with one of them.", rich_help_panel=_TOKENS
        ),
    ] = None,
    train_vocab: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Learn a SentencePiece vocabulary of N pieces here.", rich_help_panel=_TOKENS
        ),
    ] = None,
    eos: Annotated[
        bool | None,
        typer.Option(
            "--eos/--no-eos",
            help="End every document with the tokenizer's end-of-sequence token; left out: where it has one.",
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    text_key: Annotated[str, typer.Option(help="The field or column that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="The split to read of a data set.")] = "train",
    val: Annotated[
        float,
        typer.Option(metavar="FRACTION", help="Put this share of the documents into OUT/val, the rest into OUT/train."),
    ] = 0.0,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes; left out: one for each core.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad lines out and count them, instead of stopping.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder of prepared data.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Cut text into tokens for training. The result depends on sources and options, not on --jobs.

    [bold]Examples[/]

    bmojo-edge data prepare books.jsonl.xz --out books --train-vocab 8192 --val 0.01

    bmojo-edge data prepare texts/ more.parquet --out mixed --tokenizer smollm2 --text-key content

    bmojo-edge data prepare owner/dataset --out web --tokenizer smollm2/tokenizer.json
    """
    if (tokenizer is None) == (train_vocab is None):
        raise typer.BadParameter("give either --tokenizer or --train-vocab")
    if not 0 <= val < 1:
        raise typer.BadParameter(f"--val must be at least 0 and below 1, got {val}")
    from bmojo_edge.prepare import Settings, prepare

    settings = Settings(text_key, train_vocab, eos, val, split, skip_bad)
    with progress_bar() as progress:
        made = prepare(sources, out, settings, tokenizer, jobs or os.cpu_count() or 1, overwrite, progress)
    if json:
        print(json_format.dumps(as_json(made), indent=2, ensure_ascii=False))
    else:
        tell(made)


def as_json(made: Prepared) -> dict[str, Any]:
    """What was made, as plain values."""
    total = sum(made.n_tokens.values())
    parts = {
        part or "all": {"folder": str(folder), "n_tokens": made.n_tokens[part], "n_documents": made.n_documents[part]}
        for part, folder in made.folders.items()
    }
    return {
        "parts": parts,
        "vocab_size": made.vocab_size,
        "empty_documents": made.empty_documents,
        "bad_lines": made.bad_lines,
        "first_bad_lines": made.first_bad,
        "files_passed_over": made.passed_over,
        "seconds": round(made.seconds, 3),
        "tokens_per_s": round(total / max(made.seconds, 1e-9)),
    }


def tell(made: Prepared) -> None:
    """What was made, on stdout; what was left out, on stderr."""
    for part, folder in made.folders.items():
        n = made.n_documents[part]
        print(f"{folder}: {made.n_tokens[part]:,} tokens, {n:,} document{'s' * (n > 1)}")
    speed = sum(made.n_tokens.values()) / max(made.seconds, 1e-9)
    print(f"vocabulary of {made.vocab_size:,}, {speed:,.0f} tokens/s")
    if made.empty_documents:
        console.print(f"{made.empty_documents:,} empty documents left out")
    if made.bad_lines:
        console.print(f"[yellow]{made.bad_lines:,} bad lines left out, such as:[/]")
        for reason in made.first_bad:
            console.print(escape(reason), soft_wrap=True)
    if made.passed_over:
        console.print(
            f"{len(made.passed_over):,} files of other kinds passed over, such as {escape(made.passed_over[0])}"
        )
