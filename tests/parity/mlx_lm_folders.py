"""Model folders that tests give to mlx-lm, and fresh processes in which it runs, with bmojo_edge or without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bmojo_edge as be
from bmojo_edge import checkpoint
from bmojo_edge.config import Config, Quantization
from tests.helpers import odd, random_weights
from tests.unit.tokenizer_folders import byte_level

PROMPT = "A zebra quickly jumped over 1234 boxes; naïve café? The river runs to the sea."
TOKENS = 16
WIDE: dict[str, Any] = {
    "vocab_size": 420, "d_model": 64, "d_ff": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "norm_eps": 1e-5,
    "ssm": {"kind": "mamba", "d_state": 5, "d_conv": 4, "expand": 2, "dt_rank": 3},
}  # fmt: skip
MODELS = {
    "bmojo": odd(**WIDE),
    "windowed": odd(**{**WIDE, "ssm": None}),
    "sliding": odd("attention", "attention", **{**WIDE, "ssm": None}, attention_window=9),
    "mamba": odd("mamba", "mamba", **WIDE, rope_theta=None),
    "full": odd("attention", "attention", **{**WIDE, "ssm": None}, attention_bias=True, qk_norm=True),
    "mixed": odd("bmojo", "attention", "mamba", **WIDE, experts={"n": 4, "per_token": 2, "layers": [1]}),
    "untied": odd(**WIDE, tie_kv=False, qk_norm=True, innovation={"signal": "input", "error": "l2", "taps": 2}),
}
# What runs with bmojo_edge alone, beside full attention too.
ENGINE_ONLY = {
    "mamba2": odd("mamba2", "bmojo", **{**WIDE, "ssm": {"kind": "mamba2", "head_dim": 16, "d_state": 8}}),
    "gdn hybrid": odd("gdn", "attention", "gdn", **{**WIDE, "ssm": {"kind": "gdn"}}),
    "gka hybrid": odd("attention", "gka", **{**WIDE, "ssm": {"kind": "gka", "num_iter": 6}}),
}
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("bmojo_edge", "bmojo_metal", "bmojo_cuda", "bmojo_convert"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""
VERB = "import sys; sys.argv = sys.argv[1:]; from importlib import import_module; import_module(sys.argv[0]).main()"


class Folders:
    """Tiny models by name, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self._made = root, dict[tuple[str, int | None], Path]()

    def __call__(self, name: str, bits: int | None = None) -> Path:
        """The folder of a model, its matrices packed in so many bits."""
        if (name, bits) not in self._made:
            rule = None if bits is None else Quantization(group_size=32, bits=bits)
            folder = self.root / f"{name}-{bits}"
            config = {**MODELS, **ENGINE_ONLY}[name]
            self._made[name, bits] = save(folder, config.replace(quantization=rule))
        return self._made[name, bits]


def save(folder: Path, config: Config, seed: int = 0) -> Path:
    """A model folder with random weights and a tokenizer."""
    tokenizer = folder.parent / f"{folder.name}-tokenizer"
    tokenizer.mkdir(parents=True)
    checkpoint.save(folder, config, random_weights(config, seed), byte_level(tokenizer))
    return folder


def expected(folder: Path, prompt: str = PROMPT, n: int = TOKENS) -> list[int]:
    """Greedy tokens of bmojo_edge itself."""
    return [token.id for token in be.stream(be.load(folder), prompt, max_tokens=n)]


def environment() -> dict[str, str]:
    """That of this process, with this checkout's packages on Python's path."""
    roots = [*(p for p in sys.path if p), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "MLX_DISABLE_COMPILE": "1", "HF_HUB_OFFLINE": "1"}


def run(code: str, *args: Any) -> subprocess.CompletedProcess[str]:
    """A fresh Python that runs `code`."""
    return _run([sys.executable, "-W", "ignore", "-c", code, *map(str, args)])


def verb(name: str, *args: Any, blocked: bool = False, text: str = "") -> subprocess.CompletedProcess[str]:
    """One of mlx-lm's commands; blocked: bmojo_edge cannot be imported there; text: what it reads from its input."""
    return _run(command(name, *args, blocked=blocked), text)


def command(name: str, *args: Any, blocked: bool = False) -> list[str]:
    """The command line of one of mlx-lm's commands."""
    start = ["-c", BLOCKED + VERB, f"mlx_lm.{name}"] if blocked else ["-m", "mlx_lm", name]
    return [sys.executable, "-W", "ignore", *start, *map(str, args)]


def _run(line: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, env=environment(), input=text, capture_output=True, text=True, timeout=300, check=False)
