"""Sessions: only new tokens are fed, the state is the conversation's, and forks, rewinds and Ctrl-C leave it so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo_edge.chat_template import ChatTemplateError
from bmojo_edge.engine import state_nbytes
from bmojo_edge.generate import PromptError, stream
from bmojo_edge.sampling import SamplingError
from bmojo_edge.session import Session
from bmojo_edge.tokenizer import Tokenizer
from tests.unit import tokenizer_folders
from tests.unit.fake_lm import FakeLM

# Earlier answers lose what stands before </think>, as Qwen3's template has it; the last stays whole.
THINKING = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The system prompt stands before the last question only, as in Mistral's template, and texts are trimmed.
MOVING = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n' %}"
    "{% elif m['role'] == 'user' %}"
    "{{ '<|im_start|>' + (ns.system if loop.last else '') + m['content'] + '<|im_end|>' }}"
    "{% else %}{{ m['content'] | trim + '<|endoftext|>' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer._backend, tokenizer._special_tokens, tokenizer.eos_ids, {"default": template})


@pytest.fixture
def lm(tokenizer: Tokenizer) -> FakeLM:
    return FakeLM(tokenizer)


def say(session: Session, text: str, answer: str | None = None, end: int | None = 2, **options: Any) -> str:
    """Say something; the model answers `answer` and ends, or what it likes where that is None."""
    lm, tokenizer = session._lm, session._tokenizer
    assert isinstance(lm, FakeLM)
    options.setdefault("max_tokens", 12)
    pieces = session.say(text, **options)
    if answer is not None:
        ids = tokenizer.encode_continuation(answer) + ([] if end is None else [end])
        lm.says(ids, session.position)
    return "".join(pieces)


def check(session: Session) -> None:
    """State and pending ids are those of the conversation's ids, and these are its text."""
    lm, tokenizer = session._lm, session._tokenizer
    ids = session._ids(2 * len(session._turns))
    expected = lm.init_state()
    if ids:
        _, expected = FakeLM(tokenizer).prefill([ids], expected)
    state = session._state
    if session._pending:
        _, state = FakeLM(tokenizer).prefill([session._pending], state)
    assert state.layers == expected.layers
    assert session.position == len(ids) == int(state.position[0])
    assert session.nbytes == state_nbytes(lm.init_state())
    for turn, message in zip(session.turns, session.messages[-2 * len(session.turns) + 1 :: 2], strict=True):
        assert message == {"role": "assistant", "content": turn.answer}


def test_a_conversation_feeds_each_token_of_it_once(lm: FakeLM, tokenizer: Tokenizer) -> None:
    session = Session(lm, system="Be brief.")
    for question, answer in (("Hello", "I am fine."), ("the river 😀", " runs\n to the sea"), ("", ""), ("x", "1 2")):
        assert say(session, question, answer) == answer
        check(session)
    whole = tokenizer.chat(session.messages, add_generation_prompt=False)
    assert lm.all_fed() == whole[: len(lm.all_fed())]
    assert tokenizer.decode(whole[len(lm.all_fed()) :]) == "<|im_end|>\n"
    assert [m["role"] for m in session.messages] == ["system", *["user", "assistant"] * 4]
    assert [turn.finish_reason for turn in session.turns] == ["stop"] * 4


def test_the_next_question_feeds_only_the_new_tokens(lm: FakeLM, tokenizer: Tokenizer) -> None:
    session = Session(lm)
    say(session, "Hello", "I am fine.")
    lm.fed.clear()
    say(session, "why?", "x")
    assert lm.fed[0] == tokenizer.encode("<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("folder", ["byte_level_folder", "sentencepiece_folder", "metaspace_folder"])
def test_sampled_tokens_stay_as_sampled_and_the_text_is_the_templates(
    folder: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = Tokenizer.load(request.getfixturevalue(folder))
    lm = FakeLM(tokenizer)
    session = Session(lm)
    answers = []
    for i, question in enumerate(("Hello, how are you?", "the river", "naïve 中")):
        assert say(session, question, temperature=1.0, seed=i) == session.turns[-1].answer
        answers.append(session.turns[-1].answer_ids)
        check(session)
    fed = lm.all_fed()
    for ids in answers:  # random tokens: hardly ever what the tokenizer would make of their text
        assert any(fed[i : i + len(ids) - 1] == ids[:-1] for i in range(len(fed)))
    if folder == "byte_level_folder":
        text = tokenizer.render_chat(session.messages, add_generation_prompt=False)
        assert text.startswith(tokenizer.decode(session._ids(2 * 3)))


@pytest.mark.parametrize("folder", ["sentencepiece_folder", "metaspace_folder"])
def test_answers_that_begin_with_a_words_own_space(folder: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer.load(request.getfixturevalue(folder))
    lm = FakeLM(tokenizer)
    session = Session(lm)
    assert say(session, "Hello", " I am fine.") == "I am fine."  # as sampled by a Llama: its first token is a word
    assert session.messages[1]["content"] == "I am fine."
    assert say(session, "why?", " the sea") == "the sea"
    assert say(session, "ok", " x") == "x"
    check(session)
    assert lm.all_fed() == tokenizer.chat(session.messages[:-1]) + tokenizer.encode_continuation(" x")


def test_options_are_those_of_stream(lm: FakeLM, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_tokens": 9, "temperature": 2.0, "top_k": 40, "seed": 3, "repetition_penalty": 1.5}
    session = Session(lm)
    first = "".join(session.say("Hello", **options))
    assert first == "".join(t.text for t in stream(lm, [{"role": "user", "content": "Hello"}], **options))
    assert session.turns[0].finish_reason == "length"


def test_the_penalty_counts_the_last_window_of_the_conversation(tokenizer: Tokenizer) -> None:
    lm = FakeLM(tokenizer, sharpness=0.01)
    session = Session(lm)
    say(session, "Hello", "runs to the sea")
    past = set(session._ids(2 * 1))
    assert len(past) < lm.config.window
    say(session, "x", repetition_penalty=1e6, max_tokens=30)
    assert not past & set(session.turns[-1].answer_ids)


# --- endings


@pytest.mark.parametrize("leave", [0, 1, 3, 6])
@pytest.mark.parametrize("how", ["close", "drop", "next call", "throw"])
def test_leaving_an_answer_keeps_what_was_said(tokenizer: Tokenizer, leave: int, how: str) -> None:
    lm = FakeLM(tokenizer)
    session = Session(lm)
    say(session, "Hello", "I am fine.")
    answer = session.say("the river", max_tokens=50)
    ids = tokenizer.encode_continuation("runs 中😀 to the sea")
    lm.says(ids, session.position)
    pieces = [next(answer) for _ in range(leave)]
    if how == "close":
        answer.close()  # pyright: ignore[reportAttributeAccessIssue]
    elif how == "drop":
        del answer
    elif how == "throw":
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)  # pyright: ignore[reportAttributeAccessIssue]
    turn = session.turns[-1]
    assert turn.finish_reason is None
    assert "".join(pieces) == turn.answer == "runs 中😀 to the sea"[: len(turn.answer)]
    lm.says([], 0)
    assert say(session, "and?", "x") == "x"
    if how == "next call":
        assert list(answer) == []  # pyright: ignore[reportPossiblyUnboundVariable]
    check(session)
    text = tokenizer.render_chat(session.messages, add_generation_prompt=False)
    assert text.startswith(tokenizer.decode(session._ids(2 * 3)))


class Interrupted(FakeLM):
    """Presses Ctrl-C in call number `at`."""

    at = -1

    def prefill(self, tokens: Any, state: Any, lengths: Any = None) -> Any:
        if len(self.fed) == self.at:
            self.at = -1
            raise KeyboardInterrupt
        return super().prefill(tokens, state, lengths)


@pytest.mark.parametrize("at", range(6))
def test_ctrl_c_inside_the_model_leaves_a_conversation_that_goes_on(tokenizer: Tokenizer, at: int) -> None:
    lm = Interrupted(tokenizer)
    session = Session(lm)
    say(session, "Hello", "ok")
    lm.fed.clear()
    lm.at = at
    with pytest.raises(KeyboardInterrupt):
        say(session, "the river", "runs to the sea", max_tokens=30)
    check(session)
    whole = tokenizer.decode(tokenizer.encode_continuation("runs to the sea")[:at])
    assert session.turns[-1].answer == whole
    assert say(session, "why", "x") == "x"
    check(session)
    text = tokenizer.render_chat(session.messages, add_generation_prompt=False)
    assert text.startswith(tokenizer.decode(session._ids(2 * 3)))


@pytest.mark.parametrize("stop", ["the", "e sea", "\n", "中", "r", "s 中😀"])
def test_a_stop_string_leaves_the_conversation_as_shown(tokenizer: Tokenizer, stop: str) -> None:
    lm = FakeLM(tokenizer)
    session = Session(lm)
    text = "it runs 中😀 to the sea\nfor ever"
    shown = say(session, "Hello", text, max_tokens=50, stop=[stop])
    assert shown == text[: text.index(stop)] == session.messages[-1]["content"]
    check(session)
    assert say(session, "why", "x") == "x"
    check(session)
    whole = tokenizer.render_chat(session.messages, add_generation_prompt=False)
    assert whole.startswith(tokenizer.decode(session._ids(2 * 2)))


def test_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    lm = FakeLM(tokenizer)
    session = Session(lm)
    assert say(session, "Hello", "a😀", max_tokens=3) == "a\ufffd"
    say(session, "why", "x")
    check(session)


def test_no_tokens_wanted(lm: FakeLM) -> None:
    session = Session(lm)
    assert say(session, "Hello", max_tokens=0) == ""
    assert lm.fed == []
    assert session.position > 0
    say(session, "why", "x")
    check(session)


# --- templates that rewrite the past


def test_a_template_that_drops_earlier_reasoning(tokenizer: Tokenizer) -> None:
    lm = FakeLM(with_template(tokenizer, THINKING))
    session = Session(lm)
    say(session, "Hello", "hm hm</think>I am fine.", max_tokens=50)
    say(session, "the river", "well</think>runs", max_tokens=50)
    lm.fed.clear()
    assert say(session, "x", "1", max_tokens=50) == "1"
    check(session)
    # Fed again: the last answer without its reasoning, and nothing before it.
    assert tokenizer.decode(lm.fed[0]) == "runs<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert (
        tokenizer.decode(session._ids(2 * 3))
        == session._tokenizer.render_chat(
            [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "I am fine."},
                {"role": "user", "content": "the river"},
                {"role": "assistant", "content": "runs"},
                {"role": "user", "content": "x"},
            ]
        )
        + "1"
    )  # pyright: ignore[reportOptionalMemberAccess]


def test_a_template_that_moves_the_system_prompt_and_trims(tokenizer: Tokenizer) -> None:
    lm = FakeLM(with_template(tokenizer, MOVING))
    session = Session(lm, system="Be brief.")
    for question, answer in (("Hello", " ok \n"), ("the river", "runs"), ("why", "x ")):
        assert say(session, question, answer, end=0) == answer
        check(session)
        assert tokenizer.decode(session._ids(2 * len(session.turns))).count("Be brief.") == 1
    rendered = session._tokenizer.render_chat(session.messages[:-1])
    assert tokenizer.decode(session._ids(2 * 3)) == rendered + "x "


def test_a_date_in_the_template_stays_that_of_the_first_turn(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime as real

    import bmojo_edge.session as module

    days = iter(range(2, 30))

    class Clock(real.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> real.datetime:
            return real.datetime(2024, 1, next(days))

    monkeypatch.setattr(module, "datetime", Clock)
    lm = FakeLM(with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}" + tokenizer_folders.CHATML))
    session = Session(lm)
    say(session, "Hello", "x")
    say(session, "Hello", "x")
    assert tokenizer.decode(lm.all_fed()).count("2024") == 1
    assert tokenizer.decode(lm.fed[0]).startswith("02 Jan 2024<|im_start|>")


def test_what_a_template_refuses_leaves_the_session_alone(tokenizer: Tokenizer) -> None:
    refusing = (
        "{% if messages[-1]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + tokenizer_folders.CHATML
    )
    lm = FakeLM(with_template(tokenizer, refusing))
    session = Session(lm)
    say(session, "Hello", "x")
    before = session.position
    with pytest.raises(ChatTemplateError, match="no"):
        session.say("bad")
    with pytest.raises(SamplingError, match="top_p"):
        session.say("fine", top_p=2)
    with pytest.raises(TypeError, match="unknown"):
        session.say("fine", unknown=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(PromptError, match="text"):
        session.say(3)  # pyright: ignore[reportArgumentType]
    assert session.position == before
    assert len(session.turns) == 1
    check(session)


def test_models_that_cannot_chat_say_so(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="no tokenizer"):
        Session(FakeLM(None, vocab_size=9))
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Session(FakeLM(Tokenizer(tokenizer._backend)))


# --- forks and rewinds


def test_rewinding_is_never_having_said_it(lm: FakeLM) -> None:
    session, other = Session(lm), Session(lm)
    for s in (session, other):
        say(s, "Hello", "ok")
    say(session, "one", "1")
    say(session, "two", "2")
    assert session.rewind(2) is session
    assert session.messages == other.messages
    assert session._state is not other._state
    assert session._state.layers == other._state.layers
    assert say(session, "x", temperature=1.0, seed=0) == say(other, "x", temperature=1.0, seed=0)
    check(session)


@pytest.mark.parametrize("turns", [-1, 3, 1.0, True, None])
def test_rewinding_too_far_is_named(lm: FakeLM, turns: Any) -> None:
    session = Session(lm)
    say(session, "Hello", "ok")
    say(session, "Hello", "ok")
    with pytest.raises(ValueError, match="turns: must be between 0 and the 2 there are"):
        session.rewind(turns)
    assert len(session.turns) == 2


def test_a_fork_of_an_answer_in_progress_ends_there_and_the_answer_goes_on(lm: FakeLM, tokenizer: Tokenizer) -> None:
    session = Session(lm)
    answer = session.say("the river", max_tokens=50)
    lm.says([*tokenizer.encode_continuation("runs to the sea"), 2], session.position)
    first = next(answer)
    twin = session.fork()
    assert twin.messages[-1]["content"] == first == session.messages[-1]["content"]
    assert first + "".join(answer) == "runs to the sea" == session.messages[-1]["content"]
    assert twin.messages[-1]["content"] == first
    say(twin, "x", "1")
    check(twin)
    check(session)


def replay(lm: FakeLM, script: list[tuple[str, int]]) -> Session:
    session = Session(lm, system="s")
    for text, seed in script:
        say(session, text, temperature=1.5, seed=seed, max_tokens=5)
    return session


@settings(max_examples=60)
@given(
    data=st.data(),
    budget=st.sampled_from([0, 30, 70, 10**6]),
    template=st.sampled_from([tokenizer_folders.CHATML, THINKING, MOVING]),
)
def test_any_forks_and_rewinds_give_conversations_like_fresh_ones(
    tokenizer: Tokenizer, data: st.DataObject, budget: int, template: str
) -> None:
    lm = FakeLM(with_template(tokenizer, template))
    sessions: list[tuple[Session, list[tuple[str, int]]]] = [(Session(lm, "s", snapshot_bytes=budget), [])]
    for _ in range(data.draw(st.integers(1, 10))):
        session, script = data.draw(st.sampled_from(sessions))
        step = data.draw(st.sampled_from(["say", "say", "say", "fork", "rewind"]))
        if step == "say":
            script.append((data.draw(st.sampled_from(["a</think>", "the river", "中"])), data.draw(st.integers(0, 9))))
            say(session, script[-1][0], temperature=1.5, seed=script[-1][1], max_tokens=5)
        elif step == "fork":
            sessions.append((session.fork(), list(script)))
        else:
            n = data.draw(st.integers(0, len(script)))
            session.rewind(n)
            del script[len(script) - n :]
    for session, script in sessions:
        check(session)
        fresh = replay(lm, script)
        assert session.messages == fresh.messages
        assert session._ids(2 * len(script)) == fresh._ids(2 * len(script))


def test_kept_states_stay_within_their_budget(lm: FakeLM) -> None:
    one = state_nbytes(lm.init_state())
    session = Session(lm, snapshot_bytes=3 * one)
    for i in range(6):
        say(session, f"{i}", "ok")
    assert [turn.before is not None for turn in session.turns] == [False] * 2 + [True] * 4
    lm.fed.clear()
    session.rewind(2)
    assert lm.fed == []
    session.rewind(3)  # further than states are kept
    check(session)
    say(session, "x", "y")
    check(session)
    assert [m["content"] for m in session.messages] == ["0", "ok", "x", "y"]


def test_turns_are_copies(lm: FakeLM) -> None:
    session = Session(lm)
    say(session, "Hello", "ok")
    dataclasses.replace(session.turns[0], answer="other")
    session.turns[0].answer = "changed"
    assert session.messages[1]["content"] == "ok"
