"""Tokenizer folders as published: ids equal transformers', chats equal its apply_chat_template, errors name files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmojo_edge.chat_template import ChatTemplateError, render
from bmojo_edge.tensors import CheckpointError
from bmojo_edge.tokenizer import Tokenizer, TokenizerError
from tests.unit import tokenizer_folders

CHAT = [
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "I am fine."},
    {"role": "user", "content": "the river 😀\n"},
]
TEXTS = [
    "Hello, how are you",
    "中😀\n\n x",
    "",
    "a<|im_end|>b<|im_start|>",
    "x</s>y <s>z",
    "\n",
    "1234.5",
    " a",
    "  b c ",
]


@pytest.fixture
def copy(tmp_path: Path, byte_level_folder: Path) -> Path:
    return Path(shutil.copytree(byte_level_folder, tmp_path / "model"))


@pytest.mark.parametrize("name", ["byte_level_folder", "metaspace_folder", "smollm2_folder"])
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_transformers(name: str, special: bool, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(name)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_ids
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special), text
        assert ours.decode(ids) == theirs.decode(ids), text


def test_sentencepiece_ids_are_the_librarys(sentencepiece_folder: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    ours = Tokenizer.load(sentencepiece_folder)
    theirs = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    for text in ("Hello, how are you", "中😀\n\n x", " two  spaces ", "1234.5"):
        assert ours.encode(text) == [theirs.bos_id(), *theirs.encode(text)]
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
    assert ours.encode("") == [theirs.bos_id()]
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, {2}, theirs.vocab_size())


def test_sentencepiece_special_tokens_in_text_are_those_of_transformers(
    sentencepiece_folder: Path, metaspace_folder: Path
) -> None:
    ours, json_twin = Tokenizer.load(sentencepiece_folder), Tokenizer.load(metaspace_folder)
    for text in ("a</s>b <s>c", "<s>[INST] hi [/INST]", "</s>", "x<unk>y"):
        assert ours.encode(text, False) == json_twin.encode(text, False), text
    assert ours.chat(CHAT) == json_twin.chat(CHAT)


def test_sentencepiece_added_tokens_and_switches(tmp_path: Path, sentencepiece_folder: Path) -> None:
    folder = Path(shutil.copytree(sentencepiece_folder, tmp_path / "model"))
    plain = Tokenizer.load(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": False, "add_eos_token": True}
    config["added_tokens_decoder"] = {str(plain.vocab_size + 1): {"content": "<|tool|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": plain.vocab_size}))
    added = Tokenizer.load(folder)
    assert added.vocab_size == plain.vocab_size + 2
    ids = added.encode("Hello<|im_end|>you<|tool|>")
    assert ids[-1] == 2
    assert ids[0] != 1
    assert plain.vocab_size in ids
    assert plain.vocab_size + 1 in ids
    assert added.decode(ids, skip_special_tokens=True) == "Helloyou"
    assert added.decode(ids) == "Hello<|im_end|>you<|tool|></s>"


@pytest.mark.parametrize("name", ["byte_level_folder", "sentencepiece_folder", "metaspace_folder"])
@given(data=st.data())
def test_a_continuation_is_a_text_cut_where_tokens_meet(
    name: str, request: pytest.FixtureRequest, data: st.DataObject
) -> None:
    tokenizer = Tokenizer.load(request.getfixturevalue(name))
    text = data.draw(st.text(st.sampled_from(" \nahe中😀.<s>"), max_size=12))
    first = tokenizer.encode("the river", add_special_tokens=False)
    assert tokenizer.decode([*first, *tokenizer.encode_continuation(text)]) == "the river" + text


def test_settings_of_training_do_not_cut_texts(copy: Path) -> None:
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(copy / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(copy / "tokenizer.json"))
    tokenizer = Tokenizer.load(copy)
    text = "the river runs to the sea"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_all_end_ids_are_kept(copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    (copy / "config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert Tokenizer.load(copy).eos_ids == {2, 7, 8, 9}


def test_save_copies_the_files(tmp_path: Path, byte_level_folder: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_folder)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode("the river") == tokenizer.encode("the river")
    assert again.chat(CHAT) == tokenizer.chat(CHAT)
    assert again.eos_ids == tokenizer.eos_ids
    with pytest.raises(TokenizerError, match="no files to copy"):
        Tokenizer(tokenizer._backend).save(tmp_path)


# --- chats


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("name", ["byte_level_folder", "metaspace_folder", "smollm2_folder"])
def test_chat_is_that_of_transformers(name: str, generation: bool, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(name)
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=generation, return_dict=False)
    assert Tokenizer.load(folder).chat(CHAT, add_generation_prompt=generation) == expected


TRICKY = r"""
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.role == 'assistant' %}
        {%- generation %}A:{{ message.content | trim }}{{ eos_token }}{% endgeneration %}
    {%- else %}
        {{- '<' ~ message.role ~ '>' ~ message.content }}
    {%- endif %}
    {%- if ns.count == 3 %}{% break %}{% endif %}
{%- endfor %}
{{ tools | tojson }} {{ {'a': '<b>é'} | tojson(indent=2) }} {{ dict(x=1) | tojson }}
{%- if enable_thinking is defined %} thinking={{ enable_thinking }}{% endif %}
{%- if add_generation_prompt %}
{{ bos_token }}{% endif %}
"""


def test_templates_have_what_transformers_gives_them(copy: Path) -> None:
    from transformers import AutoTokenizer

    (copy / "chat_template.jinja").write_text(TRICKY)
    messages = [*CHAT, {"role": "skip", "content": "no"}, {"role": "user", "content": "beyond the break"}]
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    theirs = AutoTokenizer.from_pretrained(copy)
    cases: list[dict[str, Any]] = [{}, {"tools": tools}, {"enable_thinking": False}]
    for options in cases:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        assert Tokenizer.load(copy).render_chat(messages, **options) == expected


def test_template_sources(copy: Path) -> None:
    def config(template: object) -> None:
        given = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(given | {"chat_template": template}))

    config("from config")
    assert Tokenizer.load(copy).render_chat(CHAT).startswith("<|im_start|>")  # the file of its own wins
    (copy / "chat_template.jinja").unlink()
    assert Tokenizer.load(copy).render_chat(CHAT) == "from config"
    config([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}])
    assert Tokenizer.load(copy).render_chat(CHAT) == "plain"
    assert Tokenizer.load(copy).render_chat(CHAT, tools=[{}]) == "tools"
    config([{"name": "rag", "template": "x"}])
    with pytest.raises(ChatTemplateError, match="'default', only rag"):
        Tokenizer.load(copy).render_chat(CHAT)
    config(3)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template"):
        Tokenizer.load(copy)


def test_no_template_is_a_clear_error(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.load(copy)
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template: give a plain prompt"):
        tokenizer.chat(CHAT)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\]: must be a mapping"),
        ([{"content": "x"}], r"messages\[0\].role"),
    ],
)
def test_messages_are_checked(messages: Any, says: str) -> None:
    with pytest.raises(ChatTemplateError, match=says):
        render("{{ messages }}", messages)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{% for %}", "chat_template: line 1"),
        ("{{ messages[0].content + 1 }}", "chat template: TypeError"),
        ("{{ nothing.at.all }}", "chat template: .*undefined"),
        ("{{ messages.__class__.__mro__ }}", "chat template: .*unsafe"),
        ("{{ messages.append(1) }}", "chat template: .*(unsafe|not safely callable)"),
        ("{{ namespace(__class__=1) }}", "chat template: a namespace cannot hold"),
        ("{{ dict.__globals__.keys() }}", "chat template: .*unsafe"),
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(template: str, says: str) -> None:
    with pytest.raises(ChatTemplateError, match=says):
        render(template, CHAT)


def test_null_entries_of_messages_are_left_out() -> None:
    source = "{% for m in messages %}{{ 'tool_calls' in m }}{% endfor %}"
    assert render(source, [{"role": "user", "content": "x", "tool_calls": None}]) == "False"


# --- errors


def _truncate(folder: Path) -> str:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])
    return "tokenizer.json"


def _bad_config(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text("{")
    return "tokenizer_config.json: not valid JSON"


def _list_config(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text("[]")
    return "tokenizer_config.json: must hold an object"


def _bad_eos(folder: Path) -> str:
    (folder / "generation_config.json").write_text('{"eos_token_id": "2"}')
    return "generation_config.json: eos_token_id"


def _no_file(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "has no tokenizer"


def _not_sentencepiece(folder: Path) -> str:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    return "tokenizer.model: cannot be read"


def _bad_decoder(folder: Path) -> str:
    path = folder / "tokenizer.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"decoder": {"type": "WordPiece", "prefix": "#", "cleanup": True}})
    )
    return "tokenizer.json: decoder: "


@pytest.mark.parametrize(
    "damage", [_truncate, _bad_config, _list_config, _bad_eos, _no_file, _not_sentencepiece, _bad_decoder]
)
def test_damaged_folders_are_named(copy: Path, damage: Callable[[Path], str]) -> None:
    says = damage(copy)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(copy)
    assert says in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("name", ["byte_level_folder", "sentencepiece_folder"])
def test_what_cannot_be_encoded_or_decoded_is_named(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer.load(request.getfixturevalue(name))
    with pytest.raises(TokenizerError, match="text: is not valid Unicode at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(TokenizerError, match="text: must be a string"):
        tokenizer.encode(b"ab")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TokenizerError, match="ids: must not be negative"):
        tokenizer.decode([-1])
    assert tokenizer.decode([tokenizer.vocab_size + 3]) == ""


def test_the_template_free_llama_folder(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folders.sentencepiece(tmp_path, template=None, prefix=False))
    assert not tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode(" a", add_special_tokens=False)) == " a"
