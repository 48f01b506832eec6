"""Published ways to attend to in-context, fading and eidetic keys in PyTorch, for apps/bench/kernels.py.

Queries (b, l, h, p), keys and values (b, l, g, p); every function is differentiable. What a peer needs laid out in
another way, such as keys side by side or the fading keys a window shorter, it is given so: that is not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention by whichever backend PyTorch takes (on an H100 cuDNN's)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, w: int) -> tuple[Tensor, ...]:
    """FlashAttention-2 over the last w keys: output, log-sum-exp, and two leaves of its random state."""
    size = q.shape[1], k.shape[1]
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, *size, 0.0, True, False, window_size_left=w - 1, window_size_right=0
    )
    return found[:4]


def _flash_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, rest: tuple[Tensor, ...], w: int) -> Any:
    lse, *state = rest
    size = q.shape[1], k.shape[1]
    return torch.ops.aten._flash_attention_backward(
        do, q, k, v, o, lse, None, None, *size, 0.0, True, *state, window_size_left=w - 1, window_size_right=0
    )


def _merge(o: Tensor, lse: Tensor, far: Tensor, far_lse: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """The softmax over both sets of keys, whose parts are known; `far` lacks the first w tokens."""
    far, far_lse = F.pad(far, (0, 0, 0, 0, w, 0)), F.pad(far_lse, (w, 0), value=-math.inf)
    whole = torch.logaddexp(lse, far_lse)
    near, beyond = ((x - whole).exp().transpose(1, 2)[..., None] for x in (lse, far_lse))
    return (o * near + far * beyond).to(o.dtype).contiguous(), whole


class TwoCalls(torch.autograd.Function):
    """Hybrid Model Factory's form: a FlashAttention-2 call for each memory, joined by their log-sum-exps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kf: Tensor, vf: Tensor, w: int, merge: Any) -> Tensor:
        o, *near = _flash(q, k, v, w)
        older = q[:, w:].contiguous()
        far, *beyond = _flash(older, kf, vf, w)
        o, lse = merge(o, near[0], far, beyond[0], w)
        ctx.save_for_backward(q, k, v, older, kf, vf, o, lse, *near[1:], *beyond[1:])
        ctx.w = w
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, older, kf, vf, o, lse, *state = ctx.saved_tensors
        w, do = ctx.w, do.contiguous()
        dq, dk, dv = _flash_backward(do, q, k, v, o, (lse, *state[:2]), w)
        late = [x[:, w:].contiguous() for x in (do, o)]
        rest = (lse[:, :, w:].contiguous(), *state[2:])
        extra, dkf, dvf = _flash_backward(late[0], older, kf, vf, late[1], rest, w)
        dq = dq.clone()
        dq[:, w:] += extra
        return dq, dk, dv, dkf, dvf, None, None


def two_calls(w: int, fused: bool) -> Callable[..., Tensor]:
    """Window and fading attention (f = w) in two calls, their merge eager or made one kernel by the compiler.

    Fading keys and values (b, l - w, g, p): the last w tokens' are seen by nobody.
    """
    merge = torch.compile(_merge, dynamic=False) if fused else _merge

    def call(q: Tensor, k: Tensor, v: Tensor, kf: Tensor, vf: Tensor) -> Tensor:
        result: Any = TwoCalls.apply(q, k, v, kf, vf, w, merge)
        return result

    return call


def sliding_window(w: int) -> Callable[..., Tensor]:
    """FlashAttention-2 over the window alone."""

    class Window(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, *rest = _flash(q, k, v, w)
            ctx.save_for_backward(q, k, v, o, *rest)
            return o

        @staticmethod
        def backward(ctx: Any, do: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            q, k, v, o, *rest = ctx.saved_tensors
            return _flash_backward(do.contiguous(), q, k, v, o, tuple(rest), w)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Any = Window.apply(q, k, v)
        return result

    return call


def _block_mask(l: int, w: int, chunk: int, e: int, device: str, size: int = 128) -> Any:
    """Visible blocks over in-context keys, fading keys, then e keys of every chunk, by arithmetic on block corners."""
    from torch.nn.attention.flex_attention import BlockMask

    keys = 2 * l + l // chunk * e

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = torch.where(j < l, i - j, i - (j - l))
        recent = (j < l) & (distance >= 0) & (distance < w)
        fading = (j >= l) & (j < 2 * l) & (distance >= w) & (distance < 2 * w)
        seen = recent | fading
        return seen | ((j >= 2 * l) & ((j - 2 * l) // e == i // chunk)) if e else seen

    first_q = torch.arange(l // size, device=device)[:, None] * size
    first_k = torch.arange(-(-keys // size), device=device)[None] * size
    last_q, last_k = first_q + size - 1, first_k + size - 1

    def between(low: int, high: int, shift: int) -> tuple[Tensor, Tensor]:
        """Whether some, and whether all pairs of a block have low <= distance < high."""
        least, most = first_q - last_k + shift, last_q - first_k + shift
        return (most >= low) & (least < high), (least >= low) & (most < high)

    part = [first_k < l, (first_k >= l) & (first_k < 2 * l), first_k >= 2 * l]
    bands = (between(0, w, 0), between(w, 2 * w, l))
    some, whole = ((part[0] & bands[0][n]) | (part[1] & bands[1][n]) for n in (0, 1))
    if e:
        low, high = (first_k - 2 * l) // e, (last_k.clamp(max=keys - 1) - 2 * l) // e
        chunks = first_q // chunk, last_q // chunk
        some = some | (part[2] & (high >= chunks[0]) & (low <= chunks[1]))
        inside = (low == chunks[0]) & (high == chunks[0]) & (chunks[0] == chunks[1]) & (last_k < keys)
        whole = whole | (part[2] & inside)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
        return blocks.sum(-1).int()[None, None], order.int()[None, None]

    lists = (*listed(some & ~whole), *listed(whole))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(l, keys))


def flex(l: int, w: int, chunk: int, e: int, device: str) -> Callable[..., Tensor]:
    """flex_attention over keys (b, 2 l + chunks e, g, p): in-context, fading, then every chunk's eidetic ones."""
    from torch.nn.attention.flex_attention import flex_attention

    mask, attend = _block_mask(l, w, chunk, e, device), torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        result: Any = attend(q, k, v, block_mask=mask, enable_gqa=True)
        return result.transpose(1, 2)

    return call
