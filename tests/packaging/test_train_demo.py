"""`make train-demo`, from text to a model that talks like it: every command of it, in minutes on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bmojo_edge.dataset import Dataset
from bmojo_edge.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "data" / "shakespeare.txt"
BIN = Path(sys.executable).parent


def words(text: str) -> list[str]:
    """Words of a text, without the last, which may be cut off."""
    return re.findall(r"[A-Za-z']+", text)[:-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the demo leaves, and what it says."""
    out = tmp_path_factory.mktemp("demo")
    command = ["sh", str(ROOT / "scripts" / "train_demo.sh"), str(BIN), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_the_model_has_learnt_and_both_engines_agree(made: tuple[Path, str]) -> None:
    out, told = made
    log = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    losses = [record["valid_loss"] for record in log if "valid_loss" in record]
    data = Dataset.open(out / "data" / "val")
    counts = np.bincount(Dataset.open(out / "data" / "train").tokens, minlength=data.vocab_size) + 1
    by_frequency = float(-np.log(counts / counts.sum())[data.tokens].mean())
    assert by_frequency > 5.5  # what knowing how frequent each token is comes to
    assert losses[-1] < 4.5
    assert "recorded by torch" in told and "checked by  mlx" in told and "The same, but for rounding." in told


@pytest.mark.slow
def test_its_words_are_those_of_the_corpus(made: tuple[Path, str]) -> None:
    folder, known = made[0] / "model", set(words(CORPUS.read_text()))

    def share(text: str) -> float:
        found = words(text)
        assert len(found) > 20
        return float(np.mean([word in known for word in found]))

    command = [str(BIN / "bmojo-edge"), "generate", "--model", str(folder), "--prompt", "KING RICHARD III:", "--json"]
    texts = []
    for seed in ("1", "2", "3"):
        options = ["--max-tokens", "120", "--temp", "0.5", "--seed", seed]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        texts.append(json.loads(done.stdout)["text"])
    assert np.mean([share(text) for text in texts]) > 0.65, texts
    assert len(set(words(" ".join(texts)))) > 50  # it does not say the same word for ever
    chance = Tokenizer.load(folder).decode(np.random.default_rng(0).integers(259, 1024, 360).tolist())
    assert share(chance) < 0.4
