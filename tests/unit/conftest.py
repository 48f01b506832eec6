"""Tokenizer folders, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit import tokenizer_folders


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folders.byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folders.sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def metaspace_folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_folder: Path) -> Path:
    return tokenizer_folders.metaspace_json(tmp_path_factory.mktemp("metaspace"), sentencepiece_folder)
