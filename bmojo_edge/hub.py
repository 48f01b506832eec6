"""Where a model is: a path on this machine, or a repository of the Hugging Face hub brought to it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from bmojo_edge.checkpoint import CONFIG, GENERATION, TOKENIZER_FILES, Progress
from bmojo_edge.golden import FILE as GOLDEN
from bmojo_edge.tensors import INDEX, CheckpointError

_WANTED = ["model*.safetensors", INDEX, GOLDEN, CONFIG, GENERATION, *TOKENIZER_FILES]


def locate(source: str | Path, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The path of a file or folder that exists, else the local copy of the hub repository `source` names.

    progress is called with ("download", bytes, bytes in all). Raises CheckpointError where there is neither.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and is_hub_id(source):
        return download(source, revision, progress)
    raise CheckpointError(f"{source}: no such file or folder, and no hub id of the form owner/name")


def is_hub_id(source: str) -> bool:
    """Whether a string looks like owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None


def download(repo: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The local copy of a repository's safetensors, JSON and tokenizer files, fetched where it is not complete."""
    import huggingface_hub
    from tqdm.auto import tqdm

    class Bar(tqdm):
        """Draws nothing; the bar that counts bytes reports to the caller."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **kwargs: Any) -> None:
            if progress is not None and self.unit == "B" and self.total:
                progress("download", int(self.n), int(self.total))

    try:
        path = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_WANTED, tqdm_class=Bar)
    except (OSError, ValueError) as error:  # the hub's own errors are among these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{repo}: no such file or folder here, and the hub does not give it ({reason})"
        ) from error
    return Path(path)
