"""Documents packed into rows: where they start and which tokens are padding, from segment ids.

Segment ids (b, l): a change starts a document, -1 is padding. A row's first document continues the carried state.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORGET = -1.0e30  # added to an exponent: the decay becomes 0


def real_tokens(segment_ids: Tensor) -> Tensor:
    """True at tokens that are not padding, (b, l)."""
    return segment_ids >= 0


def starts(segment_ids: Tensor) -> Tensor:
    """True at the first token of every document but a row's first, (b, l)."""
    real = real_tokens(segment_ids)
    changed = torch.zeros_like(real)
    changed[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    before = torch.cumsum(real, 1) > real.long()
    return changed & real & before


def forget_marks(segment_ids: Tensor) -> Tensor:
    """What the scan kernels read per token, (b, l, 2) float32: FORGET at starts, else 0; 1 at real tokens, else 0."""
    forget = starts(segment_ids).float() * FORGET
    return torch.stack([forget, real_tokens(segment_ids).float()], -1)


def document_bounds(segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First row of each row's run of equal ids, and the row after its last: two (b, l) int32. Padding is a run too."""
    b, l = segment_ids.shape
    row = torch.arange(l, device=segment_ids.device, dtype=torch.int32).expand(b, l)
    changed = torch.ones_like(segment_ids, dtype=torch.bool)
    changed[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = torch.where(changed, row, 0).cummax(1).values
    ends = torch.cat([changed[:, 1:], changed.new_ones(b, 1)], 1)
    end = torch.where(ends, row + 1, l).flip(1).cummin(1).values.flip(1)
    return start.to(torch.int32), end.to(torch.int32)
