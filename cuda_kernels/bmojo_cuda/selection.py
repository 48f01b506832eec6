"""The eidetic choice: how unpredictable tokens are, and which are kept (docs/model.md, steps 5 and 6).

Public ops, launchers of the Triton kernels, plain references. No gradient flows through any of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo_cuda.documents import document_bounds
from bmojo_cuda.launch import has_triton, launch

EPSILON = 1e-6
MAX_TAPS = 4  # the kernel's; the plain op takes any


def innovation_reference(
    signal: Tensor,
    coefficients: list[float],
    history: Tensor | None = None,
    error: str = "relative",
    segment_ids: Tensor | None = None,
) -> Tensor:
    """`innovation` in plain torch; float64 inputs are computed in float64."""
    wide = torch.float64 if signal.dtype == torch.float64 else torch.float32
    (b, l, d), taps = signal.shape, len(coefficients)
    y = signal.detach().to(wide)
    past = y.new_zeros(b, taps, d) if history is None else history.detach().to(wide)
    padded = torch.cat([past, y], 1)
    row = torch.arange(l, device=signal.device)
    start = torch.zeros(b, l, dtype=torch.int32, device=signal.device)
    if segment_ids is not None:
        start = document_bounds(segment_ids)[0]
    first = torch.where(start > 0, start, -taps)  # a row's first document continues the history
    predicted = torch.zeros_like(y)
    for j, weight in enumerate(coefficients, start=1):
        seen = (row - j >= first)[..., None]
        predicted = predicted + weight * padded[:, taps - j : taps - j + l].masked_fill(~seen, 0.0)
    score = ((y - predicted) ** 2).sum(-1)
    return score if error == "l2" else score / ((y**2).sum(-1) + EPSILON)


def innovation(
    signal: Tensor,
    coefficients: list[float],
    history: Tensor | None = None,
    error: str = "relative",
    segment_ids: Tensor | None = None,
) -> Tensor:
    """How badly a fixed causal average predicts each value of a signal; Triton on CUDA tensors, plain torch elsewhere.

    signal (b, l, d); coefficients c_1 .. c_taps, c_1 weighs the latest value; history (b, taps, d) what came before the
    first, oldest first, None = zeros; error "relative" (|y - yhat|^2 / (|y|^2 + 1e-6)) or "l2"; segment_ids (b, l): a
    change starts a document with zeros before it. Returns float32 scores (b, l) without gradient.
    Raises ValueError naming the argument that is wrong.
    """
    if error not in ("relative", "l2"):
        raise ValueError(f"error: must be 'relative' or 'l2', got {error!r}")
    if signal.ndim != 3 or not signal.shape[1]:
        raise ValueError(f"signal: must have shape (b, l, d) with l > 0, got {tuple(signal.shape)}")
    (b, l, d), taps = signal.shape, len(coefficients)
    for name, tensor, shape in (("history", history, (b, taps, d)), ("segment_ids", segment_ids, (b, l))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: must have shape {shape}, got {tuple(tensor.shape)}")
    if signal.is_cuda and has_triton() and taps <= MAX_TAPS and signal.dtype != torch.float64:
        start = None if segment_ids is None else document_bounds(segment_ids)[0]
        past = None if history is None else history.detach()
        return _innovation(signal.detach(), list(coefficients), past, error, start)
    return innovation_reference(signal, coefficients, history, error, segment_ids)


def innovation_forward(
    signal: Tensor, coefficients: list[float], history: Tensor | None, error: str, start: Tensor | None
) -> Tensor:
    """Launch the kernel of the scores: (b, l) float32."""
    from bmojo_cuda import selection_kernels as kernels

    signal = signal if signal.stride(-1) == 1 else signal.contiguous()
    b, l, d = signal.shape
    out = torch.empty(b, l, dtype=torch.float32, device=signal.device)
    weights = [*coefficients, 0.0, 0.0, 0.0][:MAX_TAPS]
    launch(
        kernels.innovation_scores, (l, b), signal, out if history is None else history.float().contiguous(),
        out if start is None else start, out, l, d, *signal.stride()[:2], EPSILON,
        **{f"C{j}": weight for j, weight in enumerate(weights, start=1)}, TAPS=len(coefficients),
        HAS_PAST=history is not None, DOCUMENTS=start is not None, RELATIVE=error == "relative",
        BD=min(2048, 1 << (d - 1).bit_length()), num_warps=8 if d > 1024 else 4,
    )  # fmt: skip
    return out


def select_eidetic_reference(
    scores: Tensor, *, window: int, chunk: int, n_eidetic: int, n_sinks: int = 0, segment_ids: Tensor | None = None
) -> Tensor:
    """`select_eidetic` in plain torch, chunk by chunk."""
    b, l = scores.shape
    chunks = -(-l // chunk)
    row = torch.arange(l, device=scores.device)
    start = torch.zeros(b, l, dtype=torch.int32, device=scores.device)
    end = start + l
    if segment_ids is not None:
        start, end = document_bounds(segment_ids)
    ranked = torch.where(torch.isnan(scores), -torch.inf, scores)
    index = torch.full((b, chunks, n_eidetic), -1, dtype=torch.int32, device=scores.device)
    for c in range(chunks):
        mine = start[:, c * chunk, None]
        eligible = (row >= mine + n_sinks) & (row < end[:, c * chunk, None]) & (row < (c + 1) * chunk - window)
        # Stable, so ties go to the earlier row; what is not eligible comes last.
        order = torch.argsort(ranked, dim=1, descending=True, stable=True)
        order = order.gather(1, torch.argsort((~eligible).gather(1, order).int(), dim=1, stable=True))
        kept = order[:, :n_eidetic]
        kept = torch.where(eligible.gather(1, kept), kept, l).sort(1).values
        index[:, c, : kept.shape[1]] = torch.where(kept < l, kept, -1).int()
    return index


def select_eidetic(
    scores: Tensor, *, window: int, chunk: int, n_eidetic: int, n_sinks: int = 0, segment_ids: Tensor | None = None
) -> Tensor:
    """Which tokens each chunk of queries keeps for ever; Triton on CUDA tensors, plain torch elsewhere.

    scores (b, l) float32; segment_ids (b, l): a change starts a document, -1 is padding; they start at multiples of
    chunk. Returns rows (b, ceil(l / chunk), n_eidetic) int32, ascending, -1 where there are fewer: of the tokens at
    n_sinks or later in the chunk's document and before (c + 1) * chunk - window, those with the largest scores, ties to
    the earlier. It is what a bounded memory that is updated chunk by chunk would hold. NaN loses to everything.
    Raises ValueError naming the argument that is wrong.
    """
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores: must have shape (b, l) with l > 0, got {tuple(scores.shape)}")
    if not 1 <= chunk <= window or n_eidetic < 1 or n_sinks < 0:
        raise ValueError(
            "chunk, n_eidetic, n_sinks: must be 1 to window, at least 1, at least 0; "
            f"got {chunk} (window {window}), {n_eidetic}, {n_sinks}"
        )
    if segment_ids is not None and segment_ids.shape != scores.shape:
        raise ValueError(f"segment_ids: must have shape {tuple(scores.shape)}, got {tuple(segment_ids.shape)}")
    if scores.is_cuda and has_triton():
        bounds = (None, None) if segment_ids is None else document_bounds(segment_ids)
        return _select(scores.detach().float(), *bounds, window, chunk, n_eidetic, n_sinks)
    return select_eidetic_reference(
        scores.detach(), window=window, chunk=chunk, n_eidetic=n_eidetic, n_sinks=n_sinks, segment_ids=segment_ids
    )


def select_forward(
    scores: Tensor, start: Tensor | None, end: Tensor | None, window: int, chunk: int, n_eidetic: int, n_sinks: int
) -> Tensor:
    """Launch the kernels of the choice: rows (b, chunks, n_eidetic) int32."""
    from bmojo_cuda import selection_kernels as kernels

    b, l = scores.shape
    chunks = -(-l // chunk)
    scores = scores.contiguous()
    leave = torch.empty(b, l, dtype=torch.int32, device=scores.device)
    index = torch.full((b, chunks, n_eidetic), -1, dtype=torch.int32, device=scores.device)
    start, end = (leave if t is None else t.contiguous() for t in (start, end))
    documents = start is not leave
    launch(
        kernels.membership, (-(-l // 64), b), scores, start, end, leave, l, chunk, window, n_eidetic, n_sinks,
        DOCUMENTS=documents, BJ=64, BC=max(16, 1 << (chunk - 1).bit_length()), num_warps=4,
    )  # fmt: skip
    launch(
        kernels.compact, (chunks, b), leave, start, index, l, chunk, window, n_eidetic, DOCUMENTS=documents, BJ=512,
        num_warps=4,
    )  # fmt: skip
    return index


# --- torch's view of the kernels ------------------------------------------------------------------------------------


@torch.library.custom_op("bmojo::innovation", mutates_args=(), device_types="cuda")
def _innovation(
    signal: Tensor, coefficients: list[float], history: Tensor | None, error: str, start: Tensor | None
) -> Tensor:
    return innovation_forward(signal, coefficients, history, error, start)


@_innovation.register_fake
def _(signal, coefficients, history, error, start):
    return signal.new_empty(signal.shape[:2], dtype=torch.float32)


@torch.library.custom_op("bmojo::select_eidetic", mutates_args=(), device_types="cuda")
def _select(
    scores: Tensor, start: Tensor | None, end: Tensor | None, window: int, chunk: int, n_eidetic: int, n_sinks: int
) -> Tensor:
    return select_forward(scores, start, end, window, chunk, n_eidetic, n_sinks)


@_select.register_fake
def _(scores, start, end, window, chunk, n_eidetic, n_sinks):
    b, l = scores.shape
    return scores.new_empty((b, -(-l // chunk), n_eidetic), dtype=torch.int32)
