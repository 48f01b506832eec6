"""The Hugging Face hub: a repository's weights, configuration and tokenizer as a local folder."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from bmojo_convert.names import ConvertError
from bmojo_edge.checkpoint import CONFIG, GENERATION, TOKENIZER_FILES, Progress
from bmojo_edge.golden import FILE as GOLDEN
from bmojo_edge.tensors import INDEX

_WANTED = ["model*.safetensors", INDEX, GOLDEN, CONFIG, GENERATION, *TOKENIZER_FILES]


def is_hub_id(source: str) -> bool:
    """Whether a string looks like owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None


def download(repo: str, revision: str | None, progress: Progress | None) -> Path:
    """The local copy of a repository, fetched where it is not complete; reports ("download", bytes, bytes in all).

    Raises ConvertError where the hub does not give it.
    """
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
        raise ConvertError(f"{repo}: no such file or folder here, and the hub does not give it ({reason})") from error
    return Path(path)
