"""Attention over all memories: the kernels against float64, against the plain op, gradients, errors."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

mx = pytest.importorskip("mlx.core")

from bmojo_metal import memory_attention_step, use_kernels  # noqa: E402
from bmojo_metal.attention_step import Slots  # noqa: E402
from metal_kernels.host import ORDERS, Run  # noqa: E402
from metal_kernels.host.runtime import Order  # noqa: E402
from tests.metal import attention_cases  # noqa: E402
from tests.metal.case import Case, kernels  # noqa: E402

CASES = attention_cases.step_cases()


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_pass_the_checker_and_equal_the_oracle(case: Case, order: Order) -> None:
    case.verify(Run(mode="check", order=order, seed=5))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_ops_equal_the_oracle(case: Case) -> None:
    case.compare(case.call())


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case.name)
def test_every_lane_order_gives_the_same_bits(case: Case) -> None:
    one, *others = (case.verify(Run(mode="fast", order=order, seed=3)) for order in ORDERS)
    assert all(one[0].tobytes() == other[0].tobytes() for other in others)


def step_arguments(sizes: tuple[int, ...] = (5, 8, 2, 4)) -> tuple[list[Slots], Any]:
    """Memories of two rows of three heads of eight in float32, and the rows' positions."""
    position, held = mx.array([11, 6]), (None, None, mx.arange(2)[None], mx.array([[3, 4, 5, -1], [1, -1, -1, -1]]))
    nears = (0, 5, 5, 5)
    memories = [
        Slots(
            mx.random.normal((2, 4, 1, 8), key=mx.random.key(n)),
            mx.random.normal((2, 2, n, 8), key=mx.random.key(n + 20)),
            mx.random.normal((2, 2, n, 8), key=mx.random.key(n + 40)),
            near,
            which,
        )
        for n, near, which in zip(sizes, nears, held, strict=False)
    ]
    return memories, position


@pytest.mark.usefixtures("harness")
def test_gradients_are_those_of_the_plain_step() -> None:
    memories, position = step_arguments()

    def loss(q: Any, k: Any, v: Any) -> Any:
        first = Slots(q, k, v)
        return memory_attention_step([first, *memories[1:]], position, 0.3).square().sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2))
    want = gradient(*memories[0][:3])
    with kernels(Run(mode="fast")):
        got = gradient(*memories[0][:3])
        mx.eval(got)
    for a, b in zip(got, want, strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("harness")
def test_a_single_memory_is_left_to_mlx() -> None:
    memories, position = step_arguments((5,))
    want = memory_attention_step(memories, position, 0.3)

    def refuse(**_: Any) -> Any:
        raise AssertionError("a kernel of ours was made")

    with patch.object(mx.fast, "metal_kernel", refuse), use_kernels(True):
        got = memory_attention_step(memories, position, 0.3)
    assert mx.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_ready_made_mask_says_the_same() -> None:
    memories, position = step_arguments()
    held = position[:, None] - (position[:, None] - mx.arange(8)) % 8
    mask = mx.where((held >= 0) & (held <= position[:, None] - 5), 0.0, -float("inf"))[:, None, None]
    masked = [memories[0], memories[1]._replace(mask=mask), *memories[2:]]
    assert mx.array_equal(memory_attention_step(masked, position, 0.3), memory_attention_step(memories, position, 0.3))


def test_memories_that_do_not_fit_are_refused() -> None:
    memories, position = step_arguments()
    ring, faded = memories[:2]
    for wrong, message in (
        ([], "first memory must be a ring"),
        ([faded, ring], "first memory must be a ring"),
        ([memories[2]], "first memory must be a ring"),
        ([ring._replace(q=ring.q[:, :3])], "3 query heads do not share 2"),
        ([ring, faded._replace(v=faded.v[:, :, :4])], "v must have shape"),
        ([ring, faded._replace(k=faded.k.astype(mx.float16))], "k must be float32"),
        ([ring._replace(k=ring.k[:, :, :0], v=ring.v[:, :, :0])], "needs slots"),
        ([ring, memories[3]._replace(held=mx.zeros((2, 3), mx.int32))], "held must have shape"),
        ([ring, memories[3]._replace(held=mx.zeros((2, 4)))], "held must be int64 or int32"),
    ):
        with pytest.raises(ValueError, match=message):
            memory_attention_step(wrong, position, 0.3)
    with pytest.raises(ValueError, match="position must have shape"):
        memory_attention_step(memories, position[:1], 0.3)
