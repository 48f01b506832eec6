"""SmolLM2 exported whole to ONNX: its logits beside MLX's on real text, past sinks, chunks and the window; it chats."""

from pathlib import Path

import numpy as np
import pytest

from tests.absent import absent

try:
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    absent("ONNX exports", f"{error.name} is not installed")

import bmojo_edge as be
from bmojo_convert import convert
from bmojo_convert.to_onnx import to_onnx
from bmojo_edge.engine import LM, evaluate
from bmojo_edge.onnx_runner import OnnxModel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the exporter's own

TEXT = Path(__file__).parents[1] / "data/shakespeare.txt"


def log_probabilities(lm: LM, ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Natural-log probabilities (n, v) after each call of `sizes` tokens."""
    state, at, found = lm.init_state(), 0, []
    for size in sizes:
        if size == 1:
            logits, state = lm.decode_one_token(ids[at : at + 1], state)
        else:
            logits, state = lm.prefill(ids[None, at : at + size], state)
        wide = evaluate(logits, state).astype(np.float64)
        found.append(wide - np.logaddexp.reduce(wide))
        at += size
    return np.stack(found)


@pytest.fixture(scope="module")
def model(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `bmojo-edge chat` has it: window 1,024, 4 sinks."""
    return convert(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "model", window=1024, sinks=4, dtype="float32")


@pytest.mark.parametrize(("weights", "bound"), [(None, 1e-5), ("int8", 0.02)], ids=["float32", "int8"])
def test_smollm2_whole(weights: str | None, bound: float, model: Path, tmp_path: Path) -> None:
    lm = be.load(model)
    chunk, window = lm.config.chunk_size, lm.config.window
    sizes = [1] * chunk + [chunk] * (window // chunk) + [1] * chunk
    assert lm.tokenizer is not None
    ids = np.array(lm.tokenizer.encode(TEXT.read_text(encoding="utf-8")[: 10 * sum(sizes)])[: sum(sizes)], np.int32)
    assert len(ids) == sum(sizes) > window + lm.config.n_sinks + chunk
    ours = log_probabilities(lm, ids, sizes)
    exported = OnnxModel.load(to_onnx(model, tmp_path / "onnx", quantize=weights))
    theirs = log_probabilities(exported, ids, sizes)
    kl = (np.exp(ours) * (ours - theirs)).sum(-1)
    assert kl.mean() < bound, f"mean {kl.mean():.1e}, most {kl.max():.1e}"
    if weights is None:
        answer = be.generate(exported, [{"role": "user", "content": "What is the capital of France?"}], max_tokens=12)
        assert "Paris" in answer
