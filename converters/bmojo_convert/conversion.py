"""`convert`: any supported checkpoint to a folder of ours, streamed, checked, and named only when it is right."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from bmojo_convert import gguf, hf, ours
from bmojo_convert.memories import Memories, adapt
from bmojo_convert.names import ConvertError
from bmojo_convert.source import Source
from bmojo_edge import checkpoint, golden, hub
from bmojo_edge.checkpoint import CONFIG, GENERATION
from bmojo_edge.config import DTYPES, Config, ConfigError, Quantization
from bmojo_edge.golden import Golden
from bmojo_edge.quantize import dequantized
from bmojo_edge.tensors import PICKLES, SHARD_BYTES, Tensors, read_json, write_text

Progress = Callable[[str, int, int], None]


def default_dtype() -> str:
    """float16 on Apple silicon; float32 elsewhere, where it is the fastest MLX has."""
    return "float16" if sys.platform == "darwin" and platform.machine() == "arm64" else "float32"


def convert(
    source: str | Path,
    out: str | Path,
    *,
    window: int | None = None,
    sinks: int | None = None,
    fading: int | None = None,
    eidetic: int | None = None,
    chunk: int | None = None,
    dtype: str | None = None,
    q_bits: int | None = None,
    q_group_size: int = 64,
    revision: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint to a model folder of ours and return its path.

    source: a folder in the Hugging Face layout (ours, or of a model_type that docs/checkpoints.md lists), a GGUF file,
    a PyTorch file of ours, or a hub id, of which `revision` picks a version. window: tokens each attention layer sees
    verbatim; None keeps full attention. sinks (4 with a window), fading, eidetic, chunk: sizes of the other memories.
    dtype: float32, float16 or bfloat16; None is float16 on Apple silicon, float32 elsewhere. q_bits: 4 or 8 quantises
    in groups of `q_group_size` (32, 64, 128). overwrite: replace `out` if it is a model folder of ours. shard_bytes:
    larger weights are split. progress is called with (stage, done, total); stages are "download", "weights" and
    "golden".

    The folder appears under its name only when its logits pass the check against the source's; a conversion that is
    cut off leaves nothing behind that loads, and the next one cleans up. One tensor is in memory at a time.
    Raises ConvertError or CheckpointError naming the file, field, tensor or option.
    """
    memories = Memories(window, sinks, fading, eidetic, chunk)
    if dtype is not None and dtype not in DTYPES:
        raise ConvertError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if q_bits not in (None, 4, 8):
        raise ConvertError(f"q_bits: must be 4 or 8, got {q_bits!r}")
    try:
        quantization = None if q_bits is None else Quantization(q_group_size, q_bits)
    except ConfigError as error:
        raise ConvertError(f"q_group_size: {error}") from None
    out = Path(out)
    if out.exists():
        checkpoint.check_replaceable(out, overwrite)
    path = hub.locate(source, revision, progress)
    if out.exists() and os.path.samefile(out, path):
        raise ConvertError(f"{out}: is the source itself; choose another folder")
    model = _open(path)
    config = adapt(model.config, memories, str(path))
    config = config.replace(dtype=dtype or default_dtype(), quantization=quantization)
    with checkpoint.staged_checkpoint(out, overwrite) as folder:
        checkpoint.write_weights(folder, config, model.weights, shard_bytes, progress)
        _write_files(folder, model)
        _report(progress, "golden", 0, 1)
        golden.write(folder, _checked(folder, config, _golden(model, config), out))
        _report(progress, "golden", 1, 1)
        checkpoint.write_config(folder, config)
    return out


def _report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)


def _open(path: Path) -> Source:
    """The reader that fits a file's ending or a folder's model_type."""
    if path.is_dir():
        if not (path / CONFIG).is_file():
            found = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it holds GGUF files, give one of them, such as {found[0]}" if found else ""
            raise ConvertError(f"{path / CONFIG}: file is missing{hint}")
        kind = read_json(path / CONFIG).get("model_type")
        return ours.open_folder(path) if kind == "bmojo" else hf.open_folder(path)
    if path.suffix == ".gguf":
        return gguf.open_file(path)
    if path.suffix == ".pt":
        return ours.open_file(path)
    if path.suffix in PICKLES:
        raise ConvertError(f"{path}: pickled weights can run code when opened and are refused; give safetensors")
    raise ConvertError(f"{path}: is neither a folder nor a .gguf or .pt file")


def _write_files(folder: Path, model: Source) -> None:
    for name, content in model.files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            write_text(folder / name, content)
    if model.generation:
        write_text(folder / GENERATION, json.dumps(model.generation, indent=2) + "\n")


def _golden(model: Source, config: Config) -> Golden:
    """What the product must give: the source's own library says, or the oracle on the source's weights.

    Where the library says, the oracle must agree: that checks names, layouts and config before rounding blurs them.
    """
    tokens = golden.tokens_for(config.vocab_size)
    if model.logits is not None:
        said = Golden(tokens, model.logits(tokens), f"{model.author}, float32")
        before = model.config.replace(dtype="float32")
        ours_says = golden.oracle_logits(before, model.weights, tokens)
        golden.compare(ours_says, said.logits, golden.conversion_bound(before), str(model.path), said.author)
        if "bmojo" not in config.layer_types or config.window >= len(tokens):  # memories that leave these as they were
            return said
    after = config.replace(dtype="float32", quantization=None)
    logits = golden.oracle_logits(after, model.weights, tokens)
    return Golden(tokens, logits, "bmojo_edge.reference, float32, on the source's weights")


def _checked(folder: Path, config: Config, expected: Golden, out: Path) -> Golden:
    """Golden logits that the stored weights, read back, give up to the rounding of their dtype and quantisation."""
    tensors = Tensors.open(folder)
    checkpoint.validate(config, tensors, folder)
    logits = golden.oracle_logits(config, dequantized(tensors, config.quantization), expected.tokens)
    golden.compare(logits, expected.logits, golden.conversion_bound(config), str(out), expected.author)
    return expected if config.quantization is None else expected._replace(quantized_logits=logits)
