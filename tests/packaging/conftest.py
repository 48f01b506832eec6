"""A small random model in a folder, for tests that run the package in a Python of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bmojo_edge import checkpoint
from bmojo_edge.config import Config
from bmojo_edge.parameters import parameter_shapes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random model of bytes with a chat template, at `path/to/model` in `tmp_path`."""
    files = tmp_path / "tokenizer"
    files.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(files / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    settings = {"chat_template": template, "eos_token": "<|im_end|>"}
    (files / "tokenizer_config.json").write_text(json.dumps(settings))

    config = Config.preset("tiny", vocab_size=288)
    rng = np.random.default_rng(0)
    weights = {
        name: np.ones(shape, np.float32) if name.endswith("norm.weight") else rng.normal(0, 0.05, shape)
        for name, shape in parameter_shapes(config).items()
    }
    folder = tmp_path / "path" / "to" / "model"
    checkpoint.save(folder, config, weights, tokenizer=files)
    return folder
