"""Delete any barrier of any sample kernel, or weaken what it orders: the checker reports it, in every lane order."""

import re

import pytest

from metal_kernels.host import ORDERS, CheckError, Run
from metal_kernels.host.case import Case
from metal_kernels.host.runtime import Order

from . import samples

pytestmark = pytest.mark.usefixtures("harness")

BARRIER = re.compile(r"(threadgroup|simdgroup)_barrier\(mem_flags::mem_threadgroup\);")


def mutants() -> list[tuple[str, Case]]:
    mutants = []
    for case in (samples.window_attention(heads=1), samples.top_k(), samples.neighbours()):
        source = case.kernel.source
        for barrier in BARRIER.finditer(source):
            where = f"{case.kernel.name}:{source[: barrier.start()].count(chr(10)) + 1}"
            weaker = f"{barrier[1]}_barrier(mem_flags::mem_none);"
            for what, text in (("deleted", ""), ("ordering nothing", weaker)):
                mutant = case.with_source(source[: barrier.start()] + text + source[barrier.end() :])
                mutants.append((f"{where} {barrier[1]}_barrier {what}", mutant))
    return mutants


MUTANTS = mutants()


def test_the_samples_have_their_barriers() -> None:
    assert len(MUTANTS) == 2 * (6 + 3 + 2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("what", "mutant"), MUTANTS, ids=[what for what, _ in MUTANTS])
def test_a_missing_barrier_is_reported(what: str, mutant: Case, order: Order) -> None:
    with pytest.raises(CheckError) as caught:
        mutant.run(Run(mode="check", order=order, seed=3))
    assert {finding.kind for finding in caught.value.findings} & {"race", "uninitialised"}, str(caught.value)
