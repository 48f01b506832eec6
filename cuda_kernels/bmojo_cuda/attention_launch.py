"""Launchers of memory attention's kernels: the portable ones (attention_kernels.py) and Hopper's (hopper_kernels.py).

They take what the public op has checked: rows of eidetic keys as int32 lists, sinks among them, and document bounds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bmojo_cuda import hopper
from bmojo_cuda.launch import launch

LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """How one kernel is cut: rows of queries and keys a tile, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Tiles of every kernel of a call."""

    forward: Tiles
    queries: Tiles
    keys: Tiles
    slots: Tiles


def plan_for(dtype: torch.dtype, p: int) -> Plan:
    """Tiles that compile without spills and measured best on Hopper; float32 computes exactly, on smaller ones."""
    if dtype == torch.float32:
        tiles = Tiles(32, 32, 4, 1)
        return Plan(tiles, tiles, tiles, tiles)
    if p > 64:
        return Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2))
    return Plan(Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 3))


def _fitting(tiles: Tiles, rows: int | None) -> Tiles:
    """Tiles whose queries divide the rows of a chunk (None: nothing to divide)."""
    queries = tiles.queries if rows is None else math.gcd(tiles.queries, rows)
    return tiles._replace(queries=queries)


def _rows(t: Tensor) -> Tensor:
    """t (b, l, h, p) itself where the heads of a token lie side by side, else a copy."""
    return t if t.stride(3) == 1 and t.stride(2) == t.shape[3] else t.contiguous()


class _Call(NamedTuple):
    """The tensors of one call as the kernels take them; what is absent is some tensor that will not be read."""

    floats: tuple[Tensor, ...]  # q, q_fading, q_eidetic, k, v, k_fading, v_fading, k_eidetic, v_eidetic
    strides: tuple[int, ...]
    slots: Tensor  # (b, chunks, e) int32
    counts: Tensor  # (b, chunks) int32: slots up to the last one used
    safe: Tensor  # (b, chunks) int32: leading slots that every query of the chunk sees
    flags: dict[str, bool]
    constants: dict[str, int | str]


def _call(
    q: Tensor, k: Tensor, v: Tensor, k_fading: Tensor | None, v_fading: Tensor | None, q_fading: Tensor | None,
    q_eidetic: Tensor | None, k_eidetic: Tensor | None, v_eidetic: Tensor | None, slots: Tensor | None,
    position: Tensor | None, start: Tensor | None, window: int, chunk: int,
) -> _Call:  # fmt: skip
    given = (q, q_fading, q_eidetic, k, v, k_fading, v_fading, k_eidetic, v_eidetic)
    absent = (q, q, q, k, v, k, v, k, v)
    floats = tuple(_rows(e if t is None else t) for t, e in zip(given, absent, strict=True))
    strides = tuple(n for t in floats for n in t.stride()[:2])
    flags = {
        "FADING": k_fading is not None, "EIDETIC": slots is not None, "TIED_F": q_fading is None,
        "TIED_E": q_eidetic is None, "DOCUMENTS": start is not None, "PLACED": position is not None,
    }  # fmt: skip
    h, p = q.shape[2:]
    constants = {
        "H": h, "G": h // k.shape[2], "P": p, "BP": 1 << (p - 1).bit_length(),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    if slots is None:
        slots = count = safe = torch.zeros(1, 1, 1, dtype=torch.int32, device=q.device)
    else:
        order = torch.arange(1, slots.shape[2] + 1, device=q.device, dtype=torch.int32)
        count = torch.where(slots >= 0, order, 0).amax(-1)
        place = (
            slots
            if position is None
            else position[:, None].expand(-1, slots.shape[1], -1).gather(2, slots.clamp(0).long())
        )
        first = torch.arange(slots.shape[1], device=q.device) * chunk + k.shape[1] - q.shape[1]
        seen = (slots >= 0) & (place <= (first - window)[:, None])
        safe = seen.to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
    return _Call(floats, strides, slots, count, safe, flags, constants)


def forward(
    q: Tensor, k: Tensor, v: Tensor, k_fading: Tensor | None, v_fading: Tensor | None, q_fading: Tensor | None,
    q_eidetic: Tensor | None, k_eidetic: Tensor | None, v_eidetic: Tensor | None, slots: Tensor | None,
    position: Tensor | None, start: Tensor | None, end: Tensor | None, window: int, n_fading: int, chunk: int,
    scale: float, plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (b, lq, h, p), log-sum-exp (b, lq, h) float32 in log2 units. A plan asks for the portable kernels."""
    call = _call(
        q, k, v, k_fading, v_fading, q_fading, q_eidetic, k_eidetic, v_eidetic, slots, position, start, window, chunk
    )
    b, lq, h, p = q.shape
    g, group = k.shape[2], h // k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, lq, h, dtype=torch.float32, device=q.device)
    past = k.shape[1] - lq
    rows = chunk * group if slots is not None else None
    numbers = (lq, past, window, n_fading, chunk, call.slots.shape[2], call.floats[7].shape[1], scale * LOG2E)
    placed = call.slots if position is None else position
    starts = call.slots if start is None else start[:, past:].contiguous()
    wide = None if plan is not None else hopper.tiles_for(q, rows)
    if wide is not None:
        kernels = hopper.kernels()
        grid = (-(-lq * group // wide.queries), g, b)
        launch(
            kernels.attend_forward, grid, *call.floats, call.slots, call.counts, call.safe, placed, starts, out, lse,
            *numbers, *call.strides, BM=wide.queries, BN=wide.keys, WARPS=wide.warps, num_warps=wide.warps,
            DEPTH=wide.depth,            HOLD=wide.hold and q_fading is None and q_eidetic is None, **call.flags,
            **hopper.constants(call.constants),
        )  # fmt: skip
        return out, lse
    from bmojo_cuda import attention_kernels as kernels

    tiles = _fitting((plan_for(q.dtype, p) if plan is None else plan).forward, rows)
    launch(
        kernels.attend_forward, (-(-lq * group // tiles.queries), g, b), *call.floats, call.slots, call.counts, placed,
        starts, out, lse, *numbers, *call.strides, BM=tiles.queries, BN=tiles.keys, **call.flags, **call.constants,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, lse


class Gradients(NamedTuple):
    """Of the float arguments of `forward`, in their order; None where the argument was None."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_fading: Tensor | None
    v_fading: Tensor | None
    q_fading: Tensor | None
    q_eidetic: Tensor | None
    k_eidetic: Tensor | None
    v_eidetic: Tensor | None


def backward(
    do: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k_fading: Tensor | None,
    v_fading: Tensor | None, q_fading: Tensor | None, q_eidetic: Tensor | None, k_eidetic: Tensor | None,
    v_eidetic: Tensor | None, slots: Tensor | None, position: Tensor | None, start: Tensor | None, end: Tensor | None,
    window: int, n_fading: int, chunk: int, scale: float, plan: Plan | None = None,
) -> Gradients:  # fmt: skip
    """Gradients from that of the output. A given plan asks for the portable kernels."""
    from bmojo_cuda import attention_kernels as kernels

    call = _call(
        q, k, v, k_fading, v_fading, q_fading, q_eidetic, k_eidetic, v_eidetic, slots, position, start, window, chunk
    )
    (b, lq, h, p), lk, g = q.shape, k.shape[1], k.shape[2]
    group, past = h // g, lk - lq
    rows = chunk * group if slots is not None else None
    fast = None if plan is not None else hopper.tiles_for(q, rows)
    plan = plan_for(q.dtype, p) if plan is None else plan
    do, delta, bp = do.contiguous(), torch.empty_like(lse), call.constants["BP"]
    launch(kernels.row_products, (-(-lse.numel() // 64),), out, do, delta, lse.numel(), P=p, BP=bp, BM=64, num_warps=4)
    given = (q, k, v, k_fading, v_fading, q_fading, q_eidetic)
    empty = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given]
    dq, dk, dv, dkf, dvf, dqf, dqe = empty
    assert dq is not None and dk is not None and dv is not None
    placed = call.slots if position is None else position
    starts = call.slots if start is None else start[:, past:].contiguous()
    ends = call.slots if end is None else end.contiguous()

    tensors = (do, lse, delta, dq, dq if dqf is None else dqf, dq if dqe is None else dqe)
    numbers = (lq, past, window, n_fading, chunk, call.slots.shape[2], call.floats[7].shape[1], scale * LOG2E, scale)
    floats = [call.floats[n] for n in (0, 1, 3, 4, 5, 6)]
    strides = [n for t in floats for n in t.stride()[:2]]
    fading = call.flags["FADING"]
    targets = (do, lse, delta, dk, dv, dk if dkf is None else dkf, dv if dvf is None else dvf)
    sizes = (lq, lk, past, window, n_fading, scale * LOG2E, scale)
    if fast is not None:
        fused = hopper.kernels()
        constants = {
            "WARPS": fast.warps,
            "num_warps": fast.warps,
            "DEPTH": fast.depth,
            **hopper.constants(call.constants),
        }
        grid = (-(-lq * group // fast.queries), g, b)
        launch(
            fused.attend_backward_queries, grid, *call.floats, call.slots, call.counts, call.safe, placed, starts,
            *tensors, *numbers, *call.strides, BM=fast.queries, BN=64, **call.flags, **constants,
        )  # fmt: skip
        constants = {"WARPS": 8, "num_warps": 8, "DEPTH": 2, **hopper.constants(call.constants)}
        launch(
            fused.attend_backward_keys, (-(-lk // 128), g, b * (2 if fading else 1)), *floats, ends, *targets, *sizes,
            *strides, BM=64, BN=128, FADING=fading, DOCUMENTS=end is not None, **constants,
        )  # fmt: skip
    else:
        tiles = _fitting(plan.queries, rows)
        launch(
            kernels.attend_backward_queries, (-(-lq * group // tiles.queries), g, b), *call.floats, call.slots,
            call.counts, placed, starts, *tensors, *numbers, *call.strides, BM=tiles.queries, BN=tiles.keys,
            **call.flags, **call.constants, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        tiles = plan.keys
        launch(
            kernels.attend_backward_keys, (-(-lk // tiles.keys), g, b * (2 if fading else 1)), *floats, ends, *targets,
            *sizes, *strides, BM=tiles.queries, BN=tiles.keys, FADING=fading, DOCUMENTS=end is not None,
            **call.constants, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    dke = dve = None
    if slots is not None:
        dke = dk if k_eidetic is None else torch.zeros(k_eidetic.shape, dtype=k.dtype, device=k.device)
        dve = dv if v_eidetic is None else torch.zeros(v_eidetic.shape, dtype=v.dtype, device=v.device)
        _add_slot_gradients(dke, dve, call, do, lse, delta, placed, lq, past, window, chunk, scale, plan.slots)
        dke, dve = None if k_eidetic is None else dke, None if v_eidetic is None else dve
    elif k_eidetic is not None or v_eidetic is not None:
        dke, dve = (None if t is None else torch.zeros_like(t) for t in (k_eidetic, v_eidetic))
    if slots is None and dqe is not None:
        dqe.zero_()
    return Gradients(dq, dk, dv, dkf, dvf, dqf, dqe, dke, dve)


GROUP_TOKENS = 1024  # chunks whose gradients of slots are summed by one program


def _add_slot_gradients(
    dke: Tensor, dve: Tensor, call: _Call, do: Tensor, lse: Tensor, delta: Tensor, placed: Tensor, lq: int, past: int,
    window: int, chunk: int, scale: float, tiles: Tiles,
) -> None:  # fmt: skip
    """Add to the gradients of k_eidetic and v_eidetic: sums over groups of chunks, then over the groups."""
    from bmojo_cuda import attention_kernels as kernels

    q, ke, ve = call.floats[2], call.floats[7], call.floats[8]
    (b, r, g, p), (_, chunks, e) = ke.shape, call.slots.shape
    together = max(1, min(32, GROUP_TOKENS // chunk))
    groups = -(-chunks // together)
    width = min(together * e, r)
    ints = {"dtype": torch.int32, "device": q.device}
    bits = torch.zeros(b, groups, r, **ints)
    union, place, count = torch.empty(b, groups, width, **ints), torch.empty_like(bits), torch.empty(b, groups, **ints)
    launch(
        kernels.mark_members, (chunks, b), call.slots, bits, e, r, chunks, groups, CHUNKS=together, BE=128, num_warps=4
    )
    launch(kernels.gather_members, (b * groups,), bits, union, place, count, r, width, BR=1024, num_warps=4)
    parts = torch.empty(b, groups, width, g, 2, p, dtype=torch.float32, device=q.device)
    strides = (n for t in (q, ke, ve) for n in t.stride()[:2])
    launch(
        kernels.attend_backward_slots, (-(-width // tiles.keys), g, b * groups), q, ke, ve, union, bits, count, placed,
        do, lse, delta, parts, lq, past, window, chunk, r, width, groups, scale * LOG2E, scale, *strides,
        BM=tiles.queries, BN=tiles.keys, CHUNKS=together, PLACED=call.flags["PLACED"], **call.constants,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    launch(
        kernels.add_slots, (-(-r // 16), g, b), parts, place, dke, dve, r, width, groups, g,
        P=p, BP=call.constants["BP"], BR=16, num_warps=4,
    )  # fmt: skip
