"""Sampling: filters equal transformers' logits processors, draws follow the distribution, options are checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmojo_edge.sampling import LogitsError, Sampler, Sampling, SamplingError, candidates, penalised

VOCAB = 61


def logits_of(seed: int, scale: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=VOCAB) * scale).astype(np.float32)


def softmax(scores: np.ndarray) -> np.ndarray:
    p = np.exp(scores - scores.max())
    return p / p.sum()


@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 17, VOCAB, VOCAB + 5]),
    top_p=st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    context=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
)
def test_filters_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, context: list[int]
) -> None:
    import torch
    from transformers.generation import logits_process as theirs

    logits = logits_of(seed)
    chain: list[Any] = [theirs.RepetitionPenaltyLogitsProcessor(penalty), theirs.TemperatureLogitsWarper(temperature)]
    chain += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    chain += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [theirs.MinPLogitsWarper(min_p)] if min_p else []
    expected = torch.from_numpy(logits.astype(np.float64))[None]
    for step in chain:
        expected = step(torch.tensor([context]), expected)

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    seen = np.zeros(VOCAB, dtype=np.bool_)
    seen[context] = True
    ids, p = candidates(logits, sampling, seen)
    ref = softmax(expected[0].numpy())
    assert ids.tolist() == np.flatnonzero(np.isfinite(expected[0].numpy())).tolist()
    np.testing.assert_allclose(p, ref[ids], rtol=2e-4, atol=1e-12)  # at temperature 0.1 a float32 ulp grows tenfold


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("top_p", [0.3, 0.999])
def test_top_p_of_a_large_vocabulary(top_p: float, scale: float) -> None:
    logits = (np.random.default_rng(0).normal(size=20_000) * scale).astype(np.float32)
    ids, p = candidates(logits, Sampling(temperature=1.0, top_p=top_p), np.zeros(20_000, np.bool_))
    descending = np.sort(softmax(logits.astype(np.float64)))[::-1]
    fewest = int((np.cumsum(descending) < top_p).sum()) + 1
    assert abs(len(ids) - fewest) <= 1 + 1e-4 * fewest
    assert logits[ids].min() >= np.delete(logits, ids).max()
    assert p.sum() == pytest.approx(1.0)


def test_the_inputs_stay_as_they_were() -> None:
    logits = logits_of(0)
    before = logits.copy()
    Sampler(Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2.0), VOCAB, [1]).choose(logits)
    assert (logits == before).all()


def test_greedy_is_the_likeliest_after_the_penalty() -> None:
    logits = np.array([1.0, 3.0, -1.0, 2.9], dtype=np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.1), 4)
    assert [sampler.choose(logits).id for _ in range(3)] == [1, 3, 1]  # 3.0, then 2.9 > 3.0 / 1.1, then 3.0 again
    assert Sampler(Sampling(repetition_penalty=1.1), 4, [1, 1, 1]).choose(logits).id == 3
    assert Sampler(Sampling(), 4, [1]).choose(logits).id == 1


def test_penalty_counts_a_token_once_and_pushes_both_signs_down() -> None:
    seen = np.array([True, True, False])
    got = penalised(np.array([2.0, -2.0, 2.0], dtype=np.float32), 2.0, seen)
    assert got.tolist() == [1.0, -4.0, 2.0]


def test_logprob_is_of_the_models_own_distribution() -> None:
    logits = logits_of(3)
    ref = np.log(softmax(logits.astype(np.float64)))
    for sampling in (Sampling(), Sampling(temperature=2.0, seed=1, top_k=5), Sampling(repetition_penalty=3.0)):
        chosen = Sampler(sampling, VOCAB, range(30)).choose(logits)
        assert chosen.logprob == pytest.approx(ref[chosen.id], abs=1e-5)


def test_draws_follow_the_distribution() -> None:
    logits = np.array([0.0, 1.0, 2.0, -math.inf, -1.0], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=1.5, seed=0), 5)
    n = 20_000
    counts = np.bincount([sampler.choose(logits).id for _ in range(n)], minlength=5)
    p = softmax(logits.astype(np.float64) / 1.5)
    assert counts[3] == 0
    error = (counts - n * p)[p > 0] / np.sqrt(n * p * (1 - p))[p > 0]
    assert np.abs(error).max() < 4


def test_a_seed_repeats_and_another_differs() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=5.0, seed=seed), VOCAB)
        return [sampler.choose(logits_of(i)).id for i in range(30)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = logits_of(5)
    assert Sampler(Sampling(temperature=temperature, top_p=0.9), VOCAB).choose(logits).id == logits.argmax()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = logits_of(0)
    logits[7] = bad
    with pytest.raises(LogitsError, match="logits"):
        Sampler(Sampling(temperature=temperature), VOCAB).choose(logits)


def test_all_tokens_forbidden_is_an_error() -> None:
    with pytest.raises(LogitsError, match="logits"):
        Sampler(Sampling(), VOCAB).choose(np.full(VOCAB, -np.inf, dtype=np.float32))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True]),
        ("top_p", [-0.1, 1.1, math.nan, None]),
        ("top_k", [-1, 1.5, "3", None, True]),
        ("min_p", [-0.1, 1.1, None]),
        ("repetition_penalty", [0, -1.0, math.inf, None]),
        ("seed", [-1, 1.5, "x"]),
    ],
)
def test_options_out_of_range_are_named(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(SamplingError, match=f"^{field}: must be .*got"):
            Sampling(**{field: value})


def test_numpy_numbers_are_numbers() -> None:
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(3)).top_k == 3  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e38, 1.7e308])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_beyond_all_measure_still_chooses(penalty: float, temperature: float) -> None:
    logits = np.array([1.0, -2.0, 0.0, 3.0], np.float32)
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=penalty, seed=0), 4, [0, 1, 2])
    assert sampler.choose(logits).id == (0 if penalty < 1 else 3)
    assert np.isfinite(penalised(logits, penalty, np.array([True, True, True, False]))).all()
