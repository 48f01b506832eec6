"""Rows of training against the documents they are cut from."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from bmojo_edge.checks import ConfigError
from bmojo_edge.dataset import Dataset
from bmojo_edge.torch.data import NO_TARGET, Rows, Stream
from tests.training import make_data

SIZES = [40, 7, 90, 3, 25, 61, 33, 12, 80, 5]


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Documents whose tokens tell where they are from: no two stretches of three tokens are alike."""
    return make_data(tmp_path / "data", SIZES, vocab=30_000)


def documents_of(rows: Rows, data: Dataset) -> list[tuple[int, int, int, int, int]]:
    """(row, first column, document, first token, length) of every stretch of real tokens; checks tokens and targets."""
    found = []
    text = [data.document(n).tolist() for n in range(data.n_documents)]
    for r, (tokens, targets, segments) in enumerate(zip(rows.tokens, rows.targets, rows.segments, strict=True)):
        for segment in sorted({*segments.tolist()} - {-1}):
            (columns,) = np.nonzero(segments == segment)
            low, high = int(columns[0]), int(columns[-1]) + 1
            assert high - low == len(columns)
            piece = tokens[low:high].tolist()
            (place,) = [(n, i) for n, t in enumerate(text) for i in range(len(t)) if t[i : i + len(piece)] == piece]
            n, i = place
            following = text[n][i + 1 : i + 1 + len(piece)]
            assert targets[low:high].tolist() == following + [NO_TARGET] * (len(piece) - len(following))
            found.append((r, low, n, i, len(piece)))
        padding = segments == -1
        assert (targets[padding] == NO_TARGET).all() and (tokens[padding] == 0).all()
    return found


@pytest.mark.parametrize("align", [1, 3, 4])
def test_rows_are_stretches_of_documents_on_the_grid(data: Dataset, align: int) -> None:
    stream = Stream(data, 12, 2, align, carry=True, seed=3)
    for step in range(stream.steps_per_epoch):
        for _, column, _, first, _ in documents_of(stream.rows(step, 0, 2), data):
            if first == 0:
                assert column % align == 0


@pytest.mark.parametrize("carry", [True, False])
def test_an_epoch_reads_every_token_at_most_once_and_nearly_all(data: Dataset, carry: bool) -> None:
    stream, seen = Stream(data, 12, 2, 1, carry, seed=3), np.zeros(data.n_tokens, int)
    for step in range(stream.steps_per_epoch):
        for _, _, n, first, length in documents_of(stream.rows(step, 0, 2), data):
            seen[data.offsets[n] + first : data.offsets[n] + first + length] += 1
    assert seen.max() == 1
    assert data.n_tokens - seen.sum() < 2 * 12


def test_a_row_goes_on_where_it_ended(data: Dataset) -> None:
    stream = Stream(data, 12, 3, 1, carry=True, seed=5)
    steps = [stream.rows(step, 0, 3) for step in range(stream.steps_per_epoch)]
    assert steps[0].restarts.all()
    for before, after in itertools.pairwise(steps):
        for row in range(3):
            ended = before.targets[row, -1] == NO_TARGET
            assert after.restarts[row] == ended
            if not ended:
                assert after.tokens[row, 0] == before.targets[row, -1]


def test_rows_follow_from_seed_step_and_row(data: Dataset) -> None:
    for carry in (True, False):
        whole = Stream(data, 12, 4, 3, carry, seed=1).rows(7, 0, 4)
        part = Stream(data, 12, 4, 3, carry, seed=1).rows(7, 2, 2)
        other = Stream(data, 12, 4, 3, carry, seed=2).rows(7, 0, 4)
        for ours, theirs in zip(whole, part, strict=True):
            np.testing.assert_array_equal(ours[2:], theirs)
        assert (whole.tokens != other.tokens).any()


def test_epochs_differ_in_order(data: Dataset) -> None:
    stream = Stream(data, 12, 2, 1, seed=1)
    first, second = stream.rows(0, 0, 2), stream.rows(stream.steps_per_epoch, 0, 2)
    assert (first.tokens != second.tokens).any()
    assert second.restarts.all()


def test_validation_is_in_order(data: Dataset) -> None:
    stream = Stream(data, 12, 1, 1, seed=None)
    got = np.concatenate([stream.rows(step, 0, 1).tokens[0] for step in range(stream.steps_per_epoch)])
    np.testing.assert_array_equal(got, data.tokens[: len(got)])


def test_plain_rows_are_parts_of_one_document(tmp_path: Path) -> None:
    stream = Stream(make_data(tmp_path / "long", [1000]), 12, 2, 4)
    assert all(stream.rows(step, 0, 2).plain for step in range(5))
    short = Stream(make_data(tmp_path / "short", [5] * 100), 12, 2, 4)
    assert not short.rows(0, 0, 2).plain


def test_data_too_small_for_a_step_is_named(data: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"batch.tokens: a step takes 40 rows of 12 tokens, .*data has 29"):
        Stream(data, 12, 40)
