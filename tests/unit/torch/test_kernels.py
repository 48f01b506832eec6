"""The PyTorch twin with its ops wired to `bmojo_cuda` equals the twin on its own plain ops: values, gradients, states.

On the CPU `bmojo_cuda` runs its plain references, so what is checked is which tensors go where; on a GPU its kernels.
"""

from __future__ import annotations

from typing import Any

import pytest

from bmojo_edge.config import Config
from bmojo_edge.state import RecalledState, leaves
from tests.helpers import assert_close

torch = pytest.importorskip("torch")

from bmojo_edge.torch import Model, ops  # noqa: E402
from bmojo_edge.torch.layout import is_aligned, layout_of, segments_of  # noqa: E402

SIZES: dict[str, Any] = {"vocab_size": 64, "window": 64, "chunk": 32, "n_eidetic": 8, "n_layers": 2}
CASES: dict[str, dict[str, Any]] = {
    "bmojo": {"window": 32},
    "rotated, sinks": {"rope_theta": 1e4, "n_sinks": 3},
    "untied, qk-norm, short fading": {"tie_kv": False, "qk_norm": True, "n_fading": 16, "rope_theta": 1e4},
    "no ssm": {"ssm": None, "n_sinks": 2},
    "no eidetic": {"n_eidetic": 0},
    "hybrid": {"layer_types": ("mamba", "attention"), "n_eidetic": 0, "rope_theta": 1e4},
}
SEGMENTS = [[0] * 64 + [1] * 46 + [-1] * 20, [4] * 32 + [5] * 4 + [-1] * 28 + [6] * 66]


def config_of(name: str, **more: Any) -> Config:
    fields = {**SIZES, **CASES[name], **more}
    if "layer_types" in fields:
        del fields["n_layers"]
    return Config.preset("tiny", **fields)


def run(model: Model, tokens: Any, labels: Any) -> tuple[list[Any], list[Any]]:
    """What calls give, and their sets: training's activations and gradients, logits, states, then a carried call."""
    model.zero_grad()
    out = model.activations(tokens, labels)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    with torch.no_grad():
        logits, state, memory = model.forward_with_memory(
            tokens[:, :96], None, None if labels is None else labels[:, :96]
        )
        rest = {"lengths": [34, 11]} if labels is None else {"segment_ids": labels[:, 96:]}
        more, after, later = model.forward_with_memory(tokens[:, 96:], state, **rest)
    found = [out, *(p.grad for p in model.parameters()), logits, memory.scores, more, later.scores]
    return [*found, *(x for _, x in leaves((state, after)))], [memory.eidetic_index, later.eidetic_index]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_wired_ops_equal_the_plain_ones(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, tokens = Model(config_of(name)), torch.randint(0, 64, (2, 130))
    labels = torch.tensor(SEGMENTS) if packed else None
    plain, plain_sets = run(model, tokens, labels)
    called = set()
    for op in ("memory_attention", "selective_scan", "causal_conv"):
        original = getattr(ops.bmojo_cuda, op)
        monkeypatch.setattr(ops.bmojo_cuda, op, lambda *a, o=original, n=op, **k: (called.add(n), o(*a, **k))[1])
    for op in ("innovation", "select_on_gpu"):
        original = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *a, o=original, n=op, **k: (called.add(n), o(*a, **k))[1])
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    wired, wired_sets = run(model, tokens, labels)
    for n, (got, ref) in enumerate(zip(wired, plain, strict=True)):
        assert_close(got, ref, 3e-6, f"result {n}")
    for got, ref in zip(wired_sets, plain_sets, strict=True):
        assert torch.equal(got, ref)
    config = model.config
    wanted = {"memory_attention"} if "attention" not in config.layer_types or packed else set()
    wanted |= {"selective_scan", "causal_conv"} if config.ssm is not None else set()
    wanted |= {"innovation", "select_on_gpu"} if config.n_eidetic else set()
    assert called >= wanted


@pytest.mark.parametrize("eidetic", [8, 0])
def test_the_wired_op_reads_recalled_blocks(eidetic: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of storage are slots like others: calls from a multiple of `chunk` on run in the kernel, others do not.

    What layers that share their positions compute once is what each computes by itself.
    """
    torch.manual_seed(0)
    model, tokens = Model(config_of("no ssm", rope_theta=1e4, n_eidetic=eidetic)), torch.randint(0, 64, (2, 200))
    config, called, state = model.config, [], model.init_state(2)
    shape, positions = (2, config.kv_heads, 8, config.d_head), torch.tensor([[-2, 3, 40, -1, 90, -2, 5, 6]] * 2)
    blocks = [RecalledState(torch.randn(shape), torch.randn(shape), positions) for _ in state.layers]
    original = ops.bmojo_cuda.memory_attention
    monkeypatch.setattr(ops.bmojo_cuda, "memory_attention", lambda *a, **k: (called.append(1), original(*a, **k))[1])
    found = []
    for wired in (False, True):
        monkeypatch.setattr(ops, "on_gpu", lambda x, wired=wired: wired)
        own = [b if wired else b._replace(positions=positions.clone()) for b in blocks]
        layers = [layer._replace(recalled=b) for layer, b in zip(state.layers, own, strict=True)]
        after, parts = state._replace(layers=tuple(layers)), []
        with torch.no_grad():
            for begin, end in ((0, 64), (64, 96), (96, 199), (199, 200)):
                logits, after = model(tokens[:, begin:end], after)
                parts.append(logits)
        found.append(torch.cat(parts, dim=1))
        assert len(called) == (3 * len(layers) if wired else 0)  # 199 is no multiple of a chunk
    assert_close(found[1], found[0], 3e-6)
    assert (found[0] - model(tokens)[0]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it, and silences it for itself
@pytest.mark.parametrize(
    ("name", "wired"),
    [
        ("rotated, sinks", False),
        ("no ssm", True),
        pytest.param(
            "rotated, sinks", True, marks=pytest.mark.slow
        ),  # the references of scan and convolution are loops
        pytest.param("hybrid", True, marks=pytest.mark.slow),
    ],
)
def test_a_layer_is_one_graph(name: str, wired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph break, hence nothing that waits for the GPU; compiled it computes what it computes eagerly."""
    torch.manual_seed(0)
    config = config_of(name, window=32)
    model = Model(config.replace(layer_types=config.layer_types[:1]))
    tokens, labels = torch.randint(0, 64, (2, 36)), torch.tensor([[0] * 32 + [1] * 4, [0] * 30 + [-1] * 6])
    monkeypatch.setattr(ops, "SCAN_STEPS", 6)  # a loop over tokens is a long graph
    monkeypatch.setattr(ops, "on_gpu", lambda x: wired and ops.has_triton())
    eager, grads = None, []
    for compiled in (False, True):
        for block in model.blocks() if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")
        model.zero_grad()
        out = model.activations(tokens, labels)
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        eager = out if eager is None else eager
        assert_close(out, eager, 1e-6)
    for got, ref in zip(*grads, strict=True):
        assert_close(got, ref, 1e-5)


def test_a_layout_waits_for_nothing() -> None:
    """A tensor without values cannot be looked into, as a GPU's should not be."""
    config = config_of("rotated, sinks")
    labels = torch.tensor(SEGMENTS)
    assert is_aligned(config, None, labels, None)
    nothing = torch.zeros(2, dtype=torch.int64, device="meta")
    layout = layout_of(
        config, (2, 130), nothing, nothing, segments_of(labels.to("meta"), None), fresh=True, aligned=True
    )
    assert layout.chunks.limit.shape == (2, 5)


@pytest.mark.parametrize(
    ("row", "aligned"),
    [
        ([0] * 64 + [1] * 64, True),
        ([0] * 40 + [-1] * 24 + [0] * 64, True),
        ([-1] * 8 + [0] * 64 + [-1] * 24 + [1] * 32, False),  # padding in front is turned to the end: 64, then 88
        ([-1] * 8 + [0] * 64 + [1] * 56, True),
        ([0] * 63 + [1] * 65, False),
        ([0] * 20 + [-1] * 44 + [1] * 64, False),  # a whole chunk of padding before a document
        ([0] * 20 + [-1] * 108, True),
        ([-1] * 128, True),
    ],
)
def test_which_documents_are_aligned(row: list[int], aligned: bool) -> None:
    config, rows = config_of("bmojo"), torch.tensor([[0] * 128, row])
    assert is_aligned(config, None, rows, None) == aligned
    assert is_aligned(config, torch.tensor([0, 64]), rows, None) == aligned
    assert not is_aligned(config, torch.tensor([0, 5]), rows, None)


def test_why_a_plain_operation_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.bfloat16
    monkeypatch.setattr(ops, "has_triton", lambda: True)
    assert ops.why_plain(64, half, 64, True) is None
    assert "multiples of chunk = 64" in (ops.why_plain(64, half, 64, False) or "")
    assert "multiple of 32, not 48" in (ops.why_plain(64, half, 48, True) or "")
    assert "not 80" in (ops.why_plain(80, half, 64, True) or "")
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    assert ops.why_plain(64, half, 64, True) == "Triton is not installed"
