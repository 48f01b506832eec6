"""mlx-lm's command lines on our folders, each in a process of its own: the tokens of `bmojo-edge generate`."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.perplexity import load_data
from mlx_lm.utils import load_tokenizer

import bmojo_edge as be
from bmojo_edge import checkpoint, mlx_lm_plugin, reference
from bmojo_edge.config import Quantization
from tests.parity.mlx_lm_folders import PROMPT, TOKENS, Folders, command, environment, expected, run, verb

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

TRUST = "--trust-remote-code"
KINDS = [("bmojo", None), ("windowed", 4), ("sliding", None), ("mamba", None), ("full", None), ("mixed", None)]
OWN = pytest.mark.parametrize("blocked", [False, True], ids=["with bmojo_edge", "without"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


def answer(folder: Path, prompt: str, n: int = TOKENS) -> str:
    return be.generate(be.load(folder), prompt, max_tokens=n)


@OWN
@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_generate(folders: Folders, name: str, bits: int | None, blocked: bool) -> None:
    folder = folders(name, bits)
    text = ["--prompt", PROMPT, "--max-tokens", TOKENS, "--temp", 0, "--ignore-chat-template", "--verbose", False]
    done = verb("generate", "--model", folder, TRUST, *text, blocked=blocked)
    assert done.returncode == 0 and done.stdout.strip() == answer(folder, PROMPT).strip(), done.stderr


def test_generate_beside_full_attention_with_other_mixers(folders: Folders) -> None:
    """With bmojo_edge; without it the message says what to install."""
    folder = folders("gdn hybrid")
    text = ["--prompt", PROMPT, "--max-tokens", TOKENS, "--temp", 0, "--ignore-chat-template", "--verbose", False]
    done = verb("generate", "--model", folder, TRUST, *text)
    assert done.returncode == 0 and done.stdout.strip() == answer(folder, PROMPT).strip(), done.stderr
    done = verb("generate", "--model", folder, TRUST, *text, blocked=True)
    assert done.returncode != 0 and "gdn layers need bmojo_edge: pip install bmojo-edge" in done.stderr


def test_generate_refuses_a_folder_it_was_not_told_to_trust(folders: Folders) -> None:
    done = verb("generate", "--model", folders("mamba"), "--prompt", "Hello")
    assert done.returncode != 0 and "trust_remote_code" in done.stderr


@OWN
def test_cached_prompts(folders: Folders, tmp_path: Path, blocked: bool) -> None:
    folder, cached = folders("bmojo"), tmp_path / "p.safetensors"
    head, rest = PROMPT[:40], PROMPT[40:]
    done = verb(
        "cache_prompt", "--model", folder, "--prompt", head, "--prompt-cache-file", cached, TRUST, blocked=blocked
    )
    assert done.returncode == 0, done.stderr
    # The cached prompt is a user's turn that goes on; what is asked later ends it.
    lm = be.load(folder)
    begun, ended = (lm.tokenizer.render_chat([{"role": "user", "content": part}]) for part in (head, rest))
    before, after = begun[: begun.index(head) + len(head)], ended[ended.index(rest) :]
    ids = [lm.tokenizer.encode(part, add_special_tokens=False) for part in (before, after)]
    assert load_prompt_cache(str(cached))[0][0].item() == len(ids[0])
    want = "".join(token.text for token in be.stream(lm, [*ids[0], *ids[1]], max_tokens=TOKENS))
    told = ["--prompt", rest, "--prompt-cache-file", cached, "--max-tokens", TOKENS, "--temp", 0, "--verbose", False]
    done = verb("generate", "--model", folder, TRUST, *told, blocked=blocked)
    assert done.returncode == 0 and done.stdout.strip() == want.strip() != "", done.stderr


@OWN
def test_convert_packs_what_we_pack(folders: Folders, tmp_path: Path, blocked: bool) -> None:
    packed = tmp_path / "packed"
    told = ["--hf-path", folders("bmojo"), "--mlx-path", packed, "-q", "--q-group-size", 32, TRUST]
    done = verb("convert", *told, blocked=blocked)
    assert done.returncode == 0, done.stderr
    assert (packed / mlx_lm_plugin.MODEL_FILE).read_bytes() == mlx_lm_plugin.SOURCE.read_bytes()
    _, ours = checkpoint.read(folders("bmojo", 4))
    config, theirs = checkpoint.read(packed)
    assert set(ours) == set(theirs) and config.quantization == Quantization(group_size=32, bits=4)
    assert expected(packed) == expected(folders("bmojo", 4))


@OWN
@pytest.mark.parametrize("name", ["bmojo", "mixed"])
def test_chat(folders: Folders, name: str, blocked: bool) -> None:
    """The first answer of a conversation is ours to the same template; a second turn goes on from there."""
    folder, question = folders(name), "Hello, how are you?"
    lm = be.load(folder)
    ids = lm.tokenizer.chat([{"role": "user", "content": question}])
    want = "".join(token.text for token in be.stream(lm, ids, max_tokens=TOKENS))
    said = f"{question}\n{PROMPT}\nq\n"
    done = verb("chat", "--model", folder, TRUST, "--max-tokens", TOKENS, text=said, blocked=blocked)
    assert done.returncode == 0 and want.strip() and want.strip() in done.stdout, (done.stdout, want, done.stderr)


@OWN
@pytest.mark.parametrize("name", ["bmojo", "full"])
def test_perplexity(folders: Folders, tmp_path: Path, name: str, blocked: bool) -> None:
    """That of the oracle over the same tokens."""
    folder, length = folders(name), 24
    lines = [{"text": PROMPT[i:] + PROMPT[:i]} for i in range(0, 60, 5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = ["--data-path", tmp_path, "--sequence-length", length, "--num-samples", 4, "--batch-size", 3, "--seed", 7]
    done = verb("perplexity", "--model", folder, TRUST, *told, blocked=blocked)
    assert done.returncode == 0, done.stderr
    np.random.seed(7)  # the tool draws its lines with NumPy's global generator
    tokens = np.array(load_data(load_tokenizer(folder), str(tmp_path), 4, length))
    config, weights = checkpoint.read(folder)
    logits = reference.forward(config, weights, tokens[:, :-1])[0]
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    want = math.exp(-np.take_along_axis(logprobs, tokens[:, 1:, None], -1).mean())
    found = re.search(r"Perplexity: ([\d.]+)", done.stdout)
    assert found is not None and float(found[1]) == pytest.approx(want, rel=1e-4)


@contextmanager
def serving(folder: Path, log: Path, blocked: bool) -> Iterator[httpx.Client]:
    """A client of `mlx_lm.server` over a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = command("server", "--model", folder, TRUST, "--port", port, "--log-level", "INFO", blocked=blocked)
    with log.open("w") as file, subprocess.Popen(line, env=environment(), stdout=file, stderr=file) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                for _ in range(600):
                    assert server.poll() is None, log.read_text()
                    try:
                        client.get("/health")
                        break
                    except httpx.TransportError:
                        time.sleep(0.1)
                yield client
        finally:
            server.terminate()


@OWN
@pytest.mark.parametrize("name", ["bmojo", "windowed", "mamba", "full", "mixed"])
def test_server_gives_a_batch_what_it_gives_alone(folders: Folders, tmp_path: Path, name: str, blocked: bool) -> None:
    folder = folders(name)
    prompts = [PROMPT, "Hello", PROMPT[::-1], "naïve café", PROMPT[20:50], PROMPT]
    lengths = [TOKENS, 24, 9, TOKENS, 12, 20]
    want = [expected(folder, prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]

    def ask(client: httpx.Client, prompt: str, n: int) -> list[int]:
        asked = {"prompt": prompt, "max_tokens": n, "temperature": 0, "logprobs": True}
        found: Any = client.post("/v1/completions", json=asked).raise_for_status().json()["choices"][0]
        return [token["id"] for token in found["logprobs"]["content"]]

    with serving(folder, tmp_path / "log", blocked) as client, ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda pair: ask(client, *pair), zip(prompts, lengths, strict=True)))
        alone = ask(client, PROMPT, TOKENS)
    eos = be.load(folder).tokenizer.eos_ids
    for got, ref in zip([*together, alone], [*want, want[0]], strict=True):
        assert [i for i in got if i not in eos] == [i for i in ref if i not in eos]


def test_bmojo_edge_may_be_imported_before_mlx_lm_or_after(folders: Folders) -> None:
    """Then no trust is needed, and it is bmojo_edge's model that answers."""
    code = """
import sys, {}
from mlx_lm.generate import generate_step
model, tokenizer = mlx_lm.load(sys.argv[1])
ids = mlx_lm.generate.__globals__["mx"].array(tokenizer.encode(sys.argv[2]))
print(type(model).__module__, [int(token) for token, _ in generate_step(ids, model, max_tokens=16)])
"""
    folder = folders("mamba")
    want = expected(folder)
    assert len(want) == TOKENS
    for order in ("bmojo_edge, mlx_lm", "mlx_lm, bmojo_edge"):
        done = run(code.format(order), folder, PROMPT)
        assert done.stdout == f"bmojo_edge.mlx.mlx_lm_engine {want}\n", done.stderr
    assert "trust_remote_code" in run(code.format("mlx_lm"), folder, PROMPT).stderr
