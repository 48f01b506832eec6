"""The scheduler: whatever runs beside it, an answer is the one the same prompt gets alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmojo_edge.config import Config
from bmojo_edge.engine import LM, join_rows, take_rows
from bmojo_edge.generate import Continuation, stream
from bmojo_edge.mlx import Model, load_weights
from bmojo_edge.sampling import LogitsError
from bmojo_edge.server.scheduler import Job, Said, Scheduler, likeliest
from bmojo_edge.state import leaves
from bmojo_edge.tokenizer import Tokenizer
from tests.helpers import assert_states_equal, odd, random_tokens, random_weights
from tests.unit.test_generation_engines import make


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def lm(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> LM:
    return make(request.param, tokenizer)


@pytest.fixture(scope="module")
def mlx_lm(tokenizer: Tokenizer) -> LM:
    return make("mlx", tokenizer)


class Asked(Job):
    """A job that remembers what it was told."""

    def __init__(self, lm: LM, ids: list[int], top: int = 0, **options: Any) -> None:
        self.told: list[Said | Exception] = []
        super().__init__(Continuation(lm, None, ids, **options), self.told.append, top)

    @property
    def ids(self) -> list[int]:
        return [event.token.id for event in self.told if isinstance(event, Said)]

    @property
    def ended(self) -> bool:
        last = self.told[-1] if self.told else None
        return isinstance(last, Exception) or (last is not None and last.token.finish_reason is not None)


def run(scheduler: Scheduler) -> None:
    for _ in range(2000):
        if not scheduler.busy:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def alone(lm: LM, ids: list[int], **options: Any) -> list[int]:
    return [token.id for token in stream(lm, ids, **options)]


def prompts(lm: LM, *lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, lm.config.vocab_size, n).tolist() for n in lengths]


def test_a_ragged_batch_answers_as_each_prompt_does_alone(lm: LM) -> None:
    scheduler = Scheduler(lm, slots=8, max_running=4, block=5)
    lengths, answers = (1, 3, 30, 17, 40, 2), (26, 25, 24, 1, 9, 5)
    asked = [Asked(lm, ids, max_tokens=n) for ids, n in zip(prompts(lm, *lengths), answers, strict=True)]
    widest = 0
    for job in asked[:4]:
        scheduler.submit(job)
    for i in range(80):
        if i == 6:  # others come while these are being answered
            for job in asked[4:]:
                scheduler.submit(job)
        widest = max(widest, scheduler.counts.running)
        assert sum(scheduler.counts[1:]) <= 8
        scheduler.step()
    assert not scheduler.busy
    assert widest >= 3
    for job in asked:
        assert job.ids == alone(lm, job.prompt.tolist(), max_tokens=job.run._max_tokens)
        assert job.ended


def test_sampling_follows_the_seed_whoever_is_beside(mlx_lm: LM) -> None:
    options = {"max_tokens": 15, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3}
    scheduler = Scheduler(mlx_lm, slots=4)
    asked = [Asked(mlx_lm, ids, seed=i, **options) for i, ids in enumerate(prompts(mlx_lm, 5, 9, 30))]
    for job in asked:
        scheduler.submit(job)
    run(scheduler)
    for i, job in enumerate(asked):
        assert job.ids == alone(mlx_lm, job.prompt.tolist(), seed=i, **options)


def test_a_conversation_goes_on_without_reading_its_past_again(mlx_lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    prefill = mlx_lm.prefill
    monkeypatch.setattr(
        type(mlx_lm), "prefill", lambda self, ids, state: (read.append(ids.size), prefill(ids, state))[1]
    )
    scheduler = Scheduler(mlx_lm, slots=4, block=8)
    (ids,) = prompts(mlx_lm, 30)
    known = 0  # ids that the state of the last answer has taken in
    job = Asked(mlx_lm, ids, max_tokens=7)
    for _ in range(3):
        job = Asked(mlx_lm, ids, max_tokens=7)
        scheduler.submit(job)
        read.clear()
        run(scheduler)
        assert sum(read) == len(ids) - 1 - job.cached
        assert job.cached == known
        assert job.ids == alone(mlx_lm, ids, max_tokens=7)
        known = len(ids) + len(job.run.ids) - len(job.run.pending)
        ids = [*ids, *job.run.ids, 5, 6, 7]
    again = Asked(mlx_lm, job.prompt.tolist(), max_tokens=7)  # the same question once more
    scheduler.submit(again)
    read.clear()
    run(scheduler)
    assert read == []
    assert again.ids == job.ids


def test_a_long_prompt_does_not_hold_up_the_others(mlx_lm: LM) -> None:
    scheduler = Scheduler(mlx_lm, slots=4, block=4)
    short, long, third = prompts(mlx_lm, 3, 90, 12)
    first = Asked(mlx_lm, short, max_tokens=20)
    scheduler.submit(first)
    scheduler.step()
    reader, late = Asked(mlx_lm, long, max_tokens=3), Asked(mlx_lm, third, max_tokens=3)
    scheduler.submit(reader)
    scheduler.submit(late)
    for n in range(2, 16):
        scheduler.step()
        assert len(first.told) == n  # a token a step, however much there is to read
    assert late.ended  # prompts are read in turns: the shorter is not behind the longer
    assert not reader.told
    run(scheduler)
    assert reader.ids == alone(mlx_lm, long, max_tokens=3)


def test_short_prompts_are_read_together(mlx_lm: LM) -> None:
    scheduler = Scheduler(mlx_lm, slots=8, block=10)
    first, *short, long = (Asked(mlx_lm, ids, max_tokens=30) for ids in prompts(mlx_lm, 3, 4, 4, 4, 4, 60))
    scheduler.submit(first)
    scheduler.step()
    for job in (long, *short):
        scheduler.submit(job)
    scheduler.step()  # a block of the long one
    assert scheduler.counts[1:3] == (5, 1)
    scheduler.step()  # three of the short ones, of three tokens each but for the last
    assert scheduler.counts[1:3] == (2, 4)
    run(scheduler)
    for job in (first, long, *short):
        assert job.ids == alone(mlx_lm, job.prompt.tolist(), max_tokens=30)


def test_cancelling_frees_the_place_and_leaves_the_others_as_they_were(mlx_lm: LM) -> None:
    scheduler = Scheduler(mlx_lm, slots=3, max_running=3, block=4)
    running, other, reading, waiting = (Asked(mlx_lm, ids, max_tokens=14) for ids in prompts(mlx_lm, 3, 4, 200, 6))
    for job in (running, other, reading, waiting):
        scheduler.submit(job)
    for _ in range(6):
        scheduler.step()
    assert scheduler.counts[:3] == (1, 1, 2)
    scheduler.cancel(reading)
    scheduler.cancel(running)
    said = len(running.told)
    assert scheduler.counts[:3] == (1, 0, 1)
    assert 0 < said < 14
    run(scheduler)
    assert len(running.told) == said
    assert not reading.told
    for job in (other, waiting):
        assert job.ids == alone(mlx_lm, job.prompt.tolist(), max_tokens=14)
    assert scheduler.counts[:3] == (0, 0, 0)
    scheduler.cancel(other)  # has ended: nothing happens
    # What the cancelled answer had said is not lost: its conversation goes on from there.
    on = Asked(mlx_lm, [*running.prompt.tolist(), *running.run.ids, 5], max_tokens=4)
    scheduler.submit(on)
    run(scheduler)
    assert on.ids == alone(mlx_lm, on.prompt.tolist(), max_tokens=4)


def test_a_token_that_ends_the_sequence_and_stop_strings(mlx_lm: LM) -> None:
    (ids,) = prompts(mlx_lm, 12)
    answer = alone(mlx_lm, ids, max_tokens=12)
    tokens = list(stream(mlx_lm, ids, max_tokens=12))
    stop = next(token.text for token in tokens[3:] if token.text.strip())
    scheduler = Scheduler(mlx_lm, slots=2)
    job, beside = Asked(mlx_lm, ids, max_tokens=12, stop=stop), Asked(mlx_lm, ids, max_tokens=12)
    scheduler.submit(job)
    scheduler.submit(beside)
    run(scheduler)
    assert beside.ids == answer
    assert job.ids == alone(mlx_lm, ids, max_tokens=12, stop=stop) != answer
    assert stop not in job.run.text
    assert job.run.finish_reason == "stop"


def test_logits_that_are_no_numbers_end_one_job_and_not_its_neighbour(
    mlx_lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = (Asked(mlx_lm, ids, max_tokens=6) for ids in prompts(mlx_lm, 4, 5))

    def broken(logits: np.ndarray) -> Any:
        raise LogitsError("nan")

    monkeypatch.setattr(bad.run, "take", broken)
    scheduler = Scheduler(mlx_lm, slots=2)
    scheduler.submit(bad)
    scheduler.submit(good)
    run(scheduler)
    assert [type(event) for event in bad.told] == [LogitsError]
    assert good.ids == alone(mlx_lm, good.prompt.tolist(), max_tokens=6)


def test_the_likeliest_tokens(mlx_lm: LM) -> None:
    job = Asked(mlx_lm, prompts(mlx_lm, 4)[0], top=5, max_tokens=3)
    scheduler = Scheduler(mlx_lm, slots=1)
    scheduler.submit(job)
    run(scheduler)
    for event in job.told:
        assert isinstance(event, Said)
        assert event.likeliest[0] == (event.token.id, pytest.approx(event.token.logprob, abs=1e-5))
    row = np.random.default_rng(0).normal(size=50)
    p = np.exp(row) / np.exp(row).sum()
    order = np.argsort(-row)[:4]
    assert likeliest(row, 4) == tuple((i, pytest.approx(np.log(p[i]))) for i in order)
    assert likeliest(row, 0) == ()


def test_full_attention_is_refused() -> None:
    config = odd("attention", "bmojo")
    model = load_weights(Model(config), random_weights(config))
    with pytest.raises(ValueError, match="full attention"):
        Scheduler(model, slots=2)


def test_rows_are_joined_and_taken(mlx_lm: LM) -> None:
    config: Config = mlx_lm.config
    states = [mlx_lm.prefill(random_tokens(config, 1, n, n), mlx_lm.init_state())[1] for n in (3, 20, 9)]
    joined = join_rows(states)
    assert {leaf.shape[0] for _, leaf in leaves(joined)} == {3}
    for i, state in enumerate(states):
        assert_states_equal(take_rows(joined, [i]), state)
    assert_states_equal(take_rows(joined, [2, 0]), join_rows([states[2], states[0]]))
