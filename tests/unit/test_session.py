"""Sessions: only new tokens are fed, the state is the conversation's, and forks, rewinds and Ctrl-C leave it so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bmojo_edge.chat_template import ChatTemplateError
from bmojo_edge.engine import state_nbytes
from bmojo_edge.generate import PromptError, stream
from bmojo_edge.moment import first_moment
from bmojo_edge.sampling import SamplingError
from bmojo_edge.session import KEPT_TURNS, Session, SessionError
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


def ids_of(session: Session) -> list[int]:
    """The ids of the conversation: those its state has taken in, and those that are to come."""
    lm, now = session._lm, session.moment
    assert isinstance(lm, FakeLM)
    return [*lm.pasts[int(now.state.layers[0][0])], *now.pending]


def check(session: Session) -> None:
    """Position, hash and recent ids are those of the conversation's ids, and its turns are its messages."""
    lm, ids, now = session._lm, ids_of(session), session.moment
    fresh = first_moment(lm.init_state(), None).after(ids, now.state, now.pending, lm.config)
    assert session.position == len(ids) == int(now.state.position[0]) + len(now.pending)
    assert (now.recent, now.rolling_hash) == (fresh.recent, fresh.rolling_hash)
    assert session.rolling_hash == f"{fresh.rolling_hash:016x}"
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
        assert text.startswith(tokenizer.decode(ids_of(session)))


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
    past = set(ids_of(session))
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
    assert text.startswith(tokenizer.decode(ids_of(session)))


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
    assert text.startswith(tokenizer.decode(ids_of(session)))


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
    assert whole.startswith(tokenizer.decode(ids_of(session)))


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
        tokenizer.decode(ids_of(session))
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
        assert tokenizer.decode(ids_of(session)).count("Be brief.") == 1
    rendered = session._tokenizer.render_chat(session.messages[:-1])
    assert tokenizer.decode(ids_of(session)) == rendered + "x "


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
    assert session.moment.state.layers == other.moment.state.layers
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


def test_kept_states_stay_within_their_budget(lm: FakeLM) -> None:
    one = state_nbytes(lm.init_state())
    session = Session(lm, system="s", snapshot_bytes=3 * one).read()
    for i in range(6):
        say(session, f"{i}", "ok")
    assert [turn.before is not None for turn in session.turns] == [False] * 2 + [True] * 4
    lm.fed.clear()
    before = session.rolling_hash
    with pytest.raises(SessionError, match=r"turns: only the last 4 of the 6 exchanges .*snapshot_bytes is 72"):
        session.rewind(5)
    assert session.rolling_hash == before
    session.rewind(4)
    assert lm.fed == []
    check(session)
    say(session, "x", "y")
    check(session)
    assert [m["content"] for m in session.messages] == ["s", "0", "ok", "1", "ok", "x", "y"]
    session.rewind(3)  # the start is kept as long as nothing before it is forgotten
    assert session.messages == [{"role": "system", "content": "s"}]
    check(session)


def test_memory_of_a_long_conversation_is_bounded(lm: FakeLM, tokenizer: Tokenizer) -> None:
    """Old exchanges are forgotten, and what is fed for a new one stays the same."""
    session = Session(lm, system="s", snapshot_bytes=0)
    for i in range(KEPT_TURNS + 20):
        lm.fed.clear()
        say(session, f"{i:03}", "ok")
        check(session)
        question = f"<|im_start|>user\n{i:03}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(lm.fed[0]) == ("<|im_end|>\n" if i else "<|im_start|>system\ns<|im_end|>\n") + question
    assert len(session.turns) == KEPT_TURNS + 1
    assert session.turns[-1].user == f"{KEPT_TURNS + 19:03}"
    assert len(session.moment.recent) <= lm.config.window + 1
    with pytest.raises(ValueError, match=f"between 0 and the {KEPT_TURNS + 20} there are"):
        session.rewind(KEPT_TURNS + 21)
    with pytest.raises(SessionError, match=f"only the last 1 of the {KEPT_TURNS + 20} exchanges"):
        session.rewind(KEPT_TURNS + 20)
    session.rewind()
    check(session)


@pytest.mark.parametrize("template", [THINKING, MOVING])
def test_a_template_that_rewrites_keeps_what_it_rewrites(tokenizer: Tokenizer, template: str) -> None:
    lm = FakeLM(with_template(tokenizer, template))
    session = Session(lm, system="s", snapshot_bytes=0)
    for i in range(KEPT_TURNS + 6):
        say(session, f"{i}", "hm</think>ok", max_tokens=50)
    # Qwen3's rewrites the last answer only; a system prompt that moves rewrites all there is.
    assert len(session.turns) == KEPT_TURNS + (6 if template == MOVING else 1)
    expected = lm.tokenizer.render_chat(session.messages[:-1]) if lm.tokenizer else ""
    assert tokenizer.decode(ids_of(session)).endswith(expected[-100:] + "hm</think>ok")


# --- reading ahead, regenerating, editing


def test_a_prefix_is_read_once_and_forked(lm: FakeLM, tokenizer: Tokenizer) -> None:
    base = Session(lm, system="Be brief.").read("A book.\n\n")
    assert tokenizer.decode(lm.all_fed()) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA book.\n\n"
    lm.fed.clear()
    for text in ("Hello", "why?"):
        twin = base.fork()
        say(twin, text, "ok")
        check(twin)
        assert tokenizer.decode(lm.fed[0]) == text + "<|im_end|>\n<|im_start|>assistant\n"
        lm.fed.clear()
        say(twin, "more", "ok")
        assert tokenizer.decode(lm.fed[0]).startswith("<|im_end|>\n<|im_start|>user\nmore")
        twin.rewind(2)
        assert twin.rolling_hash == base.rolling_hash
        lm.fed.clear()
    assert base.turns == ()
    whole = tokenizer.decode(ids_of(base.read(" More.")))
    assert whole.endswith("A book.\n\n More.")
    say(base, "Hello", "ok")
    with pytest.raises(SessionError, match="before the first question"):
        base.read("x")


def test_reading_ahead_is_refused_where_the_beginning_moves(tokenizer: Tokenizer) -> None:
    with pytest.raises(SessionError, match="moves what stands before the first question"):
        Session(FakeLM(with_template(tokenizer, MOVING)), system="s").read("x")


@pytest.mark.parametrize("seed", [-1, 1.5, "x"])
def test_a_wrong_seed_is_named(lm: FakeLM, seed: Any) -> None:
    with pytest.raises(ValueError, match="seed: must be a whole number of at least 0"):
        Session(lm, seed=seed)


def test_regenerating_draws_anew_and_rewinding_draws_the_same(lm: FakeLM) -> None:
    session = Session(lm, seed=5)
    say(session, "Hello", "ok")
    first = say(session, "the river", temperature=2.0)
    others = {"".join(session.regenerate(temperature=2.0, max_tokens=12)) for _ in range(5)}
    assert len(others | {first}) == 6
    assert len(session.turns) == 2
    check(session)
    assert "".join(session.regenerate(max_tokens=12)) == say(session.rewind(), "the river")
    session.rewind(2)
    say(session, "Hello", "ok")
    assert say(session, "the river", temperature=2.0) == first
    with pytest.raises(SessionError, match="no answer yet"):
        Session(lm).regenerate()


def test_forks_draw_numbers_of_their_own(lm: FakeLM) -> None:
    session, other = Session(lm, seed=5), Session(lm, seed=5)
    said = [say(session.fork(), "Hello", temperature=2.0) for _ in range(3)]
    assert len({*said, say(session, "Hello", temperature=2.0)}) == 4
    assert said == [say(other.fork(), "Hello", temperature=2.0) for _ in range(3)]
    assert session.messages != (say(other, "x", temperature=2.0), other.messages)[1]


def test_editing_replaces_a_question_and_all_after_it(lm: FakeLM) -> None:
    session, ref = Session(lm), Session(lm)
    for text in ("one", "two", "three"):
        say(session, text, temperature=1.0, seed=1)
    say(ref, "one", temperature=1.0, seed=1)
    edited = "".join(session.edit("TWO", turns=2, max_tokens=12, temperature=1.0, seed=2))
    assert edited == say(ref, "TWO", temperature=1.0, seed=2)
    assert session.messages == ref.messages
    assert session.rolling_hash == ref.rolling_hash
    check(session)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("x", 0), "at least 1"), (("x", 3), "between 0 and the 2"), ((3, 1), "must be a string"), (("bad", 1), "no")],
)
def test_an_edit_that_is_refused_changes_nothing(tokenizer: Tokenizer, arguments: tuple[Any, int], says: str) -> None:
    refusing = "{% if messages[-1]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    session = Session(FakeLM(with_template(tokenizer, refusing + tokenizer_folders.CHATML)))
    say(session, "Hello", "ok")
    say(session, "Hello", "ok")
    before, messages = session.rolling_hash, session.messages
    with pytest.raises(ValueError, match=says):
        session.edit(*arguments)
    with pytest.raises(SamplingError, match="top_p"):
        session.edit("x", top_p=2)
    with pytest.raises(SamplingError, match="top_p"):
        session.regenerate(top_p=2)
    assert (session.rolling_hash, session.messages) == (before, messages)
    check(session)


def test_turns_are_copies(lm: FakeLM) -> None:
    session = Session(lm)
    say(session, "Hello", "ok")
    dataclasses.replace(session.turns[0], answer="other")
    session.turns[0].answer = "changed"
    assert session.messages[1]["content"] == "ok"


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
@pytest.mark.parametrize("template", [None, THINKING, MOVING])
def test_a_conversation_told_again_goes_on_as_the_one_that_was_had(
    tokenizer: Tokenizer, template: str | None, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmojo_edge.session.BLOCK", 7)
    lm = FakeLM(tokenizer if template is None else with_template(tokenizer, template))
    had, told = Session(lm, system="Be brief."), Session(lm, system="Be brief.")
    for i in range(turns):
        say(had, f"question {i}", f"<think>no {i}</think>answer {i}")
    blocks = list(told.retell([(turn.user, turn.answer) for turn in had.turns]))
    assert len(blocks) > turns or not turns
    assert told.messages == had.messages
    assert ids_of(told) == ids_of(had)
    assert told.rolling_hash == had.rolling_hash
    if turns:
        with pytest.raises(SessionError, match="first question"):
            list(told.retell([]))
        assert told.last_exchange()[2] == had.last_exchange()[2]
        assert told.fork().rewind().rolling_hash == had.fork().rewind().rolling_hash
    assert say(told, "and then?", "because") == say(had, "and then?", "because")
    assert told.rolling_hash == had.rolling_hash
