"""The tasks ask what their papers say, and what they ask can be answered from what stands before."""

import numpy as np
import pytest

from apps.repro.tasks import IGNORED, TASKS, far_queries, fuzzy_recall, multi_query

N = 200
SIZES = {"induction_heads": 1, "selective_copying": 9}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seq_len", [64, 97])
def test_shapes_and_vocabulary(name: str, seq_len: int) -> None:
    tokens, targets = TASKS[name].make(np.random.default_rng(0), N, seq_len, SIZES.get(name, 8))
    assert tokens.shape == targets.shape == (N, seq_len)
    assert tokens.min() >= 0 and tokens.max() < TASKS[name].vocab_size
    asked = targets[targets != IGNORED]
    assert asked.min() >= 0 and asked.max() < TASKS[name].vocab_size
    if name not in ("noisy_recall", "fuzzy_recall"):  # there the draw may never repeat a key
        assert (targets != IGNORED).any(axis=1).all()


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_is_a_data_set(name: str) -> None:
    def make(seed: int) -> np.ndarray:
        return TASKS[name].make(np.random.default_rng(seed), N, 64, SIZES.get(name, 8)).tokens

    np.testing.assert_array_equal(make(5), make(5))
    assert (make(5) != make(6)).any()


def test_mqar_asks_each_key_once_and_its_value_is_right() -> None:
    pairs = 16
    tokens, targets = multi_query(np.random.default_rng(1), N, 256, pairs)
    for row, asked in zip(tokens, targets, strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len({*keys}) == len({*values}) == pairs
        assert keys.min() >= 1 and keys.max() <= 4095 and values.min() >= 4096 and values.max() <= 8191
        columns = np.flatnonzero(asked != IGNORED)
        assert len(columns) == pairs and columns.min() >= 2 * pairs and (columns % 2 == 0).all()
        assert {*zip(row[columns], asked[columns], strict=True)} == {*zip(keys, values, strict=True)}
        rest = np.delete(row[2 * pairs :], columns - 2 * pairs)
        assert not rest.any()


def test_mqar_slots_follow_the_power_law() -> None:
    """With one pair, slot j (from 1) has probability j^(alpha-1) over the sum of all."""
    slots = 15
    _, targets = multi_query(np.random.default_rng(2), 20_000, 2 + 2 * slots, 1)
    seen = np.bincount((targets != IGNORED).argmax(axis=1) // 2 - 1, minlength=slots) / 20_000
    wanted = np.arange(1, slots + 1) ** -0.99
    wanted /= wanted.sum()
    assert np.abs(seen - wanted).max() < 4 * np.sqrt(0.25 / 20_000)


def test_mqar_refuses_too_many_pairs() -> None:
    with pytest.raises(ValueError, match="seq_len"):
        multi_query(np.random.default_rng(0), 4, 64, 17)


def test_far_queries_stand_at_the_end() -> None:
    tokens, targets = far_queries(np.random.default_rng(3), N, 300, 8)
    assert (targets[:, : 300 - 16] == IGNORED).all()
    assert ((targets != IGNORED).sum(axis=1) == 8).all()
    assert not tokens[:, 16 : 300 - 16].any()


def test_selective_copying_keeps_the_order() -> None:
    tokens, targets = TASKS["selective_copying"].make(np.random.default_rng(4), N, 64, 9)
    for row, asked in zip(tokens, targets, strict=True):
        np.testing.assert_array_equal(row[row > 1], asked[-9:])


def test_induction_answer_follows_the_special_token() -> None:
    tokens, targets = TASKS["induction_heads"].make(np.random.default_rng(5), N, 32, 1)
    for row, asked in zip(tokens, targets, strict=True):
        first, last = np.flatnonzero(row == 0)
        assert last == 31 and asked[31] == row[first + 1]


def test_noisy_recall_asks_only_what_was_shown() -> None:
    tokens, targets = TASKS["noisy_recall"].make(np.random.default_rng(6), N, 64, 8)
    asked = 0
    for row, wanted in zip(tokens, targets, strict=True):
        known: dict[int, int] = {}
        for column in range(0, 64, 2):
            key, value = int(row[column]), int(row[column + 1])
            if key >= 128:
                assert wanted[column] == IGNORED
                continue
            assert wanted[column] == known.get(key, IGNORED)
            asked += key in known
            known[key] = value
    assert asked > N


def test_fuzzy_recall_spells_whole_values() -> None:
    """Reading a row from its left, the values seen before are predicted token by token."""
    tokens, targets = fuzzy_recall(np.random.default_rng(7), N, 64, 4)
    assert (targets != IGNORED).sum() > N
    for row, asked in zip(tokens, targets, strict=True):
        for column in np.flatnonzero(asked != IGNORED):
            assert row[column + 1] == asked[column] and 64 <= asked[column] < 128
        assert (row[np.flatnonzero(row == 128)[:1].sum() :] == 128).all() or not (row == 128).any()
