"""Memory attention's and the eidetic choice's kernels on Triton's interpreter; run by the tests of those names.

In a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

from tests.cuda import interpreter  # isort: skip  (first: it patches Triton before kernels are defined)

import pytest
import torch

from bmojo_cuda import attention, attention_launch, innovation_reference, select_eidetic_reference
from bmojo_cuda.attention_launch import Plan, Tiles
from bmojo_cuda.selection import innovation_forward, select_forward
from tests.cuda.attention_cases import FLOATS, Case, assert_equals_float64
from tests.cuda.selection_cases import SCORES, segments_of

assert interpreter

SMALL, ODD = Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1)
PLANS = {"wide": Plan(SMALL, SMALL, ODD, ODD), "tall": Plan(ODD, ODD, SMALL, SMALL)}
ATTENTION = {
    "every memory": Case(b=1, l=67, h=4, g=2, window=32, n_fading=20, e=5, sinks=2, untied=True, pinned=True),
    "carried past, rows of their own": Case(b=1, l=35, past=40, n_fading=32, e=6, rows=20, scale=0.3),
    "documents": Case(b=1, l=103, n_fading=40, e=4, sinks=3, documents=True, pinned=True),
    "one token": Case(b=2, l=1, window=1, n_fading=1),
    "many slots, bfloat16": Case(b=1, l=45, n_fading=17, e=40, past=70, dtype=torch.bfloat16, p=64),
    "float16, one head, odd head_dim": Case(b=1, l=33, h=1, g=1, p=96, n_fading=9, dtype=torch.float16),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    assert_equals_float64(ATTENTION[name], "cpu", PLANS["tall" if name == "documents" else "wide"])


@pytest.mark.parametrize("name", SCORES)
def test_choice(name: str) -> None:
    scores, segments, options = SCORES[name]
    bounds = (None, None) if segments is None else segments_of(segments)
    got = select_forward(scores, *bounds, **options)
    assert torch.equal(got, select_eidetic_reference(scores, segment_ids=segments, **options))


@pytest.mark.parametrize(("error", "dtype"), [("relative", torch.float32), ("l2", torch.bfloat16)])
def test_innovation(error: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    signal, history = torch.randn(2, 9, 5).to(dtype), torch.randn(2, 3, 5)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1, -1], [3] * 9])
    weights = [0.5, 0.3, 0.2]
    got = innovation_forward(signal, weights, history, error, segments_of(segments)[0])
    want = innovation_reference(signal.double(), weights, history.double(), error, segments)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


def test_attention_is_an_op_torch_knows() -> None:
    """Schema, shapes without data, autograd and tracing, by torch's own test, the interpreted kernels beneath."""
    case = Case(b=1, l=3, h=2, g=1, n_fading=2, e=1, past=35, pinned=True)
    floats, rest = case.floats("cpu"), case.rest("cpu")
    attention._attend.register_kernel("cpu")(attention_launch.forward)
    attention._attend_backward.register_kernel("cpu")(attention._attend_backward._init_fn)
    shape = (case.window, case.n_fading, case.chunk, case.sinks, case.scale)
    given = tuple(t if t is None else t.requires_grad_() for t in (floats[n] for n in FLOATS))
    arguments = attention.prepared(given, rest["eidetic_index"], None, None, shape)
    torch.library.opcheck(torch.ops.bmojo.memory_attention.default, arguments)
