"""`bmojo-edge memory`: texts that a model reads once and recalls from the disk."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.models import open_model
from bmojo_edge.cli.terminal import console, progress_bar, size

if TYPE_CHECKING:
    from bmojo_edge.recall import WithStorage
    from bmojo_edge.storage import Source, Store

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Texts that a model reads once and recalls from the disk."
)

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A model folder or hub id; left out: the store's own, or a small real model."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


def opened(folder: Path, model: str | None, disk_gb: float | None = None, keeps: bool = True) -> WithStorage:
    """A model with the store in `folder`, which is made where `disk_gb` says how large it may get, 0 as by default."""
    from bmojo_edge.recall import WithStorage, shape_for
    from bmojo_edge.session_file import identity
    from bmojo_edge.storage import DISK_BYTES, Store
    from bmojo_edge.storage_files import is_store, read_head

    there = is_store(folder)
    if there and disk_gb:
        raise typer.BadParameter(f"--disk-gb: {folder} is there already and keeps its size")
    if there or disk_gb is None:
        made_by = read_head(folder)["model"].get("folder")
        if model is None and made_by and Path(made_by).is_dir():
            model = made_by
    lm: Any = open_model(model)
    if not hasattr(lm, "window_blocks"):
        raise typer.BadParameter("MODEL: an export has no storage; take the folder it was made from")
    if there:
        store = Store(folder, identity(lm))
    else:
        disk_bytes = DISK_BYTES if not disk_gb else int(disk_gb * 10**9)
        store = Store.create(folder, shape_for(lm.config), identity(lm), disk_bytes=disk_bytes)
    return WithStorage(lm, store, keeps=keeps)


@app.command("add")
@clear_errors
def add(
    folder: Folder,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Text, Markdown or PDF.")],
    model: Model = None,
    disk_gb: Annotated[
        float, typer.Option(min=0.0, max=1e5, metavar="GB", help="Of a new store: how large it may get; 0: 4.3 GB.")
    ] = 0.0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Read files into a store, which is made where there is none. A file of the same name takes the former's place.

    [bold]Examples[/]

    bmojo-edge memory add notes/ diary.md manual.pdf

    bmojo-edge chat --memory notes/
    """
    from bmojo_edge.documents import read_document

    texts = {str(path): read_document(path) for path in files}
    lm = opened(folder, model, disk_gb)
    with lm.store as store, progress_bar() as report:
        replaced = 0
        for name, text in texts.items():
            held = len(store) - store.next_id
            former = [source.branch for source in store.sources if source.kind == "file" and source.name == name]
            ids = lm.tokenizer.encode(text)
            lm.add_text(ids, name, lambda done, total, name=name: report(name, done, total))
            replaced += held - len(store) + store.next_id
            for branch in former:
                store.remove(branch)
        sources = [source for source in store.sources if source.name in texts]
        facts = {
            "store": str(folder), "bytes": store.nbytes, "replaced_blocks": replaced,
            "added": [source._asdict() for source in sources],
        }  # fmt: skip
    if json:
        print(json_format.dumps(facts, indent=2, ensure_ascii=False))
    else:
        tokens = sum(source.tokens for source in sources)
        console.print(f"{len(sources)} file(s), {tokens:,} tokens; the store has {size(facts['bytes'])}.")
        if replaced:
            console.print(f"[yellow]The store is full: its {replaced:,} oldest blocks made room.[/]")


@app.command("list")
@clear_errors
def list_sources(folder: Folder, json: Json = False, debug: Debug = False) -> None:
    """List what a store holds: number, kind, tokens, when it was added, name."""
    with _store(folder) as store:
        facts = {
            "store": str(folder), "bytes": store.nbytes, "blocks": len(store), "capacity": store.capacity,
            "sources": [source._asdict() for source in store.sources],
        }  # fmt: skip
        rows = store.sources
    if json:
        print(json_format.dumps(facts, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("number", "kind", "tokens", "added", "name", box=None, pad_edge=False)
    for source in rows:
        table.add_row(str(source.branch), source.kind, f"{source.tokens:,}", source.added[:16], escape(_name(source)))
    Console(highlight=False).print(table)
    console.print(
        f"[dim]{facts['blocks']:,} of at most {facts['capacity']:,} blocks, {size(facts['bytes'])}[/]", soft_wrap=True
    )


def _name(source: Source) -> str:
    left = f", from {source.parent} at {source.at:,}" if source.parent else ""
    return source.name + left + ("" if source.complete or source.kind == "session" else ", cut off while being added")


@app.command("search")
@clear_errors
def search(
    folder: Folder,
    text: Annotated[str, typer.Argument(help="A question or some words.")],
    model: Model = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many passages.")] = 8,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the passages that the model would recall for a text, best first."""
    lm = opened(folder, model)
    with lm.store as store:
        ids = lm.tokenizer.encode(text)
        if not ids:
            raise typer.BadParameter("TEXT: is empty")
        slots = lm.search(ids, count)
        names = {source.branch: source.name for source in store.sources}
        found = [
            {"source": names[int(branch)], "number": int(branch), "position": int(position[0]),
             "text": lm.tokenizer.decode(tokens)}
            for branch, position, tokens in zip(
                store.branches(slots), store.positions(slots), store.token_ids(slots), strict=True
            )
        ]  # fmt: skip
    if json:
        print(json_format.dumps(found, indent=2, ensure_ascii=False))
        return
    for passage in found:
        console.print(f"[dim]{escape(passage['source'])}, token {passage['position']:,}[/]", soft_wrap=True)
        print(" ".join(passage["text"].split()))


@app.command("rm")
@clear_errors
def remove(
    folder: Folder,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Numbers or names, as `list` has them.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove sources. Their room is used again; `compact` gives it back to the disk."""
    with _store(folder) as store:
        known = store.sources
        chosen = [[s for s in known if wanted in (str(s.branch), s.name)] for wanted in sources]
        for wanted, found in zip(sources, chosen, strict=True):
            if not found:
                raise typer.BadParameter(f"{wanted}: the store has no such source; `memory list {folder}` has them")
        branches = sorted({source.branch for found in chosen for source in found}, reverse=True)
        blocks = sum(store.remove(branch) for branch in branches)
    if json:
        print(json_format.dumps({"removed": branches, "blocks": blocks}))
    else:
        console.print(f"{len(branches)} source(s), {blocks:,} blocks removed.")


@app.command("verify")
@clear_errors
def verify(folder: Folder, json: Json = False, debug: Debug = False) -> None:
    """Read everything and compare checksums; exit code 1 where something is damaged."""
    with _store(folder) as store, console.status("Reading"):
        damaged, blocks = store.damaged(), len(store)
    if json:
        print(json_format.dumps({"blocks": blocks, "damaged": damaged}, indent=2))
    else:
        for line in damaged:
            console.print(f"[red]{escape(line)}[/]", soft_wrap=True)
        console.print(f"{blocks:,} blocks, {len(damaged)} damaged.")
    if damaged:
        raise typer.Exit(1)


@app.command("compact")
@clear_errors
def compact(folder: Folder, json: Json = False, debug: Debug = False) -> None:
    """Rewrite a store without what was removed or is damaged."""
    with _store(folder) as store, console.status("Writing"):
        before, after = store.compacted()
    if json:
        print(json_format.dumps({"bytes_before": before, "bytes_after": after}))
    else:
        console.print(f"{size(before)} before, {size(after)} now.")


def _store(folder: Path) -> Store:
    from bmojo_edge.storage import Store

    return Store(folder)
