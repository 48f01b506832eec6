"""Memory attention in plain torch: the contract of the kernels, and what runs where they do not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmojo_cuda.documents import document_bounds


def slots_of(
    q: Tensor, eidetic_index: Tensor | None, n_sinks: int, segment_ids: Tensor | None, lk: int, chunk: int
) -> Tensor | None:
    """Rows each chunk may see for ever, its document's sinks before its list: (b, n_chunks, n_sinks + e), -1 = none."""
    if not n_sinks:
        return eidetic_index
    b, lq = q.shape[:2]
    order = torch.arange(n_sinks, dtype=torch.int32, device=q.device)
    if segment_ids is None:
        sinks = order.expand(b, -(-lq // chunk), n_sinks)
    else:
        sinks = document_bounds(segment_ids)[0][:, lk - lq :: chunk, None] + order
    sinks = torch.where(sinks < lk, sinks, -1)
    return sinks if eidetic_index is None else torch.cat([sinks.to(eidetic_index.dtype), eidetic_index], -1)


def memory_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_fading: Tensor | None = None,
    v_fading: Tensor | None = None,
    eidetic_index: Tensor | None = None,
    *,
    window: int,
    n_fading: int = 0,
    chunk: int = 64,
    n_sinks: int = 0,
    segment_ids: Tensor | None = None,
    q_fading: Tensor | None = None,
    q_eidetic: Tensor | None = None,
    k_eidetic: Tensor | None = None,
    v_eidetic: Tensor | None = None,
    eidetic_position: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`memory_attention` in plain torch, some queries at a time; float64 inputs are computed in float64."""
    (b, lq, h, p), lk, g = q.shape, k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    past, factor = lk - lq, p**-0.5 if scale is None else scale
    start = None if segment_ids is None else document_bounds(segment_ids)[0]
    slots = slots_of(q, eidetic_index, n_sinks, segment_ids, lk, chunk)
    ke, ve = k if k_eidetic is None else k_eidetic, v if v_eidetic is None else v_eidetic
    place = torch.arange(ke.shape[1], device=q.device)[None] if eidetic_position is None else eidetic_position
    out = []
    for i0 in range(0, lq, 128):
        i = torch.arange(i0, min(i0 + 128, lq), device=q.device)
        a = i + past
        first = a.new_zeros(b, len(a)) if start is None else start[:, a]

        def band(lo: int, hi: int, a: Tensor = a, first: Tensor = first) -> tuple[slice, Tensor]:
            """Key rows with lo <= a - j < hi for some query, and which of them each query sees."""
            rows = slice(max(int(a[0]) - hi + 1, 0), max(int(a[-1]) - lo + 1, 0))
            j = torch.arange(rows.start, rows.stop, device=q.device)
            e = a[:, None] - j
            return rows, (e >= lo) & (e < hi) & (j >= first[..., None])

        # Queries, keys, values of each memory, and which keys each query sees (b, n, j).
        rows, seen = band(0, window)
        reads = [(q, k[:, rows], v[:, rows], seen)]
        if n_fading and k_fading is not None and v_fading is not None:
            rows, seen = band(window, window + n_fading)
            reads.append((q if q_fading is None else q_fading, k_fading[:, rows], v_fading[:, rows], seen))
        if slots is not None:
            held = torch.zeros(b, len(i), ke.shape[1] + 1, dtype=torch.bool, device=q.device)
            mine = slots[:, i // chunk].long()
            held.scatter_(2, torch.where(mine < 0, ke.shape[1], mine), True)
            seen = held[..., :-1] & (place[:, None] <= (a - window)[:, None])
            reads.append((q if q_eidetic is None else q_eidetic, ke, ve, seen))
        scores = []
        for query, keys, _, seen in reads:
            grouped = query[:, i].to(wide).unflatten(2, (g, h // g))
            s = torch.einsum("bngmp,bjgp->bgmnj", grouped, keys.to(wide)) * factor
            scores.append(s.masked_fill(~seen[:, None, None], -math.inf))
        weights = torch.cat(scores, -1).softmax(-1)
        values = torch.cat([value.to(wide) for _, _, value, _ in reads], 1)
        out.append(torch.einsum("bgmnj,bjgp->bngmp", weights, values).flatten(2, 3))
    return torch.cat(out, 1).to(q.dtype)
