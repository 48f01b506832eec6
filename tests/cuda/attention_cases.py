"""Cases of memory attention and what its kernels are held to: float64 of the plain op, values and all gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmojo_cuda import attention_launch, memory_attention_reference
from bmojo_cuda.attention import prepared
from bmojo_cuda.attention_launch import Gradients, Plan

FLOATS = ("q", "k", "v", "k_fading", "v_fading", "q_fading", "q_eidetic", "k_eidetic", "v_eidetic")
BOUNDS = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}


class Case(NamedTuple):
    """Sizes of one call; `rows` of k_eidetic, 0 = those of k."""

    b: int = 2
    l: int = 37
    past: int = 0
    h: int = 4
    g: int = 2
    p: int = 32
    window: int = 32
    n_fading: int = 0
    e: int = 0
    sinks: int = 0
    chunk: int = 32
    documents: bool = False
    untied: bool = False  # q_fading
    pinned: bool = False  # q_eidetic
    rows: int = 0
    dtype: torch.dtype = torch.float32
    scale: float | None = None

    def floats(self, device: str, seed: int = 0) -> dict[str, Tensor | None]:
        """Drawn at random; what the case lacks is None."""
        torch.manual_seed(seed)

        def draw(there: bool, rows: int, heads: int) -> Tensor | None:
            return torch.randn(self.b, rows, heads, self.p, device=device).to(self.dtype) if there else None

        lk, slots = self.l + self.past, self.e > 0 or self.sinks > 0
        return {
            "q": draw(True, self.l, self.h), "k": draw(True, lk, self.g), "v": draw(True, lk, self.g),
            "k_fading": draw(self.n_fading > 0, lk, self.g), "v_fading": draw(self.n_fading > 0, lk, self.g),
            "q_fading": draw(self.untied, self.l, self.h), "q_eidetic": draw(self.pinned and slots, self.l, self.h),
            "k_eidetic": draw(self.rows > 0, self.rows, self.g), "v_eidetic": draw(self.rows > 0, self.rows, self.g),
        }  # fmt: skip

    def rest(self, device: str) -> dict[str, Any]:
        """The other arguments of the op. Lists hold any rows that some query of the chunk sees, and gaps."""
        lk, chunks = self.l + self.past, -(-self.l // self.chunk)
        segments = index = position = None
        if self.documents:  # from a third on another document, then padding
            segments = torch.zeros(self.b, lk, dtype=torch.int64)
            segments[:, lk // 3 // self.chunk * self.chunk :] = 7
            segments[:, lk - 3 :] = -1
        if self.rows:
            position = torch.stack([torch.randperm(lk)[: self.rows].sort().values for _ in range(self.b)])
        if self.e:
            index = torch.full((self.b, chunks, self.e), -1, dtype=torch.int32)
            for b in range(self.b):
                for c in range(chunks):
                    last = min(self.past + (c + 1) * self.chunk - self.window, lk)
                    own = torch.zeros(lk, dtype=torch.int64) if segments is None else segments[b]
                    document = own == own[self.past + c * self.chunk]  # no row is in a list and a sink
                    first = int(document.int().argmax()) + self.sinks
                    if position is None:
                        there = torch.arange(first, max(last, first))
                    else:
                        there = (position[b] < last).nonzero()[:, 0]
                    kept = there[torch.randperm(len(there))[: self.e - c % 2]].sort().values
                    index[b, c, : len(kept)] = kept.int()
        found: dict[str, Any] = {
            "eidetic_index": index, "eidetic_position": position, "segment_ids": segments, "window": self.window,
            "n_fading": self.n_fading, "chunk": self.chunk, "n_sinks": self.sinks, "scale": self.scale,
        }  # fmt: skip
        return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in found.items()}


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in norm; absolute where there is nothing to find."""
    size = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (size if size > 1e-12 else 1.0)


def exact(floats: dict[str, Tensor | None], rest: dict[str, Any], do: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the plain op in float64."""
    leaves = {n: None if t is None else t.double().requires_grad_() for n, t in floats.items()}
    out = memory_attention_reference(**leaves, **rest)  # pyright: ignore[reportArgumentType]
    given = {n: t for n, t in leaves.items() if t is not None}
    found = torch.autograd.grad(out, list(given.values()), do.double(), allow_unused=True)
    return out.detach(), {
        n: torch.zeros_like(t) if d is None else d for (n, t), d in zip(given.items(), found, strict=True)
    }


def launched(
    floats: dict[str, Tensor | None], rest: dict[str, Any], do: Tensor, plan: Plan | None
) -> tuple[Tensor, Gradients]:
    """Output and gradients of the kernels, cut as `plan` says (None: as they choose)."""
    shape = (rest["window"], rest["n_fading"], rest["chunk"], rest["n_sinks"], rest["scale"])
    arguments = prepared(
        tuple(floats[n] for n in FLOATS), rest["eidetic_index"], rest["eidetic_position"], rest["segment_ids"], shape
    )
    out, lse = attention_launch.forward(*arguments, plan=plan)
    return out, attention_launch.backward(do, out, lse, *arguments, plan=plan)


def assert_equals_float64(case: Case, device: str, plan: Plan | None = None, seed: int = 0) -> None:
    """Values and every gradient, within the dtype's rounding; nothing is left unwritten."""
    floats, rest = case.floats(device, seed), case.rest(device)
    q = floats["q"]
    assert q is not None
    do = torch.randn_like(q)
    want, gradients = exact(floats, rest, do)
    out, found = launched(floats, rest, do, plan)
    bound = BOUNDS[case.dtype]
    assert error(out, want) < bound
    for name, wanted in gradients.items():
        got = getattr(found, name)
        assert got.dtype == case.dtype and got.shape == wanted.shape, name
        assert error(got, wanted) < 2 * bound, name
    assert all(t is None for n, t in found._asdict().items() if n not in gradients)
