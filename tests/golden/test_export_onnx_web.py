"""SmolLM2 exported whole to ONNX, in a browser: what it predicts beside the same files in Python."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest

from bmojo_convert import convert
from bmojo_convert.to_onnx import to_onnx
from bmojo_edge.generate import prompt_ids
from bmojo_edge.onnx_runner import OnnxModel
from bmojo_edge.scoring import divergences, predictions
from tests.absent import absent

try:
    from selenium.webdriver.support.ui import WebDriverWait
except ModuleNotFoundError:
    absent("a browser", "selenium is not installed", expected=False)

from tests.browser.chromium import chromium
from tests.browser.onnx_page import served

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the exporter's own

TEXT = Path(__file__).parents[1] / "data/shakespeare.txt"
WAIT = 900  # seconds

RUN = """
const [ids, prompt, most] = arguments;
(async () => {
  const ort = await import("onnxruntime-web/wasm");
  const { Model } = await import(`${location.origin}/bmojo.mjs`);
  const model = await Model.load(ort, `${location.origin}/model`, { prefill: false });
  const rows = [], answer = [], begun = performance.now();
  for (let state = model.begin(), at = 0; at < ids.length; at++) {
    const found = await model.feed([ids[at]], state);
    state = found.state;
    const bytes = new Uint8Array(found.logits.buffer, found.logits.byteOffset, found.logits.byteLength);
    let text = "";
    for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
    rows.push(btoa(text));
  }
  const speed = (1000 * ids.length) / (performance.now() - begun);
  for await (const token of model.greedy(prompt, most)) answer.push(token);
  return { rows, answer, speed };
})().then((found) => (window.found = found), (error) => (window.found = { error: `${error}` }));
"""


# Measured: 1e-11; 5e-3 (onnxruntime-web computes int8 in other steps, nearer to float32: 3e-3 where Python has 8e-3).
@pytest.mark.parametrize(("weights", "bound"), [("float32", 1e-5), ("int8", 0.02)])
def test_smollm2_in_a_browser(weights: str, bound: float, smollm2_gguf: Path, tmp_path: Path) -> None:
    source = convert(smollm2_gguf, tmp_path / "model", window=1024, sinks=4, dtype="float32")
    export = to_onnx(source, tmp_path / "onnx", weights=weights)
    model = OnnxModel.load(export, threads=1)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8")[:400])[:40]
    prompt, most = prompt_ids(model, [{"role": "user", "content": "Name three colours."}]), 16
    with served(export) as address, chromium(tmp_path / "profile") as window:
        window.get(f"{address}?model=nowhere")  # the page itself is not to load a second copy
        window.execute_script(RUN, ids, prompt, most)
        found = WebDriverWait(window, WAIT).until(lambda _: window.execute_script("return window.found"))
    assert "error" not in found, found
    logits = np.stack([np.frombuffer(base64.b64decode(row), np.float32) for row in found["rows"]]).astype(np.float64)
    theirs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    ours = predictions(model, np.array(ids, np.int32), [1] * len(ids))
    kl, same = divergences(ours, theirs), ours.argmax(-1) == theirs.argmax(-1)
    print(f"{weights}: KL {kl.mean():.1e}, {same.mean():.1%} the same likeliest, {found['speed']:.1f} tokens/s")
    assert kl.mean() < bound and same.mean() >= (1.0 if weights == "float32" else 0.9)
    if weights == "float32":
        logits, state = model.prefill(np.array([prompt]), model.init_state())
        for token in found["answer"]:
            assert token == int(np.asarray(logits)[0].argmax())
            logits, state = model.decode_one_token(np.array([token]), state)
    assert len(found["answer"]) == most
