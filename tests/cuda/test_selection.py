"""The eidetic choice in Triton: equal to the bounded memory's, to its plain op, on the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bmojo_cuda import innovation, innovation_reference, select_eidetic, select_eidetic_reference
from tests.cuda.processes import compiled, need_triton, run_interpreted
from tests.cuda.selection_cases import SCORES, streamed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def test_kernels_interpreted() -> None:
    run_interpreted("attention_interpreted.py", "test_choice or test_innovation")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SCORES)
def test_equals_the_bounded_memory(name: str, device: str) -> None:
    scores, segments, options = SCORES[name]
    got = select_eidetic(scores.to(device), segment_ids=None if segments is None else segments.to(device), **options)
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu(), streamed(scores, segments, **options))


def test_nan_loses() -> None:
    scores = torch.tensor([[1.0, float("nan"), 0.0, float("nan"), 3.0, 0.0, 0.0, 0.0]])
    got = select_eidetic(scores, window=2, chunk=2, n_eidetic=2)
    assert got[0].tolist() == [[-1, -1], [0, 1], [0, 2], [0, 4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"chunk": 9}, "chunk"), ({"n_eidetic": 0}, "n_eidetic"), ({"segment_ids": torch.zeros(1, 3)}, "segment_ids")],
)
def test_names_what_is_wrong(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_eidetic(torch.rand(1, 20), **{"window": 8, "chunk": 4, "n_eidetic": 3, **change})


@pytest.mark.parametrize("name", ["membership", "compact", "innovation_scores"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles(name: str, arch: int) -> None:
    need_triton("compiling the eidetic choice")
    from bmojo_cuda import selection_kernels as kernels

    pointers = {"SCORES": "*fp32", "OUT": "*fp32", "HISTORY": "*fp32", "Y": "*bf16", "eps": "fp32"}
    pointers |= dict.fromkeys(("START", "END", "LEAVE", "INDEX"), "*i32")
    constants = {
        "DOCUMENTS": True, "BJ": 64, "BC": 64, "C1": 0.5, "C2": 0.3, "C3": 0.2, "C4": 0.1, "TAPS": 4, "HAS_PAST": True,
        "RELATIVE": True, "BD": 2048,
    }  # fmt: skip
    kernel = getattr(kernels, name)
    given = {n: constants[n] for n in kernel.arg_names if n in constants}
    code = compiled(
        kernel,
        {n: pointers.get(n, "i32") for n in kernel.arg_names},
        given,
        arch,
        8 if name == "innovation_scores" else 4,
    )
    assert not code.spilled


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("l", "window", "chunk", "e"), [(8192, 1024, 64, 256), (4099, 512, 512, 64), (3001, 100, 32, 500)]
)
def test_large_choices_equal_the_plain_op(l: int, window: int, chunk: int, e: int) -> None:
    torch.manual_seed(0)
    for scores in (torch.rand(2, l), torch.randint(0, 50, (2, l)).float()):
        segments = (torch.arange(l) // (chunk * 20)).expand(2, -1).clone()
        segments[1] = 0
        options: dict[str, Any] = {"window": window, "chunk": chunk, "n_eidetic": e, "n_sinks": 4}
        want = select_eidetic_reference(scores, segment_ids=segments, **options)
        for _ in range(3):
            assert torch.equal(select_eidetic(scores.cuda(), segment_ids=segments.cuda(), **options).cpu(), want)


@pytest.mark.cuda
@pytest.mark.parametrize("error", ["relative", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 100, 2048, 3000])
def test_large_innovations_equal_float64(error: str, dtype: torch.dtype, d: int) -> None:
    torch.manual_seed(0)
    signal, history = torch.randn(2, 515, d, device="cuda").to(dtype), torch.randn(2, 4, d, device="cuda")
    segments = (torch.arange(515, device="cuda") // 129).expand(2, -1)
    weights = [8 / 15, 4 / 15, 2 / 15, 1 / 15]
    got = innovation(signal, weights, history, error, segments)
    want = innovation_reference(signal.double(), weights, history.double(), error, segments)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), rtol=2e-5, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when its compiler is imported
def test_torch_sees_through_them() -> None:
    scores, signal = torch.rand(2, 300, device="cuda"), torch.randn(2, 300, 64, device="cuda")
    options: dict[str, Any] = {"window": 64, "chunk": 32, "n_eidetic": 8}
    fused = torch.compile(select_eidetic, fullgraph=True)
    assert torch.equal(fused(scores, **options), select_eidetic(scores, **options))
    torch.library.opcheck(torch.ops.bmojo.select_eidetic.default, (scores, None, None, 64, 32, 8, 0))
    torch.library.opcheck(torch.ops.bmojo.innovation.default, (signal, [0.5, 0.5], None, "l2", None))
