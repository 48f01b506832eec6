"""Generation on a deterministic model: prompts of every kind, every way to end, nothing fed twice or forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmojo_edge.chat_template import ChatTemplateError
from bmojo_edge.generate import PromptError, Token, generate, stream
from bmojo_edge.sampling import SamplingError
from bmojo_edge.tokenizer import Tokenizer
from tests.unit.fake_lm import FakeLM

PROMPT = "The river"


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.fixture
def lm(tokenizer: Tokenizer) -> FakeLM:
    return FakeLM(tokenizer)


def scripted(lm: FakeLM, text: str, end: list[int] | None = None) -> list[int]:
    """Make the model answer PROMPT with `text`, then the ids in `end`."""
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode_continuation(text) + (end or [])
    lm.says(ids, len(lm.tokenizer.encode(PROMPT)))
    return ids


def test_tokens_follow_the_models_own_logits(lm: FakeLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    tokens = list(stream(lm, PROMPT, max_tokens=20))
    logits, state = lm.prefill(np.array([ids]), lm.init_state())
    for token in tokens:
        assert token.id == logits[0].argmax()
        p = np.exp(logits[0].astype(np.float64))
        assert token.logprob == pytest.approx(np.log(p[token.id] / p.sum()), abs=1e-5)
        logits, state = lm.decode_one_token(np.array([token.id]), state)
    assert [t.finish_reason for t in tokens] == [None] * (len(tokens) - 1) + ["length"]
    assert "".join(t.text for t in tokens) == tokenizer.decode([t.id for t in tokens]) == generate(lm, PROMPT, 20)


def test_each_token_is_fed_once_and_the_last_not_at_all(lm: FakeLM, tokenizer: Tokenizer) -> None:
    tokens = list(stream(lm, PROMPT, max_tokens=7))
    assert lm.fed == [tokenizer.encode(PROMPT), *([t.id] for t in tokens[:-1])]


@pytest.mark.parametrize("end", [0, 2])
def test_every_end_of_sequence_id_ends_it_and_is_not_shown(lm: FakeLM, end: int) -> None:
    ids = scripted(lm, " runs 中", [end])
    tokens = list(stream(lm, PROMPT))
    assert [t.id for t in tokens] == ids
    assert tokens[-1] == Token("", end, tokens[-1].logprob, "stop")
    assert "".join(t.text for t in tokens) == " runs 中"


def test_end_of_sequence_on_the_last_allowed_token_is_a_stop(lm: FakeLM) -> None:
    ids = scripted(lm, " runs", [2])
    assert list(stream(lm, PROMPT, max_tokens=len(ids)))[-1].finish_reason == "stop"
    assert list(stream(lm, PROMPT, max_tokens=len(ids) - 1))[-1].finish_reason == "length"


def test_length_shows_what_was_held_back(lm: FakeLM, tokenizer: Tokenizer) -> None:
    emoji = tokenizer.encode_continuation("😀")
    scripted(lm, " END😀")
    n = len(tokenizer.encode_continuation(" END"))
    assert generate(lm, PROMPT, max_tokens=n, stop=["ENDING"]) == " END"
    assert generate(lm, PROMPT, max_tokens=n + len(emoji) - 1) == " END\ufffd"
    assert generate(lm, PROMPT, max_tokens=n + len(emoji)) == " END😀"


@given(at=st.integers(0, 10), length=st.integers(1, 8))
def test_a_stop_string_ends_it_wherever_tokens_meet(tokenizer: Tokenizer, at: int, length: int) -> None:
    lm, text = FakeLM(tokenizer), " runs 中😀 to the sea, naïve"
    ids = scripted(lm, text, [2])
    stop = text[at : at + length]
    tokens = list(stream(lm, PROMPT, stop=[stop, "never said"]))
    shown = text[: text.index(stop)]
    assert "".join(t.text for t in tokens) == shown
    assert tokens[-1].finish_reason == "stop"
    assert [t.id for t in tokens] == ids[: len(tokens)]
    assert stop in tokenizer.decode([t.id for t in tokens])  # it ends with the token that completes the stop string
    assert stop not in tokenizer.decode([t.id for t in tokens[:-1]])


def test_a_single_stop_string_need_not_be_a_list(lm: FakeLM) -> None:
    scripted(lm, " runs to the sea", [2])
    assert generate(lm, PROMPT, stop="the") == " runs to "


def test_prompts_of_every_kind(lm: FakeLM, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    for prompt, ids in (
        (PROMPT, tokenizer.encode(PROMPT)),
        ([5, 6, 7], [5, 6, 7]),
        (np.array([5, 6], dtype=np.int16), [5, 6]),
        ((5,), [5]),
        (messages, tokenizer.chat(messages)),
        ("", [1]),
        ([], [1]),
    ):
        lm.fed.clear()
        list(stream(lm, prompt, max_tokens=1))  # pyright: ignore[reportArgumentType]
        assert lm.fed == [ids]


def test_an_empty_prompt_begins_as_documents_do(byte_level_folder: Path) -> None:
    plain = Tokenizer.load(byte_level_folder)
    no_bos = Tokenizer(plain._backend, eos_ids=[4, 3])
    lm = FakeLM(no_bos)
    generate(lm, "", max_tokens=1)
    assert lm.fed == [[3]]
    with pytest.raises(PromptError, match="prompt: is empty"):
        stream(FakeLM(Tokenizer(plain._backend)), "")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([1, 420], r"prompt\[1\]: 420 is not an id of this model's 420 tokens"),
        ([-1], r"prompt\[0\]: -1"),
        ([1.5], r"prompt\[0\]: must be a token id"),
        ([[1, 2]], r"prompt\[0\]: must be a token id"),
        (["a"], r"prompt\[0\]: must be a token id"),
        ({"role": "user", "content": "x"}, "prompt: must be"),
    ],
)
def test_bad_prompts_are_named(lm: FakeLM, prompt: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        stream(lm, prompt)
    assert lm.fed == []


def test_bad_options_and_messages_are_named_before_anything_is_computed(lm: FakeLM) -> None:
    with pytest.raises(SamplingError, match="temperature: "):
        stream(lm, PROMPT, temperature=-1)
    with pytest.raises(SamplingError, match="max_tokens: "):
        stream(lm, PROMPT, max_tokens=-1)
    with pytest.raises(ValueError, match="stop: "):
        stream(lm, PROMPT, stop=[""])
    with pytest.raises(ChatTemplateError, match="role"):
        stream(lm, [{"content": "x"}])  # pyright: ignore[reportArgumentType]
    assert lm.fed == []


def test_no_tokens_wanted_none_computed(lm: FakeLM) -> None:
    assert list(stream(lm, PROMPT, max_tokens=0)) == []
    assert generate(lm, PROMPT, max_tokens=0) == ""
    assert lm.fed == []


def test_a_tokenizer_larger_than_the_model_is_noticed(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="wrong tokenizer"):
        generate(FakeLM(tokenizer, vocab_size=4), PROMPT)


def test_without_a_tokenizer_texts_are_refused() -> None:
    with pytest.raises(PromptError, match="no tokenizer"):
        generate(FakeLM(None, vocab_size=9), PROMPT)


def test_padded_vocabulary_is_silent(tokenizer: Tokenizer) -> None:
    lm = FakeLM(tokenizer, vocab_size=tokenizer.vocab_size + 8)
    lm.says([tokenizer.vocab_size + 3, 2], len(tokenizer.encode(PROMPT)))
    assert [t.text for t in stream(lm, PROMPT)] == ["", ""]


def test_seeds_and_temperature(lm: FakeLM) -> None:
    def run(**options: Any) -> list[int]:
        return [t.id for t in stream(lm, PROMPT, max_tokens=25, **options)]

    assert run(temperature=1.0, seed=1) == run(temperature=1.0, seed=1)
    assert run(temperature=3.0, seed=1) != run(temperature=3.0, seed=2)
    assert run(temperature=3.0, top_k=1) == run() == run(temperature=1.0, top_p=0.0)


def test_the_penalty_counts_prompt_and_answer(tokenizer: Tokenizer) -> None:
    lm = FakeLM(tokenizer, sharpness=0.01)
    tokens = [t.id for t in stream(lm, PROMPT, max_tokens=60, repetition_penalty=1e6)]
    assert len({*tokens, *tokenizer.encode(PROMPT)}) == len(tokens) + len(set(tokenizer.encode(PROMPT)))


def test_leaving_early_feeds_nothing_more(lm: FakeLM) -> None:
    tokens = stream(lm, PROMPT)
    next(tokens)
    next(tokens)
    calls = len(lm.fed)
    del tokens
    assert len(lm.fed) == calls == 2


def test_answers_of_metaspace_tokenizers_are_decode_of_their_ids(sentencepiece_folder: Path) -> None:
    tokenizer = Tokenizer.load(sentencepiece_folder)
    tokens = list(stream(FakeLM(tokenizer), "the river", max_tokens=40))
    ids = [t.id for t in tokens if t.id not in tokenizer.eos_ids]
    assert "".join(t.text for t in tokens) == tokenizer.decode(ids)
