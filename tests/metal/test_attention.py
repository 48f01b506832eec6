"""Attention over all memories: the kernels against float64, against the plain op, gradients, errors."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

mx = pytest.importorskip("mlx.core")

from bmojo_metal import memory_attention, memory_attention_step, use_kernels  # noqa: E402
from bmojo_metal.attention import Band, Pinned, Queries  # noqa: E402
from bmojo_metal.attention_step import Slots  # noqa: E402
from metal_kernels.host import ORDERS, Run  # noqa: E402
from metal_kernels.host.runtime import Order  # noqa: E402
from tests.metal import attention_cases  # noqa: E402
from tests.metal.case import Case, kernels  # noqa: E402

CASES = attention_cases.cases()


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_pass_the_checker_and_equal_the_oracle(case: Case, order: Order) -> None:
    case.verify(Run(mode="check", order=order, seed=5))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_ops_equal_the_oracle(case: Case) -> None:
    case.compare(case.call())


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("case", [CASES[0], CASES[3], *CASES[-4:]], ids=lambda case: case.name)
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


def call_arguments() -> tuple[list[Band], Any, Queries]:
    """Two rows, nine tokens after 7 and 4, two bands and two chunks' lists, in float32."""
    position = mx.array([[7], [4]]) + mx.arange(9)
    at = Queries((7, 4), position, position // 8 - position[:, :1] // 8, {})

    def array(heads: int, n: int, seed: int) -> Any:
        return mx.random.normal((2, heads, n, 8), key=mx.random.key(seed))

    bands = [Band(array(4, 9, 0), array(2, 14, 1), array(2, 14, 2), 0, 5)]
    bands += [Band(array(4, 9, 3), array(2, 16, 4), array(2, 16, 5), 5, 8)]
    index = mx.array([[[0, 1, -1], [0, 2, 3], [0, 1, 3]], [[0, -1, -1], [0, 1, 2], [0, 2, 3]]])
    held = mx.array([[0, 3, 5, 6], [0, 1, 5, 6]])
    return bands, Pinned(array(4, 9, 6), array(2, 4, 7), array(2, 4, 8), held, index, 5), at


@pytest.mark.usefixtures("harness")
def test_gradients_are_those_of_the_plain_op() -> None:
    bands, pinned, at = call_arguments()

    def loss(q: Any, k: Any, v: Any, pinned_k: Any) -> Any:
        first, pins = bands[0]._replace(q=q, k=k, v=v), pinned._replace(k=pinned_k)
        return memory_attention([first, bands[1]], pins, at, 0.3).square().sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2, 3))
    want = gradient(*bands[0][:3], pinned.k)
    with kernels(Run(mode="fast")):
        got = gradient(*bands[0][:3], pinned.k)
        mx.eval(got)
    for a, b in zip(got, want, strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("harness")
def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    bands, pinned, at = call_arguments()
    chunk: Any = at.chunk
    assert at.start is not None
    with kernels(Run(mode="fast")):
        whole = memory_attention(bands, pinned, at, 0.3)
        for row in range(2):
            part = slice(row, row + 1)
            alone = memory_attention(
                [band._replace(q=band.q[part], k=band.k[part], v=band.v[part]) for band in bands],
                pinned._replace(**{name: getattr(pinned, name)[part] for name in Pinned._fields[:5]}),
                Queries(at.start[part], at.position[part], chunk[part], {}),
                0.3,
            )
            assert mx.array_equal(alone[0], whole[row])


def test_calls_with_one_band_in_sight_are_left_to_mlx() -> None:
    bands, pinned, at = call_arguments()
    young = Queries((0, 0), mx.broadcast_to(mx.arange(5), (2, 5)), mx.zeros((2, 5), mx.int32), {})
    short = [Band(x.q[:, :, :5], x.k[:, :, :5], x.v[:, :, :5], x.near, x.far) for x in bands]
    early = pinned._replace(q=pinned.q[:, :, :5])

    def refuse(**_: Any) -> Any:
        raise AssertionError("a kernel of ours was made")

    with patch.object(mx.fast, "metal_kernel", refuse), use_kernels(True):
        memory_attention(bands[:1], None, at, 0.3)
        memory_attention(short, early, young, 0.3)
        with pytest.raises(AssertionError, match="a kernel of ours"):
            memory_attention(bands, None, at, 0.3)


def test_memories_of_a_call_that_do_not_fit_are_refused() -> None:
    bands, pinned, at = call_arguments()
    one, two = bands
    for wrong, pins, queries, message in (
        ([], None, at, "first band must have near 0"),
        ([two, one], None, at, "first band must have near 0"),
        ([one._replace(q=one.q[:, :3])], None, at, "3 query heads do not share 2"),
        ([one, two._replace(v=two.v[:, :, :4])], None, at, "v must have shape"),
        ([one, two._replace(k=two.k[:, :, :8], v=two.v[:, :, :8])], None, at, "columns end with the call's 9 tokens"),
        ([one, two._replace(q=two.q.astype(mx.bfloat16))], None, at, "q must be float32"),
        ([one], None, at._replace(start=(7,)), "start must have 2"),
        ([one], None, at._replace(position=at.position[:, 1:]), "position must have shape"),
        ([one], pinned._replace(position=pinned.position[:, 1:]), at, "position must have shape"),
        ([one], pinned, at._replace(chunk=None), "queries must have chunks"),
        ([one], pinned._replace(index=mx.zeros((2, 3, 3))), at, "index must be int32 or int64"),
    ):
        with pytest.raises(ValueError, match=message):
            memory_attention(wrong, pins, queries, 0.3)


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
