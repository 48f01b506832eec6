"""No body of a kernel can be broken in one place unnoticed, see mutate.py."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core")

from tests.metal import mutate

pytestmark = pytest.mark.usefixtures("harness")


def test_there_are_many_mutants() -> None:
    assert sum(1 for body in mutate.bodies() for _ in mutate.mutants(body)) >= 40


def test_explained_mutants_exist() -> None:
    assert {(m.body, m.line) for body in mutate.bodies() for m in mutate.mutants(body)} >= set(mutate.EQUIVALENT)


@pytest.mark.slow
@pytest.mark.parametrize("body", mutate.bodies())
def test_no_mutant_survives(body: str) -> None:
    assert mutate.unexplained(body) == []
