"""The plain PyTorch operations one by one, against loops over tokens and Python's integers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.helpers import assert_close

torch = pytest.importorskip("torch")

from bmojo_edge.torch import ops  # noqa: E402


def naive_scan(x, dt, A, B, C, D, state, reset):
    """One token at a time in float64."""
    x, dt, A, B, C, D, s = (y.double() for y in (x, dt, A, B, C, D, state))
    out = []
    for t in range(x.shape[1]):
        if reset is not None:
            s = torch.where(reset[:, t, None, None], 0, s)
        s = torch.exp(dt[:, t, :, None] * A) * s + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        out.append((s * C[:, t, None]).sum(-1) + D * x[:, t])
    return torch.stack(out, dim=1), s


@pytest.mark.parametrize("t", [1, 2, 31, 32, 33, 64, 65, 150])
@pytest.mark.parametrize("steps", ["small", "huge", "mixed"])
def test_selective_scan(t: int, steps: str) -> None:
    torch.manual_seed(t)
    b, d, n = 2, 5, 3
    dt = torch.rand(b, t, d) * {"small": 1e-3, "huge": 200.0, "mixed": 1.0}[steps]
    if steps == "mixed":  # states kept for ever beside states forgotten at once
        dt = dt * 10.0 ** torch.randint(-6, 3, (b, t, d))
    dt[:, ::5] = 0
    inputs = (torch.randn(b, t, d), dt, -torch.exp(torch.randn(d, n)), torch.randn(b, t, n), torch.randn(b, t, n))
    D, state = torch.randn(d), torch.randn(b, d, n) * 10
    for reset in (None, torch.rand(b, t) < 0.05):
        y, last = ops.selective_scan(*inputs, D, state, reset)
        ref, ref_last = naive_scan(*inputs, D, state, reset)
        assert_close(y, ref, 1e-6)
        assert_close(last, ref_last, 1e-6)


def test_selective_scan_without_steps_keeps_the_state_exactly() -> None:
    x, B = torch.randn(1, 100, 4), torch.randn(1, 100, 3)
    state = torch.randn(1, 4, 3)
    _, last = ops.selective_scan(x, torch.zeros_like(x), -torch.ones(4, 3), B, B, torch.ones(4), state)
    assert torch.equal(last, state)


def test_selective_scan_step_is_one_token_of_the_scan() -> None:
    torch.manual_seed(0)
    x, dt, A, B, C, D, s = (
        torch.randn(shape) for shape in [(2, 1, 5), (2, 1, 5), (5, 3), (2, 1, 3), (2, 1, 3), 5, (2, 5, 3)]
    )
    y, last = ops.selective_scan(x, dt.exp(), -A.exp(), B, C, D, s)
    y_step, last_step = ops.selective_scan_step(x[:, 0], dt[:, 0].exp(), -A.exp(), B[:, 0], C[:, 0], D, s)
    assert_close(y_step, y[:, 0], 1e-6)
    assert torch.equal(last_step, last)


def test_rotary_is_as_precise_at_any_position() -> None:
    rng = np.random.default_rng(0)
    turns = [int(f * 2.0**64) for f in (1 / (2 * math.pi), 0.013, 1e-7)]
    signed = torch.tensor([x - 2**64 if x >= 2**63 else x for x in turns])
    positions = [0, 1, 4095, 10**6, 10**9, 2**40 + 7, 2**62 + 1, *rng.integers(0, 2**62, 50).tolist()]
    at = ops.rotary(torch.tensor([positions]), signed, torch.float32)
    for n, position in enumerate(positions):
        for j, turn in enumerate(turns):
            angle = 2 * math.pi * (position * turn % 2**64) / 2**64  # Python's integers do not wrap by themselves
            assert abs(float(at.cos[0, n, j]) - math.cos(angle)) < 4e-7
            assert abs(float(at.sin[0, n, j]) - math.sin(angle)) < 4e-7
    x = torch.randn(1, 2, len(positions), 6)
    assert_close(ops.rotate(ops.rotate(x, at), at, inverse=True), x, 3e-7)
    assert_close(ops.rotate(x, at).norm(dim=-1), x.norm(dim=-1), 3e-7)


def test_causal_conv_and_innovation_look_back_no_further_than_told() -> None:
    torch.manual_seed(0)
    x, past, weight, bias = torch.randn(2, 9, 4), torch.randn(2, 3, 4), torch.randn(4, 4), torch.randn(4)
    lookback = torch.tensor([[7, 8, 9, 0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    coefficients = [0.5, 0.25, 0.25]
    conv = ops.causal_conv(x, past, weight, bias, lookback)
    scores = ops.innovation_scores(x, past, coefficients, "relative", lookback)
    padded = torch.cat([past, x], dim=1)
    for b in range(2):
        for t in range(9):
            reach = int(lookback[b, t])
            seen = [padded[b, 3 + t - j] if j <= reach else torch.zeros(4) for j in range(4)]
            ref = sum((y * weight[:, 3 - j] for j, y in enumerate(seen)), start=bias)
            assert_close(conv[b, t], ref, 1e-6)
            miss = seen[0] - sum((c * y for c, y in zip(coefficients, seen[1:], strict=True)), start=torch.zeros(4))
            assert math.isclose(scores[b, t], miss.square().sum() / (seen[0].square().sum() + 1e-6), rel_tol=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_select_eidetic_by_brute_force(ties: bool) -> None:
    rng = np.random.default_rng(0)
    n, e, first = 40, 4, 2
    scores = torch.tensor(rng.integers(0, 3, (2, n)) if ties else rng.random((2, n)), dtype=torch.float32)
    document = torch.tensor([[0] * 25 + [1] * 10 + [-1] * 5, [0] * 40])
    position = torch.tensor([[*range(100, 125), *range(10), *[0] * 5], [-1, -1, *range(38)]])
    limit, owner = torch.tensor([[110, 119, 0, 6, 9], [0, -3, 4, 20, 38]]), torch.tensor([[0, 0, 1, 1, 1], [0] * 5])
    got = ops.select_eidetic(ops.Candidates(scores, position, document), ops.Chunks(limit, owner), first, e)
    for b, c in np.ndindex(2, 5):
        eligible = [
            i for i in range(n)
            if document[b, i] == owner[b, c] and first <= position[b, i] < limit[b, c]
        ]  # fmt: skip
        best = sorted(sorted(eligible, key=lambda i: (-float(scores[b, i]), i))[:e])
        assert got[b, c].tolist() == best + [-1] * (e - len(best))


def naive_attention(memories, scale):
    """One query of one head: (q, keys, values) of each memory, one softmax."""
    scores = torch.cat([keys @ q * scale for q, keys, _ in memories])
    return scores.softmax(0) @ torch.cat([values for _, _, values in memories])


def test_memory_attention_by_brute_force() -> None:
    torch.manual_seed(0)
    b, h, g, t, p, m, size = 2, 4, 2, 300, 6, 5, 7  # tokens cross tiles; two rows stand at different positions
    start = torch.tensor([11, 64])
    position = start[:, None] + torch.arange(t)
    held = start[:, None] - 1 - torch.arange(m)
    columns = torch.cat([held, position], dim=1)

    def draw(heads, n):
        return torch.randn(b, heads, n, p, dtype=torch.float64)

    near = ops.Band(draw(h, t), draw(g, m + t), draw(g, m + t), columns, None, 0, 9)
    far = ops.Band(draw(h, t), draw(g, m + t), draw(g, m + t), columns, None, 9, 14)
    first = start[:, None] // size
    chunk = position // size - first
    index = torch.randint(-1, 20, (b, int(chunk.max()) + 1, 3))
    pinned = ops.Pinned(draw(h, t), draw(g, 20), draw(g, 20), torch.randint(0, 90, (b, 20)), index, 9)
    at = ops.Queries(position, None, chunk, chunk * size + position % size, size)
    got = ops.memory_attention([near, far], pinned, at, 0.4)
    for row, head, n in [(r, x, i) for r in range(b) for x in range(h) for i in (0, 1, 8, 127, 128, 200, 299)]:
        memories, i = [], position[row, n]
        for band in (near, far):
            assert band.far is not None
            d = i - columns[row]
            seen = (d >= band.near) & (d < band.far)
            kv = head // (h // g)
            memories.append((band.q[row, head, n], band.k[row, kv][seen], band.v[row, kv][seen]))
        listed = [j for j in index[row, chunk[row, n]].tolist() if j >= 0 and pinned.position[row, j] <= i - 9]
        memories.append((pinned.q[row, head, n], pinned.k[row, kv][listed], pinned.v[row, kv][listed]))
        assert_close(got[row, head, n], naive_attention(memories, 0.4), 1e-12)
