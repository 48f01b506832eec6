"""Triton bodies of the eidetic choice; selection.py launches them.

With scores fixed per token, token j is in the set of chunk c if and only if it is eligible (its first chunk is not past
c) and fewer than E eligible tokens beat it. Their number only grows with c, so membership is one interval
of chunks. Tokens that become eligible with the same chunk form a group of C neighbours: group k holds the tokens at
k C - W .. (k + 1) C - W - 1 of the row. Integers and comparisons only: exact, ties to the earlier token.
"""

import triton
import triton.language as tl


@triton.jit
def innovation_scores(
    Y, HISTORY, START, OUT, L, D, y_b, y_t, eps,
    C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, C4: tl.constexpr, TAPS: tl.constexpr, HAS_PAST: tl.constexpr,
    DOCUMENTS: tl.constexpr, RELATIVE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """OUT (b, l) float32: how far Y (b, l, d) is from the average of its last TAPS values, C1 .. C4 the weights.

    HISTORY (b, TAPS, d) float32, oldest first, stands before a row; before a document (START) there are zeros.
    """
    t = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    first = -TAPS if HAS_PAST else 0
    if DOCUMENTS:
        start = tl.load(START + b * L + t)
        first = tl.where(start > 0, start, first)
    error = tl.zeros([BD], tl.float32)
    power = tl.zeros([BD], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        on = d < D
        y = tl.load(Y + b * y_b + t.to(tl.int64) * y_t + d, mask=on, other=0.0).to(tl.float32)
        predicted = tl.zeros([BD], tl.float32)
        for j in tl.static_range(1, TAPS + 1):
            weight = C1 if j == 1 else (C2 if j == 2 else (C3 if j == 3 else C4))
            at = t - j
            past = tl.load(Y + b * y_b + at.to(tl.int64) * y_t + d, mask=on & (at >= tl.maximum(first, 0)), other=0.0)
            past = past.to(tl.float32)
            if HAS_PAST:
                held = tl.load(HISTORY + (b * TAPS + TAPS + at) * D + d, mask=on & (at < 0) & (at >= first), other=0.0)
                past += held.to(tl.float32)
            predicted += weight * past
        error += (y - predicted) * (y - predicted)
        power += y * y
    score = tl.sum(error, 0)
    if RELATIVE:
        score = score / (tl.sum(power, 0) + eps)
    tl.store(OUT + b * L + t, score)


@triton.jit
def membership(
    SCORES, START, END, LEAVE, L, C, W, E, SINKS,
    DOCUMENTS: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """LEAVE (b, l) int32: the first chunk, from its own group on, that a token is not in; -1: never eligible.

    Group by group from its document's first, a program counts the tokens that beat its own, until all have E of those.
    """
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    on = j < L
    start = tl.zeros([BJ], tl.int32)
    end = tl.zeros([BJ], tl.int32) + L
    if DOCUMENTS:
        start = tl.load(START + b * L + j, mask=on, other=0)
        end = tl.load(END + b * L + j, mask=on, other=0)
    own = tl.load(SCORES + b * L + j, mask=on, other=0.0)
    own = tl.where(own == own, own, float("-inf"))  # NaN loses to everything
    fits = on & (j >= start + SINKS)
    enter = (j + W) // C
    chunks = tl.cdiv(L, C)
    last = tl.minimum((end - 1) // C + 1, chunks)  # the first chunk after the document
    beaten = tl.zeros([BJ], tl.int32)
    leave = tl.where(fits, last, -1)
    waiting = fits & (enter < last)
    leave = tl.where(fits & (enter >= last), enter, leave)
    k = (tl.min(tl.where(on, start, L), 0) + W) // C
    while (k < chunks) & (tl.max(waiting.to(tl.int32), 0) > 0):
        column = tl.arange(0, BC)
        i = k * C - W + column
        there = (column < C) & (i >= 0) & (i < L)
        other = tl.load(SCORES + b * L + i, mask=there, other=0.0)
        other = tl.where(other == other, other, float("-inf"))
        rival = there[None, :] & (i[None, :] >= (start + SINKS)[:, None]) & (i[None, :] < end[:, None])
        ahead = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & (i[None, :] < j[:, None]))
        beaten += tl.sum((rival & ahead).to(tl.int32), 1)
        leave = tl.where(waiting & (beaten >= E), tl.maximum(k, enter), leave)
        waiting = waiting & (beaten < E) & (k + 1 < last)
        k += 1
    tl.store(LEAVE + b * L + j, leave, mask=on)


@triton.jit
def compact(LEAVE, START, INDEX, L, C, W, E, DOCUMENTS: tl.constexpr, BJ: tl.constexpr):
    """INDEX (b, chunks, e) int32, -1 before: the rows whose interval holds the chunk, ascending."""
    c = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    begin = 0
    if DOCUMENTS:
        begin = tl.load(START + b * L + c * C)
    out = INDEX + (b * tl.num_programs(0) + c) * E
    found = 0
    for j0 in range(begin, tl.minimum((c + 1) * C - W, L), BJ):
        j = j0 + tl.arange(0, BJ)
        eligible = (j < (c + 1) * C - W) & (j < L)
        leave = tl.load(LEAVE + b * L + j, mask=eligible, other=-1)
        member = eligible & (leave > c)
        rank = found + tl.cumsum(member.to(tl.int32), 0) - 1
        tl.store(out + rank, j, mask=member & (rank < E))
        found += tl.sum(member.to(tl.int32), 0)
