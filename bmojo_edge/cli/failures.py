"""What a command does when it fails: one clear line and an exit code, a traceback only with --debug."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer

from bmojo_edge.cli.terminal import console

P = ParamSpec("P")
R = TypeVar("R")

Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]

# What to install where a package is missing. Everything else comes with bmojo-edge itself.
_INSTALL = {
    "mlx": "MLX runs on Apple silicon and on Linux: pip install mlx (Linux: pip install 'mlx[cpu]')",
    "torch": "pip install 'bmojo-edge[torch]'",
    "triton": "pip install 'bmojo-edge[cuda]'",
    "fastapi": "pip install 'bmojo-edge[serve]'",
    "uvicorn": "pip install 'bmojo-edge[serve]'",
    "lm_eval": "pip install 'bmojo-edge[eval]'",
    "datasets": "pip install 'bmojo-edge[data]'",
    "pyarrow": "pip install 'bmojo-edge[data]'",
    "zstandard": "pip install 'bmojo-edge[data]'",
    "usearch": "pip install 'bmojo-edge[memory]'",
    "pypdf": "pip install 'bmojo-edge[memory]'",
    "onnx": "pip install 'bmojo-edge[onnx]'",
    "onnxscript": "pip install 'bmojo-edge[onnx]'",
    "onnxruntime": "pip install 'bmojo-edge[onnx]'",
    "coremltools": "pip install 'bmojo-edge[coreml]'",
    "sklearn": "pip install 'bmojo-edge[coreml]'",
}


def clear_errors(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose errors are one line on stderr and exit code 1, or 2 where an option was misused."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except Exception as error:
            if kwargs.get("debug"):
                raise
            say_error(_explain(error))
            raise typer.Exit(1) from None

    return run


def say_error(message: str) -> None:
    """One line on stderr, in red where there are colours."""
    console.print(f"[bold red]error:[/] {_escaped(message)}", soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return f"the Python package {package!r} is not installed. {_INSTALL.get(package, f'pip install {package}')}"
    from bmojo_edge.tensors import CheckpointError

    # ValueErrors of ours name the field or argument; they and the system's errors speak for themselves.
    if isinstance(error, CheckpointError | ArithmeticError | OSError):
        return str(error)
    if isinstance(error, ValueError) and type(error).__module__.partition(".")[0].startswith("bmojo"):
        return str(error)
    return f"{type(error).__name__}: {error} (unexpected; --debug shows where)"
