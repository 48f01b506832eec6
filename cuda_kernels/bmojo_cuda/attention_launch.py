"""Launchers of memory attention's kernels: the portable ones (attention_kernels.py), Hopper's (hopper_*_kernels.py).

They take what the public op has checked: rows of eidetic keys as int32 lists, sinks among them, and document bounds.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmojo_cuda import hopper
from bmojo_cuda.launch import launch, streaming_multiprocessors

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


@functools.cache
def _shared_bytes(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def plan_for(q: Tensor) -> Plan:
    """Tiles that fit the GPU and measured best on Hopper; float32 computes exactly, on smaller ones."""
    if q.dtype == torch.float32:
        tiles = Tiles(32, 32, 4, 1)
        return Plan(tiles, tiles, tiles, tiles)
    small = q.is_cuda and _shared_bytes(q.get_device()) < 200 * 1024
    if q.shape[-1] <= 64:
        if small:
            return Plan(Tiles(128, 64, 4, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2))
        return Plan(Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 3))
    if small:
        return Plan(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2), Tiles(32, 64, 4, 2))
    return Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2))


def _fitting(tiles: Tiles, rows: int | None) -> Tiles:
    """Tiles whose queries divide the rows of a chunk (None: nothing to divide)."""
    queries = tiles.queries if rows is None else math.gcd(tiles.queries, rows)
    return tiles._replace(queries=queries)


def _rows(t: Tensor) -> Tensor:
    """t (b, l, h, p) itself where the heads of a token lie side by side and copies of 16 bytes fit, else a copy."""
    together = t.stride(3) == 1 and t.stride(2) == t.shape[3]
    return (
        t
        if together and not (t.stride(0) % 16 or t.stride(1) % 16 or t.data_ptr() % 16)
        else t.clone(memory_format=torch.contiguous_format)
    )


class _Call(NamedTuple):
    """The tensors of one call as the kernels take them; what is absent is some tensor that will not be read."""

    floats: tuple[Tensor, ...]  # q, q_fading, q_eidetic, k, v, k_fading, v_fading, k_eidetic, v_eidetic
    strides: tuple[int, ...]
    slots: tuple[Tensor, ...]  # rows (b, chunks, e), counts (b, chunks), safe (b, chunks), places (b, chunks, e): int32
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
        "TIED_E": q_eidetic is None, "DOCUMENTS": start is not None,
    }  # fmt: skip
    h, p = q.shape[2:]
    constants = {
        "H": h, "G": h // k.shape[2], "P": p, "BP": 1 << (p - 1).bit_length(),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    if slots is None:
        nothing = torch.empty(1, 1, 1, dtype=torch.int32, device=q.device)
        return _Call(floats, strides, (nothing,) * 4, flags, constants)
    from bmojo_cuda import attention_kernels as kernels

    places, count = torch.empty_like(slots), slots.new_empty(slots.shape[:2])
    safe, (b, chunks, e) = torch.empty_like(count), slots.shape
    launch(
        kernels.survey_slots, (chunks, b), slots, slots if position is None else position, places, count, safe,
        k.shape[1] - q.shape[1], window, chunk, e, floats[7].shape[1], PLACED=position is not None, BE=128, num_warps=4,
    )  # fmt: skip
    return _Call(floats, strides, (slots, count, safe, places), flags, constants)


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
    numbers = (lq, past, window, n_fading, chunk, call.slots[0].shape[2], scale * LOG2E)
    starts = call.slots[0] if start is None else start[:, past:].contiguous()
    if plan is None and hopper.takes(q):
        wide = hopper.forward_tiles(p, 1 + (q_fading is not None) + (slots is not None and q_eidetic is not None), rows)
        if wide is not None:
            pieces = -(-lq * group // wide.queries) * g * b
            launch(
                hopper.kernels("forward").attend_forward, (min(pieces, streaming_multiprocessors(q)),), *call.floats,
                *call.slots, starts, out, lse, *numbers, g, b, pieces, *call.strides, BM=wide.queries, BN=wide.keys,
                SLOTS=wide.slots, **call.flags, **hopper.constants(call.constants), num_warps=4,
            )  # fmt: skip
            return out, lse
    from bmojo_cuda import attention_kernels as kernels

    tiles = _fitting((plan_for(q) if plan is None else plan).forward, rows)
    launch(
        kernels.attend_forward, (-(-lq * group // tiles.queries), g, b), *call.floats, *call.slots, starts, out, lse,
        *numbers, *call.strides, BM=tiles.queries, BN=tiles.keys, **call.flags, **call.constants,
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
    fast = plan is None and hopper.takes(q)
    plan = plan_for(q) if plan is None else plan
    do, delta, bp = do.contiguous(), torch.empty_like(lse), call.constants["BP"]
    launch(kernels.row_products, (-(-lse.numel() // 64),), out, do, delta, lse.numel(), P=p, BP=bp, BM=64, num_warps=4)
    given = (q, k, v, k_fading, v_fading, q_fading, q_eidetic)
    empty = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given]
    dq, dk, dv, dkf, dvf, dqf, dqe = empty
    assert dq is not None and dk is not None and dv is not None

    tiles = _fitting(plan.queries, chunk * group if slots is not None else None)
    starts = call.slots[0] if start is None else start[:, past:].contiguous()
    launch(
        kernels.attend_backward_queries, (-(-lq * group // tiles.queries), g, b), *call.floats, *call.slots, starts,
        do, lse, delta, dq, dq if dqf is None else dqf, dq if dqe is None else dqe,
        lq, past, window, n_fading, chunk, call.slots[0].shape[2], scale * LOG2E, scale, *call.strides,
        BM=tiles.queries, BN=tiles.keys, **call.flags, **call.constants, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    fading = call.flags["FADING"]
    floats = [call.floats[n] for n in (0, 1, 3, 4, 5, 6)]
    _launch_keys(
        "attend_backward_keys", fast, plan.keys, (lk, g, b * (2 if fading else 1)), *floats,
        call.slots[0] if end is None else end.contiguous(), do, lse, delta, dk, dv, dk if dkf is None else dkf,
        dv if dvf is None else dvf, lq, lk, past, window, n_fading, scale * LOG2E, scale,
        *(n for t in floats for n in t.stride()[:2]), constants=call.constants, FADING=fading,
        DOCUMENTS=end is not None,
    )  # fmt: skip
    dke = dve = None
    if slots is not None:
        dke = dk if k_eidetic is None else torch.zeros(k_eidetic.shape, dtype=k.dtype, device=k.device)
        dve = dv if v_eidetic is None else torch.zeros(v_eidetic.shape, dtype=v.dtype, device=v.device)
        _add_slot_gradients(dke, dve, call, do, lse, delta, position, lq, past, window, chunk, scale, plan.slots, fast)
        dke, dve = None if k_eidetic is None else dke, None if v_eidetic is None else dve
    elif k_eidetic is not None or v_eidetic is not None:
        dke, dve = (None if t is None else torch.zeros_like(t) for t in (k_eidetic, v_eidetic))
    if slots is None and dqe is not None:
        dqe.zero_()
    return Gradients(dq, dk, dv, dkf, dvf, dqf, dqe, dke, dve)


def _launch_keys(
    name: str, fast: bool, tiles: Tiles, grid: tuple[int, int, int], *arguments: Any, constants: dict[str, Any],
    **flags: Any,
) -> None:  # fmt: skip
    """Launch a kernel whose keys stay, Hopper's or the portable one of that name; grid[0] counts keys."""
    from bmojo_cuda import attention_kernels as kernels

    if fast:
        tall = hopper.KEYS
        launch(
            getattr(hopper.kernels("keys"), name), (-(-grid[0] // tall.keys), *grid[1:]), *arguments, BM=tall.queries,
            BN=tall.keys, WARPS=tall.warps, DEPTH=tall.depth, num_warps=tall.warps, **flags,
            **hopper.constants(constants),
        )  # fmt: skip
    else:
        launch(
            getattr(kernels, name), (-(-grid[0] // tiles.keys), *grid[1:]), *arguments, BM=tiles.queries,
            BN=tiles.keys, **flags, **constants, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


GROUP_TOKENS = 1024  # chunks whose gradients of slots are summed by one program


def _add_slot_gradients(
    dke: Tensor, dve: Tensor, call: _Call, do: Tensor, lse: Tensor, delta: Tensor, position: Tensor | None, lq: int,
    past: int, window: int, chunk: int, scale: float, tiles: Tiles, fast: bool,
) -> None:  # fmt: skip
    """Add to the gradients of k_eidetic and v_eidetic: sums over groups of chunks, then over the groups."""
    from bmojo_cuda import attention_kernels as kernels

    q, ke, ve = call.floats[2], call.floats[7], call.floats[8]
    slots = call.slots[0]
    (b, r, g, p), (_, chunks, e) = ke.shape, slots.shape
    together = max(1, min(32, GROUP_TOKENS // chunk))
    groups = -(-chunks // together)
    width = min(together * e, r)
    ints = {"dtype": torch.int32, "device": q.device}
    bits = torch.zeros(b, groups, r, **ints)
    union, place, count = torch.empty(b, groups, width, **ints), torch.empty_like(bits), torch.empty(b, groups, **ints)
    launch(kernels.mark_members, (chunks, b), slots, bits, e, r, chunks, groups, CHUNKS=together, BE=128, num_warps=4)
    launch(kernels.gather_members, (b * groups,), bits, union, place, count, r, width, BR=1024, num_warps=4)
    parts = torch.empty(b, groups, width, g, 2, p, dtype=torch.float32, device=q.device)
    strides = (n for t in (q, ke, ve) for n in t.stride()[:2])
    _launch_keys(
        "attend_backward_slots", fast, tiles, (width, g, b * groups), q, ke, ve, union, bits, count,
        slots if position is None else position, do, lse, delta, parts, lq, past, window, chunk, r, width, groups,
        scale * LOG2E, scale, *strides, constants=call.constants, CHUNKS=together, PLACED=position is not None,
    )  # fmt: skip
    launch(
        kernels.add_slots, (-(-r // 16), g, b), parts, place, dke, dve, r, width, groups, g,
        P=p, BP=call.constants["BP"], BR=16, num_warps=4,
    )  # fmt: skip
