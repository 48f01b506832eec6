"""Memory attention in Triton: on the interpreter, as machine code, and (marked cuda) on a GPU against float64."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bmojo_cuda import hopper, memory_attention, select_eidetic
from bmojo_cuda.attention import prepared
from bmojo_cuda.attention_launch import Plan, Tiles, plan_for
from bmojo_edge.config import Config
from bmojo_edge.reference_memory import Projected, read_parallel, rotate
from bmojo_edge.rope import turns_per_token
from tests.cuda.attention_cases import BOUNDS, FLOATS, Case, assert_equals_float64, error, exact
from tests.cuda.processes import compiled, need_triton, run_interpreted

# The threads of autograd have no CUDA context before their first product.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


def test_kernels_interpreted() -> None:
    run_interpreted("attention_interpreted.py", "test_attention")


# --- against the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [None, 10000.0])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_equals_the_oracle(device: str, theta: float | None) -> None:
    """The op given what the oracle projects, rotates and chooses, in float64 on the CPU."""
    sizes = {"window": 64, "n_fading": 40, "n_eidetic": 6, "n_sinks": 3, "chunk": 32, "rope_theta": theta}
    config = Config.preset("tiny", d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, **sizes)
    dtype, rng, t = torch.float64 if device == "cpu" else torch.float32, np.random.default_rng(0), 197
    q, k, v, kf, vf = (rng.normal(size=(t, n, 32)) for n in (4, 2, 2, 2, 2))
    scores = rng.random(t).astype(np.float32)
    want, _ = read_parallel(config, Projected(q, k, v, q, kf, vf), scores, 0, None)
    turns, position = turns_per_token(config), np.arange(t)
    own = [rotate(x, position, turns) for x in (q, k, kf)]
    pinned = rotate(q, np.full(t, config.window), turns)

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x)[None].to(device, dtype)

    options: dict[str, Any] = {"window": config.window, "chunk": config.chunk_size, "n_sinks": config.n_sinks}
    index = select_eidetic(torch.from_numpy(scores)[None].to(device), n_eidetic=config.n_eidetic, **options)
    got = memory_attention(
        tensor(own[0]), tensor(own[1]), tensor(v), tensor(own[2]), tensor(vf), index, n_fading=config.fading,
        q_eidetic=tensor(pinned), k_eidetic=tensor(k), v_eidetic=tensor(v), **options,
    )  # fmt: skip
    assert error(got[0].cpu(), torch.from_numpy(want)) < (1e-12 if device == "cpu" else 2e-6)


# --- as machine code ------------------------------------------------------------------------------------------------

POINTERS = {"LSE": "*fp32", "DELTA": "*fp32", "PARTS": "*fp32"} | dict.fromkeys(
    ("INDEX", "COUNT", "SAFE", "PLACES", "START", "END", "UNION", "BITS", "POSITION"), "*i32"
)
COUNTS = ("LQ", "LK", "PAST", "W", "F", "C", "E", "R", "U")
FLAGS = {
    "H": 16, "G": 4, "PRECISION": "tf32", "FADING": True, "EIDETIC": True, "TIED_F": True, "TIED_E": True,
    "DOCUMENTS": True, "PLACED": False, "CHUNKS": 16,
}  # fmt: skip


def types_of(kernel: Any, dtype: str) -> dict[str, str]:
    """Types of a kernel's arguments by the names they have in attention_kernels.py."""
    found = {}
    for name in kernel.arg_names:
        pointer = name.isupper() and name not in COUNTS
        number = "fp32" if name in ("scale", "natural") else "i32"
        found[name] = POINTERS.get(name, f"*{dtype}" if pointer else number)
    return found


def plan_on(small: bool, p: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The tiles for a GPU of large or small shared memory."""
    launchers = importlib.import_module("bmojo_cuda.attention_launch")
    monkeypatch.setattr(launchers, "_shared_bytes", lambda device: (100 if small else 227) * 1024)
    q = SimpleNamespace(dtype=dtype, shape=(1, 1, 1, p), is_cuda=True, get_device=lambda: 0)
    return plan_for(q)  # pyright: ignore[reportArgumentType]


PORTABLE = {
    "attend_forward": "forward", "attend_backward_queries": "queries", "attend_backward_keys": "keys",
    "attend_backward_slots": "slots",
}  # fmt: skip
ARCHITECTURES = [(80, 163 * 1024, True), (90, 227 * 1024, False), (100, 227 * 1024, False)]
SPILLS = {("attend_forward", 90), ("attend_backward_queries", 90)}  # what is claimed to have none, at head_dim 128


COMPILED = [
    pytest.param(name, *machine, p, marks=() if p == 128 and (machine[0] == 90 or "keys" in name) else pytest.mark.slow)
    for name in PORTABLE
    for machine in ARCHITECTURES
    for p in (32, 128)
]


@pytest.mark.parametrize(("name", "arch", "shared", "small", "p"), COMPILED)
def test_compiles(name: str, arch: int, shared: int, small: bool, p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    need_triton("compiling memory attention")
    from bmojo_cuda import attention_kernels as kernels

    tiles: Tiles = getattr(plan_on(small, p, torch.bfloat16, monkeypatch), PORTABLE[name])
    kernel = getattr(kernels, name)
    constants = {**FLAGS, "P": p, "BP": p, "BM": tiles.queries, "BN": tiles.keys}
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    code = compiled(kernel, types_of(kernel, "bf16"), constants, arch, tiles.warps, tiles.stages)
    assert code.shared <= shared
    assert ("wgmma" in code.text) == (arch == 90)
    if (name, arch) in SPILLS:
        assert not code.spilled


@pytest.mark.parametrize(
    ("p", "pinned"),
    [(128, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(64, False), (128, True)])],
)
def test_hopper_forward_compiles(p: int, pinned: bool) -> None:
    need_triton("compiling memory attention")
    kernels = hopper.kernels("forward")
    if kernels is None:
        pytest.skip("this release of Triton is not one the Gluon kernels are for")
    tiles = hopper.forward_tiles(p, 2 if pinned else 1, None)
    assert tiles is not None and tiles.slots >= 3  # two tiles are in use when a third is waited for
    constants = {
        **FLAGS, "P": p, "BM": tiles.queries, "BN": tiles.keys, "SLOTS": tiles.slots, "TIED_E": not pinned,
    }  # fmt: skip
    kernel = kernels.attend_forward
    code = compiled(
        kernel, types_of(kernel, "bf16"), {n: constants[n] for n in kernel.arg_names if n in constants}, 90, 4
    )
    assert code.shared <= hopper.SHARED_BYTES
    assert code.text.count("wgmma.mma_async") == 2 * (p + tiles.keys + tiles.keys) // 16
    assert code.spilled < 512  # between pieces of work, none while tiles go by


@pytest.mark.parametrize("name", ["attend_backward_keys", "attend_backward_slots"])
@pytest.mark.parametrize("p", [pytest.param(64, marks=pytest.mark.slow), 128])
def test_hopper_keys_compile(name: str, p: int) -> None:
    need_triton("compiling memory attention")
    kernels, tiles = hopper.kernels("keys"), hopper.KEYS
    if kernels is None:
        pytest.skip("this release of Triton is not one the Gluon kernels are for")
    constants = {
        **FLAGS, "P": p, "BM": tiles.queries, "BN": tiles.keys, "WARPS": tiles.warps, "DEPTH": tiles.depth,
    }  # fmt: skip
    kernel = getattr(kernels, name)
    given = {n: constants[n] for n in kernel.arg_names if n in constants}
    code = compiled(kernel, types_of(kernel, "fp16"), given, 90, tiles.warps)
    assert code.shared <= hopper.SHARED_BYTES
    assert code.text.count("wgmma.mma_async") == 2 * p // 16 + 2 * tiles.queries // 16
    assert code.spilled <= 32


# --- on a GPU -------------------------------------------------------------------------------------------------------

HALF: dict[str, Any] = {"dtype": torch.bfloat16, "chunk": 64}
NARROW: dict[str, Any] = {"dtype": torch.bfloat16, "chunk": 32}
DEVICE = {
    "one token": Case(l=1, window=1, n_fading=1, h=8, g=2, p=128, dtype=torch.bfloat16),
    "one token after a past": Case(l=1, past=200, window=64, n_fading=50, e=9, sinks=2, h=8, g=2, p=128, **HALF),
    "every memory, 128": Case(b=2, l=701, past=130, h=8, g=2, p=128, window=96, n_fading=77, e=70, sinks=4, **HALF),
    "every memory, 64": Case(b=2, l=645, h=16, g=2, p=64, window=128, n_fading=128, e=100, sinks=4, **HALF),
    "untied and pinned, 128": Case(
        b=1, l=517, h=8, g=2, p=128, window=64, n_fading=64, e=33, untied=True, pinned=True, **HALF
    ),
    "untied and pinned, 64": Case(
        b=1, l=517, h=8, g=2, p=64, window=64, n_fading=33, e=33, untied=True, pinned=True, **HALF
    ),
    "pinned rows of their own, documents": Case(
        b=2, l=640, past=64, h=8, g=4, p=128, window=64, n_fading=64, e=40, rows=90, pinned=True, documents=True, **HALF
    ),
    "documents, float16": Case(
        b=2,
        l=900,
        h=8,
        g=2,
        p=64,
        window=96,
        n_fading=200,
        e=40,
        sinks=5,
        documents=True,
        dtype=torch.float16,
        chunk=64,
    ),
    "documents, no lists": Case(b=2, l=771, h=4, g=1, p=128, window=100, n_fading=31, documents=True, **HALF),
    "one head a group, chunk 32": Case(b=1, l=515, h=4, g=4, p=128, window=40, n_fading=40, e=20, **HALF)._replace(
        chunk=32
    ),
    "eight heads a group, chunk 32": Case(b=1, l=515, h=8, g=1, p=64, window=64, e=30, **NARROW),
    "head_dim 96": Case(b=1, l=333, h=6, g=2, p=96, window=64, n_fading=64, e=20, sinks=1, **HALF),
    "head_dim 32": Case(b=1, l=333, h=6, g=2, p=32, window=64, n_fading=64, e=20, pinned=True, **HALF),
    "float32": Case(b=2, l=300, past=41, h=4, g=2, p=64, window=96, n_fading=60, e=20, sinks=2, chunk=96),
    "float32, 128": Case(b=1, l=260, h=2, g=1, p=128, window=64, n_fading=64, e=20, documents=True, untied=True),
    "long": Case(b=1, l=2048 + 17, h=8, g=2, p=128, window=512, n_fading=512, e=128, sinks=4, **HALF),
    "long, 64": Case(b=1, l=2048 + 17, h=8, g=2, p=64, window=512, n_fading=512, e=128, **HALF),
}
SMALL = ("every memory, 128", "every memory, 64", "documents, float16", "head_dim 32", "head_dim 96")
RUNS = [(name, which) for name in DEVICE for which in ("chosen", "portable")] + [(name, "small") for name in SMALL]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, so that what a kernel does not write shows."""
    made, like = torch.empty, torch.empty_like

    def spoil(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(1 << 30))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(made(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoil(like(*a, **k)))


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "which"), RUNS)
def test_equals_float64(name: str, which: str, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    case = DEVICE[name]
    plan = None if which == "chosen" else plan_on(which == "small", case.p, case.dtype, monkeypatch)
    assert_equals_float64(case, "cuda", plan)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["long", "long, 64", "documents, float16"])
def test_repeats_bit_for_bit(name: str) -> None:
    case = DEVICE[name]
    leaves = {n: None if t is None else t.requires_grad_() for n, t in case.floats("cuda").items()}
    given = [t for t in leaves.values() if t is not None]
    rest = case.rest("cuda")
    do = torch.randn_like(given[0])

    def once() -> list[Tensor]:
        out = memory_attention(**leaves, **rest)  # pyright: ignore[reportArgumentType]
        return [out, *torch.autograd.grad(out, given, do)]

    first = once()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.cuda
def test_offsets_beyond_32_bits() -> None:
    """The last rows of queries of more than 2^31 numbers equal the same rows alone."""
    l, h, n = (1 << 19) + 32, 32, 160
    q = torch.randn(1, l, h, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, l, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    options: dict[str, Any] = {"window": 64, "n_fading": 64, "chunk": 64}
    begin = (l - n) // 64 * 64
    index = torch.arange(begin - 200, begin - 190, device="cuda", dtype=torch.int32).expand(1, -(-l // 64), -1)
    k_tail, v_tail = k[:, begin - 256 :], v[:, begin - 256 :]
    q.requires_grad_()
    out = memory_attention(q, k, v, k, v, index, **options)
    do = torch.randn(1, l - begin, h, 128, device="cuda", dtype=torch.bfloat16)
    found = torch.autograd.grad(out, q, torch.cat([torch.zeros_like(out[:, :begin]), do], 1))[0][:, begin:]
    part = q.detach()[:, begin:].clone().requires_grad_()
    chunks = -(-part.shape[1] // 64)
    alone = memory_attention(part, k_tail, v_tail, k_tail, v_tail, index[:, -chunks:] - (begin - 256), **options)
    want = torch.autograd.grad(alone, part, do)[0]
    assert error(out[:, begin:], alone) < BOUNDS[torch.bfloat16]
    assert error(found, want) < BOUNDS[torch.bfloat16]


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when its compiler is imported
def test_torch_sees_through_it() -> None:
    """Compiled without a break, checkpointed, and checked by torch's own test of custom ops."""
    from torch.utils.checkpoint import checkpoint

    case = Case(b=1, l=130, h=4, g=2, p=64, window=64, n_fading=64, e=8, sinks=2, dtype=torch.bfloat16, chunk=32)
    floats, rest = case.floats("cuda"), case.rest("cuda")
    leaves = {n: t.requires_grad_() for n, t in floats.items() if t is not None}

    def loss(run: Any) -> list[Tensor]:
        return list(torch.autograd.grad(run(**leaves, **rest).float().square().sum(), list(leaves.values())))

    want = loss(memory_attention)
    fused = torch.compile(memory_attention, fullgraph=True)
    saved = loss(lambda **given: checkpoint(lambda: memory_attention(**given), use_reentrant=False))
    for got in (loss(fused), saved):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    shape = (rest["window"], rest["n_fading"], rest["chunk"], rest["n_sinks"], rest["scale"])
    arguments = prepared(tuple(floats[n] for n in FLOATS), rest["eidetic_index"], None, None, shape)
    torch.library.opcheck(torch.ops.bmojo.memory_attention.default, arguments)


def test_names_what_is_wrong() -> None:
    q, k = torch.randn(1, 8, 4, 32), torch.randn(1, 8, 2, 32)
    with pytest.raises(ValueError, match="v: must have shape"):
        memory_attention(q, k, k[:, :5], window=4)
    with pytest.raises(ValueError, match="k_fading, v_fading: are required"):
        memory_attention(q, k, k, window=4, n_fading=3)
    with pytest.raises(ValueError, match=r"k_fading: must be torch.float32 .* like q, got torch.float16"):
        memory_attention(q, k, k, k.half(), k, window=4, n_fading=3)


@pytest.mark.cuda
def test_what_the_kernels_do_not_take_is_computed_plainly() -> None:
    case = Case(b=1, l=50, window=24, n_fading=24, e=5, chunk=24, dtype=torch.bfloat16)
    floats, rest = case.floats("cuda"), case.rest("cuda")
    want, _ = exact(floats, rest, torch.zeros_like(floats["q"]))  # pyright: ignore[reportArgumentType]
    with pytest.warns(RuntimeWarning, match="multiple of 32, not 24"):
        out = memory_attention(**floats, **rest)  # pyright: ignore[reportArgumentType]
    assert error(out, want) < BOUNDS[torch.bfloat16]
