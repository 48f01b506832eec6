"""What apps/bench/kernels.py times: for each kernel its cases, ours and its peers, and how far each is from float64.

Cases are those the kernels were designed for: bfloat16, 32,768 tokens where they are of training.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import attention_peers as peers
import torch
import torch.nn.functional as F
from torch import Tensor

import bmojo_cuda
from bmojo_edge.torch import linear_cross_entropy


class Run(NamedTuple):
    """One engine on one case: what to call, what to differentiate, how far it is from float64."""

    call: Callable[[], Any]
    inputs: tuple[Tensor, ...] = ()  # () = forward alone
    error: Callable[[], float] | None = None


class Recorded(NamedTuple):
    """Times that were measured before on the same kind of GPU, with software that is not on this machine."""

    fwd_ms: float
    fwdbwd_ms: float


Engines = dict[str, Callable[[], Run] | Recorded]  # by name
Case = tuple[dict[str, Any], Engines]


def rms_ratio(got: Tensor, ref: Tensor) -> float:
    """Error of `got` over the size of `ref`."""
    return float((got.double() - ref.double()).norm() / ref.double().norm())


def draw(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    """Normal values in bfloat16 that want a gradient."""
    return (torch.randn(*shape, device=device) * scale).to(torch.bfloat16).requires_grad_()


# --- attention --------------------------------------------------------------------------------------------------------

ATTENTION = [  # b, l, h, g, d, w, e
    (4, 8192, 16, 4, 128, 1024, 0),
    (4, 8192, 16, 4, 128, 1024, 256),
    (4, 8192, 16, 4, 128, 512, 0),
    (4, 8192, 16, 4, 128, 2048, 0),
    (1, 32768, 16, 4, 128, 1024, 0),
    (4, 8192, 32, 8, 64, 1024, 0),
    (4, 8192, 32, 8, 64, 1024, 256),
]
TINY_ATTENTION = [(1, 256, 4, 2, 32, 64, 0), (1, 256, 4, 2, 32, 64, 8)]
CHUNK = 64


def eidetic_rows(b: int, l: int, w: int, e: int, device: str) -> Tensor | None:
    """Rows (b, chunks, e) that a bounded memory of random innovations holds for each chunk of queries."""
    if not e:
        return None
    scores = torch.rand(b, l, device=device)
    return bmojo_cuda.select_eidetic(scores, window=w, chunk=CHUNK, n_eidetic=e)


def few_heads(tensors: list[Tensor], n: int, group: int) -> dict[str, Any]:
    """Arguments of one group of heads' first n tokens in float64, zeros where fading keys have fewer."""
    names = ("q", "k", "v", "k_fading", "v_fading")
    parts = [x[:1, :n, : group if i == 0 else 1].detach().double() for i, x in enumerate(tensors)]
    return {k: F.pad(x, (0, 0, 0, 0, 0, n - x.shape[1])) for k, x in zip(names, parts, strict=True)}


def attention(device: str, tiny: bool) -> Iterator[Case]:
    """The fused kernel, flex_attention, two FlashAttention-2 calls, its sliding window alone, full attention."""
    for b, l, h, g, d, w, e in TINY_ATTENTION if tiny else ATTENTION:
        case = {
            "case": f"B{b} L{l} H{h}/{g} D{d} w{w} e{e}",
            "b": b,
            "l": l,
            "h": h,
            "g": g,
            "d": d,
            "w": w,
            "f": w,
            "e": e,
        }

        def fused(b: int = b, l: int = l, h: int = h, g: int = g, d: int = d, w: int = w, e: int = e) -> Run:
            q, k, v, kf, vf = (draw(b, l, n, d, device=device) for n in (h, g, g, g, g))
            index = eidetic_rows(b, l, w, e, device)
            sizes: dict[str, Any] = {"window": w, "n_fading": w, "chunk": CHUNK}
            n = min(l, 2 * w + 8 * CHUNK)

            def call() -> Tensor:
                return bmojo_cuda.memory_attention(q, k, v, kf, vf, index, **sizes)

            def error() -> float:
                few = few_heads([q, k, v, kf, vf], n, h // g)
                rows = None if index is None else index[:1, : n // CHUNK]
                with torch.no_grad():
                    got = call()[:1, :n, : h // g]
                    return rms_ratio(got, bmojo_cuda.memory_attention_reference(**few, eidetic_index=rows, **sizes))

            return Run(call, (q, k, v, kf, vf), error)

        def flex(b: int = b, l: int = l, h: int = h, g: int = g, d: int = d, w: int = w, e: int = e) -> Run:
            # Sets of chunks of w tokens, which suit flex_attention best: with 64 it has 16 times the keys to read.
            q, attend = draw(b, l, h, d, device=device), peers.flex(l, w, w, e, device)
            k, v = (draw(b, 2 * l + l // w * e, g, d, device=device) for _ in range(2))
            return Run(lambda: attend(q, k, v), (q, k, v))

        def flash(fused: bool, b: int = b, l: int = l, h: int = h, g: int = g, d: int = d, w: int = w) -> Run:
            q, k, v = (draw(b, l, n, d, device=device) for n in (h, g, g))
            kf, vf = (draw(b, l - w, g, d, device=device) for _ in range(2))
            attend, n = peers.two_calls(w, fused), min(l, 2 * w + 8 * CHUNK)

            def error() -> float:
                few = few_heads([q, k, v, kf, vf], n, h // g)
                with torch.no_grad():
                    ref = bmojo_cuda.memory_attention_reference(**few, window=w, n_fading=w)
                    return rms_ratio(attend(q, k, v, kf, vf)[:1, :n, : h // g], ref)

            return Run(lambda: attend(q, k, v, kf, vf), (q, k, v, kf, vf), error)

        def window(b: int = b, l: int = l, h: int = h, g: int = g, d: int = d, w: int = w) -> Run:
            inputs, attend = tuple(draw(b, l, n, d, device=device) for n in (h, g, g)), peers.sliding_window(w)
            return Run(lambda: attend(*inputs), inputs)

        def full(b: int = b, l: int = l, h: int = h, g: int = g, d: int = d) -> Run:
            inputs = tuple(draw(b, l, n, d, device=device) for n in (h, g, g))
            return Run(lambda: peers.sdpa(*inputs), inputs)

        engines: Engines = {"bmojo_cuda": fused, "flex_attention": flex}
        if not e:
            engines["two FlashAttention-2 calls, eager merge"] = partial(flash, False)
            engines["two FlashAttention-2 calls, fused merge"] = partial(flash, True)
        if not e and w == 1024:
            engines |= {"FlashAttention-2, window alone": window, "SDPA, full causal": full}
        yield case, engines


# --- the other kernels ------------------------------------------------------------------------------------------------

# b, l, d, n; then milliseconds of mamba_ssm's selective_scan_fn (CUDA) on an H100 80GB with torch 2.11, where known.
SCAN = [
    ((8, 2048, 2048, 16), (0.588, 3.02)),
    ((8, 4096, 2048, 16), (1.16, 6.03)),
    ((8, 8192, 2048, 16), (2.78, 12.35)),
    ((8, 4096, 4096, 16), (2.29, 12.04)),
    ((1, 8192, 2048, 16), None),
]


def scan(device: str, tiny: bool) -> Iterator[Case]:
    """The selective scan with softplus, skip and gate; mamba_ssm's recorded times."""
    for (b, l, d, n), recorded in [((1, 64, 32, 16), None)] if tiny else SCAN:

        def ours(b: int = b, l: int = l, d: int = d, n: int = n) -> Run:
            x, z, B, C = (draw(b, l, k, device=device) for k in (d, d, n, n))
            dt = draw(b, l, d, device=device, scale=0.5)
            A = -torch.arange(1.0, n + 1, device=device).repeat(d, 1).requires_grad_()
            D = torch.ones(d, device=device, requires_grad=True)
            bias = torch.full((d,), -4.0, device=device, requires_grad=True)
            inputs = (x, dt, A, B, C, D, z, bias)

            def error() -> float:
                few: list[Any] = [t[:1, :256].double() if t.ndim == 3 else t.double() for t in inputs]
                with torch.no_grad():
                    got = bmojo_cuda.selective_scan(*inputs)[0][:1, :256]
                    return rms_ratio(got, bmojo_cuda.selective_scan_reference(*few)[0])

            return Run(lambda: bmojo_cuda.selective_scan(*inputs)[0], inputs, error)

        engines: Engines = {"bmojo_cuda": ours}
        if recorded is not None:
            engines["mamba_ssm CUDA, recorded earlier on an H100 80GB"] = Recorded(*recorded)
        yield {"case": f"B{b} L{l} D{d} N{n}", "b": b, "l": l, "d": d, "n": n}, engines


def conv(device: str, tiny: bool) -> Iterator[Case]:
    """The causal convolution with SiLU."""
    b, l, d = (1, 64, 32) if tiny else (4, 8192, 2048)

    def ours() -> Run:
        inputs = draw(b, l, d, device=device), draw(d, 4, device=device), draw(d, device=device)
        return Run(lambda: bmojo_cuda.causal_conv(*inputs)[0], inputs)

    yield {"case": f"B{b} L{l} D{d} taps 4", "b": b, "l": l, "d": d}, {"bmojo_cuda": ours}


def select(device: str, tiny: bool) -> Iterator[Case]:
    """The eidetic choice, forward alone: nothing flows back through it."""
    b, l, w, e = (1, 256, 64, 8) if tiny else (4, 8192, 512, 256)

    def ours() -> Run:
        scores = torch.rand(b, l, device=device)
        sizes: dict[str, Any] = {"window": w, "chunk": CHUNK, "n_eidetic": e}
        return Run(lambda: bmojo_cuda.select_eidetic(scores, **sizes))

    yield {"case": f"B{b} L{l} w{w} e{e}", "b": b, "l": l, "w": w, "e": e}, {"bmojo_cuda": ours}


def cross_entropy(device: str, tiny: bool) -> Iterator[Case]:
    """The head and its loss over a large vocabulary, with gradients of activations and weight."""
    n, d, v = (64, 32, 128) if tiny else (32768, 768, 32000)

    def problem() -> tuple[Tensor, Tensor, Tensor]:
        targets = torch.randint(0, v, (n,), device=device)
        return draw(n, d, device=device), draw(v, d, device=device, scale=d**-0.5), targets

    def checked(call: Callable[[Tensor, Tensor, Tensor], Tensor], x: Any) -> Run:
        def error() -> float:
            h, w, targets = x
            parts = zip(h.detach().split(4096), targets.split(4096), strict=True)
            exact = sum(F.cross_entropy(p.double() @ w.detach().double().t(), t, reduction="sum") for p, t in parts)
            got = call(*x).detach().double()
            return float(abs(got - exact) / exact)

        return Run(lambda: call(*x), (x[0], x[1]), error)

    def plain(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.t()).float(), targets, reduction="sum")

    def liger() -> Run:
        found = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        fused = found.LigerFusedLinearCrossEntropyFunction

        def call(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
            out: Any = fused.apply(h, w, targets, None, None, -100, 0.0, 0.0, "sum")
            return out[0] if isinstance(out, tuple) else out

        return checked(call, problem())

    def cut() -> Run:
        cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return checked(lambda h, w, t: cce(h, w, t, reduction="sum"), problem())

    yield (
        {"case": f"tokens {n} d{d} v{v}", "l": n, "d": d, "v": v},
        {
            "bmojo_edge": lambda: checked(linear_cross_entropy, problem()),
            "all logits, eager": lambda: checked(plain, problem()),
            "all logits, compiled": lambda: checked(torch.compile(plain, dynamic=False), problem()),
            "liger-kernel": liger,
            "cut-cross-entropy": cut,
        },
    )


def fla(device: str, tiny: bool) -> Iterator[Case]:
    """flash-linear-attention's scans, which compute other recurrences: a measure of what Triton gives here."""
    b, l, h, p = (1, 64, 2, 32) if tiny else (8, 4096, 32, 64)

    def simple_gla() -> Run:
        chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
        q, k, v = (draw(b, l, h, p, device=device) for _ in range(3))
        gate = F.logsigmoid(torch.randn(b, l, h, device=device) + 4).requires_grad_()
        return Run(lambda: chunk_simple_gla(q, k, v, g=gate)[0], (q, k, v, gate))

    yield {"case": f"B{b} L{l} H{h} K{p} V{p}", "b": b, "l": l, "h": h, "d": p}, {"fla chunk_simple_gla": simple_gla}


SECTIONS: dict[str, Callable[[str, bool], Iterator[Case]]] = {
    "memory_attention": attention,
    "selective_scan": scan,
    "causal_conv": conv,
    "select_eidetic": select,
    "linear_cross_entropy": cross_entropy,
    "gated_linear_attention": fla,
}
