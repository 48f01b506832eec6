"""`bmojo-edge train`: train a model from a TOML file, and draw the curves of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.terminal import console, size

if TYPE_CHECKING:
    from bmojo_edge.run_log import Record

_EVERY = 10  # seconds between lines where there is no terminal to draw on


class _RunByDefault(TyperGroup):
    """`train CONFIG.toml` is `train run CONFIG.toml`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args and args[0] in self.commands else ["run", *args])

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Train a model, or draw the curves of runs. [bold]bmojo-edge train CONFIG.toml[/] is short for "
    "[bold]train run CONFIG.toml[/].",
    epilog="Options and examples: [bold]bmojo-edge train run --help[/]",
)


@app.command("run")
@clear_errors
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to train, and how (docs/training.md).")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field; may be given several times.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
    debug: Debug = False,
) -> None:
    """Train a model and write it to OUT/model; torchrun starts it on several GPUs and hosts.

    Every step is a line of OUT/log.jsonl; checkpoints are in OUT/checkpoints. A run that was stopped or killed goes on
    with --resume as if nothing had happened. Ctrl-C stops it.

    [bold]Examples[/]

    bmojo-edge train apps/train/bmojo.toml --set out=runs/first

    bmojo-edge train apps/train/bmojo.toml --set out=runs/first --resume

    torchrun --nproc-per-node 8 --no-python bmojo-edge train apps/train/bmojo.toml --set system.strategy=fsdp
    """
    from bmojo_edge.train_config import TrainConfig

    settings = TrainConfig.read(config, set_ or ())
    from bmojo_edge.torch.train import train

    with _Watch(settings.steps) as watch:
        folder = train(settings, resume, watch)
    if watch.leads:
        console.print(f"The model is in {escape(str(folder))}", soft_wrap=True)


@app.command("plot")
@clear_errors
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their log.jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to make: .png or .svg.")] = Path("curves.png"),
    debug: Debug = False,
) -> None:
    """Draw the loss, its validation, and the learning rate of runs over the tokens they have read.

    [bold]Examples[/]

    bmojo-edge train plot runs/bmojo runs/transformer --out curves.svg
    """
    if out.suffix not in (".png", ".svg"):
        raise typer.BadParameter(f"--out must end in .png or .svg, got {out.name}")
    from bmojo_edge.run_plot import plot as draw

    draw(runs, out)
    console.print(f"Drawn in {escape(str(out))}", soft_wrap=True)


class _Watch:
    """Shows the records of a run as they come: a live line on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None),
            TextColumn("{task.fields[told]}"), TextColumn("left"), TimeRemainingColumn(),
            console=console, expand=True, speed_estimate_period=300,
        )  # fmt: skip
        self._steps, self._task, self._said, self._valid = steps, None, -float("inf"), ""
        self.leads = False

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, record: Record) -> None:
        self.leads = True
        if "event" in record:
            self._begin(record)
        elif "valid_loss" in record:
            self._valid = f"  valid {record['valid_loss']:.4f}"
            if self._task is None or record["step"] == self._steps:
                console.print(f"step {record['step']:,}/{self._steps:,}{self._valid}", soft_wrap=True)
        else:
            self._tell(record)

    def _begin(self, record: Record) -> None:
        count = f"{record['processes']} processes, " if record["processes"] > 1 else ""
        console.print(
            f"{record['parameters']:,} parameters, {record['steps']:,} steps of {record['tokens_per_step']:,} tokens, "
            f"{count}{record['device']}, {record['precision']}"
            + (f"; resumed after step {record['at']:,}" if record["at"] else ""),
            soft_wrap=True,
        )
        if console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task("train", total=self._steps, completed=record["at"], told="")

    def _tell(self, record: Record) -> None:
        import time

        told = f"loss {record['loss']:.4f}{self._valid}  {record['tokens_per_s']:,.0f} tokens/s"
        told += f"  MFU {record['mfu']:.1%}" if record["mfu"] is not None else ""
        told += f"  {size(record['memory_bytes'])}" if record["memory_bytes"] is not None else ""
        now, last = time.monotonic(), record["step"] == self._steps
        if self._task is not None:
            self._bar.update(self._task, completed=record["step"], told=told)
        elif last or now - self._said >= _EVERY:
            self._said = now
            console.print(f"step {record['step']:,}/{self._steps:,}  {told}", soft_wrap=True)
