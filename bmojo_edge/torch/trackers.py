"""TensorBoard and Weights & Biases, where a run asks for them; log.jsonl is written without either."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmojo_edge.checks import fail
from bmojo_edge.run_log import Record
from bmojo_edge.train_config import TrainConfig

Tracker = Callable[[Record], None]


def _require(package: str, field: str) -> None:
    if importlib.util.find_spec(package) is None:
        fail(field, f"the Python package {package!r} is not installed: pip install {package}")


def check(settings: TrainConfig) -> None:
    """Raise ConfigError naming the field that asks for a package that is missing."""
    if settings.log.tensorboard:
        _require("tensorboard", "log.tensorboard")
    if settings.log.wandb is not None:
        _require("wandb", "log.wandb")


def numbers(record: Record) -> dict[str, float]:
    """What of a record can be drawn."""
    return {key: x for key, x in record.items() if key != "step" and isinstance(x, int | float)}


def open_trackers(settings: TrainConfig) -> tuple[list[Tracker], list[Callable[[], Any]]]:
    """What to call with every record that has a step, and what to call at the end."""
    trackers: list[Tracker] = []
    closers: list[Callable[[], Any]] = []
    if settings.log.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(Path(settings.out) / "tensorboard"))

        def to_tensorboard(record: Record) -> None:
            for name, x in numbers(record).items():
                writer.add_scalar(name, x, record["step"])

        trackers.append(to_tensorboard)
        closers.append(writer.close)
    if settings.log.wandb is not None:
        import wandb  # pyright: ignore[reportMissingImports]

        name = Path(settings.out).name
        run = wandb.init(project=settings.log.wandb, name=name, id=name, resume="allow", config=settings.to_dict())
        trackers.append(lambda record: run.log(numbers(record), step=record["step"]))
        closers.append(run.finish)
    return trackers, closers
