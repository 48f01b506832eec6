"""apps/onnx-web in Chromium: an export says what it says in Python, as token ids and through the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmojo_convert.to_onnx import to_onnx
from bmojo_edge import checkpoint
from bmojo_edge.engine import evaluate
from bmojo_edge.generate import generate, prompt_ids
from bmojo_edge.onnx_runner import OnnxModel
from bmojo_edge.tokenizer import Tokenizer
from tests.browser.chromium import chromium
from tests.browser.onnx_page import served
from tests.helpers import odd, random_weights
from tests.unit.tokenizer_folders import byte_level

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore")]  # the exporter's own

GREEDY = """
const [ids, most, prefill, done] = arguments;
(async () => {
  const ort = await import("onnxruntime-web/wasm");
  const { Model } = await import(`${location.origin}/bmojo.mjs`);
  const model = await Model.load(ort, `${location.origin}/model`, { prefill });
  const found = [];
  for await (const token of model.greedy(ids, most)) found.push(token);
  return found;
})().then(done, (error) => done(`${error}`));
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny B'MOJO of every memory, with a tokenizer, as float32."""
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "tokenizer").mkdir()
    tokenizer = byte_level(folder / "tokenizer")
    config = odd("bmojo", vocab_size=Tokenizer.load(tokenizer).vocab_size)
    checkpoint.save(folder / "model", config, random_weights(config), tokenizer)
    return to_onnx(folder / "model", folder / "export")


@pytest.fixture(scope="module")
def address(export: Path) -> Iterator[str]:
    with served(export) as found:
        yield found


@pytest.fixture(scope="module")
def window(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as window:
        window.set_script_timeout(240)
        yield window


def greedy(model: OnnxModel, ids: list[int], most: int) -> list[int]:
    """The likeliest continuation in Python."""
    logits, state = model.prefill(np.array([ids]), model.init_state())
    found: list[int] = []
    while True:
        found.append(int(evaluate(logits, state).argmax()))
        if len(found) == most:
            return found
        logits, state = model.decode_one_token(np.array(found[-1:]), state)


@pytest.mark.parametrize("prefill", [True, False], ids=["chunks", "tokens"])
def test_the_same_tokens(window: Any, address: str, export: Path, prefill: bool) -> None:
    """Past the window and many eidetic choices, over prompts that end within a chunk."""
    ids = np.random.default_rng(0).integers(0, 256, 31).tolist()
    want = greedy(OnnxModel.load(export, threads=1), ids, 60)
    assert len(set(want)) > 3
    window.get(address)
    assert window.execute_async_script(GREEDY, ids, 60, prefill) == want


def test_the_page_answers(window: Any, address: str, export: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    question, most = "the river runs to the sea", 12
    model = OnnxModel.load(export, threads=1)
    messages = [{"role": "user", "content": question}]
    want = generate(model, messages, max_tokens=most)
    window.get(f"{address}?tokens={most}")
    status = window.find_element(By.ID, "status")
    WebDriverWait(window, 120).until(lambda _: status.text.startswith("Ready"))
    window.find_element(By.ID, "prompt").send_keys(question)
    assert window.find_element(By.ID, "chat").is_selected()
    window.find_element(By.ID, "send").click()
    WebDriverWait(window, 120).until(
        lambda _: window.find_element(By.TAG_NAME, "body").get_attribute("data-answered") == "yes"
    )
    assert status.text.startswith(f"{len(prompt_ids(model, messages))} tokens read")
    assert window.execute_script("return document.getElementById('answer').textContent") == want


def test_what_is_wrong_is_said(window: Any, address: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    window.get(f"{address}?model=nowhere")
    status = window.find_element(By.ID, "status")
    WebDriverWait(window, 60).until(lambda _: "nowhere: has no tokenizer.json" in status.text)
