"""Tokenizers rebuilt from GGUF metadata cut text as the tokenizers they came from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from bmojo_convert import ConvertError, convert
from bmojo_edge.tokenizer import Tokenizer as OurTokenizer
from tests.parity import foreign

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL say SO, we've 1234567 reasons.",
    "naïve café, Größe, señor; 中文字符和日本語のテキスト 한국어 Привет мир",
    "def f(x):\n    return x == 1.5e-3\n\n\n  # two   spaces\t\ttabs \r\n end",
    "camelCaseWords HTTPServer iPhone McDonald USA/Canada path/to/file.txt",
] * 30
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "\n\n \n",
    "  leading",
    "trailing  ",
    "x" * 50,
    "🎉👩‍👩‍👧 emoji ½ ٣",
    "a<|end|>b <|end|>\n",
]

# The patterns as the models' own tokenizer.json files have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


FAMILIES = {
    "llama-bpe": _split(LLAMA3),
    "qwen2": _split(QWEN2),
    "tekken": _split(TEKKEN),
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


def _train(steps: list[Any], ignore_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metadata(tokenizer: Tokenizer, pre: str, **extra: Any) -> dict[str, Any]:
    """What llama.cpp's conversion would write of a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    types = [TokenType.CONTROL if token in ("<|start|>", "<|end|>") else TokenType.NORMAL for token in tokens]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [int(kind) for kind in types],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **extra,
    }


def _converted(tokenizer: dict[str, Any], folder: Path) -> Path:
    model = foreign.model("llama", vocab_size=len(tokenizer["tokens"]), num_hidden_layers=1)
    source = foreign.write_gguf(model, folder / "m.gguf", tokenizer=tokenizer)
    return convert(source, folder / "out")


@pytest.mark.parametrize("pre", FAMILIES)
def test_byte_level(pre: str, tmp_path: Path) -> None:
    ref = _train(FAMILIES[pre], ignore_merges=pre in ("llama-bpe", "tekken"))
    out = _converted(_metadata(ref, pre, add_bos_token=False), tmp_path)
    got = OurTokenizer.load(out)
    for text in TEXTS:
        ids = got.encode(text)
        assert ids == ref.encode(text).ids, text
        assert got.decode(ids) == text


def test_flags_special_tokens_and_template(tmp_path: Path) -> None:
    ref = _train(FAMILIES["gpt-2"], ignore_merges=False)
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer = _metadata(
        ref, "gpt-2", add_bos_token=True, add_eos_token=True, eos_token_id=300, chat_template=template
    )
    tokenizer["token_type"][250] = int(TokenType.USER_DEFINED)
    out = _converted(tokenizer, tmp_path)
    got = OurTokenizer.load(out)
    plain = ref.encode("hello").ids
    assert got.encode("hello") == [0, *plain, 300]
    assert got.encode("hello", add_special_tokens=False) == plain
    assert got.chat([{"role": "user", "content": "hello"}]) == [0, *plain, 1]
    # The end of a turn that the template writes ends an answer too.
    assert got.eos_ids == {300, 1}
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [300, 1], "bos_token_id": 0}
    kept = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    assert [(token["id"], token["special"]) for token in kept] == [(0, True), (1, True), (250, False)]


def test_llama_bpe_begins_with_bos_unless_told_not_to(tmp_path: Path) -> None:
    ref = _train(FAMILIES["llama-bpe"], ignore_merges=True)
    for n, (flags, first) in enumerate([({}, [0]), ({"add_bos_token": False}, []), ({"add_bos_token": True}, [0])]):
        folder = tmp_path / str(n)
        folder.mkdir()
        got = OurTokenizer.load(_converted(_metadata(ref, "llama-bpe", **flags), folder))
        assert got.encode("hello") == [*first, *ref.encode("hello").ids]


def _spm(**options: Any) -> sentencepiece.SentencePieceProcessor:
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=proto, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98,
        minloglevel=2, **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())


def _spm_metadata(spm: sentencepiece.SentencePieceProcessor, **extra: Any) -> dict[str, Any]:
    def kind(i: int) -> TokenType:
        if spm.is_unknown(i):
            return TokenType.UNKNOWN
        if spm.is_control(i):
            return TokenType.CONTROL
        return TokenType.BYTE if spm.is_byte(i) else TokenType.NORMAL

    n = spm.vocab_size()
    return {
        "model": "llama",
        "tokens": [spm.id_to_piece(i) for i in range(n)],
        "scores": [float(spm.get_score(i)) for i in range(n)],
        "token_type": [int(kind(i)) for i in range(n)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **extra,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    spm = _spm(add_dummy_prefix=prefix)
    flags = {} if prefix else {"add_space_prefix": False}
    got = OurTokenizer.load(_converted(_spm_metadata(spm, **flags), tmp_path))
    for text in TEXTS[:-1]:
        ids = spm.encode(text)
        if text:
            assert got.encode(text) == [1, *ids], text
        assert got.decode(ids) == spm.decode(ids)
    assert got.eos_ids == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model 't5' is not supported"),
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"pre": "some-new-one"}, "tokenizer.ggml.pre 'some-new-one' is not supported"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["q zzzz"]}, "tokenizer.ggml.merges: "),
        ({"bos_token_id": 9999}, "tokenizer.ggml.bos_token_id 9999 is outside"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is set, but bos_token_id is missing"),
        ({"scores": [0.0]}, "tokenizer.ggml.scores has 1 entries"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "a token occurs twice"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tokenizer = {**_metadata(_train(FAMILIES["gpt-2"], ignore_merges=False), "gpt-2"), **changes}
    with pytest.raises(ConvertError, match=f"m.gguf: .*{message}"):
        _converted({name: value for name, value in tokenizer.items() if value is not None}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_no_vocabulary(tmp_path: Path) -> None:
    """A file without a tokenizer converts to a folder without one."""
    out = convert(foreign.write_gguf(foreign.model("llama"), tmp_path / "m.gguf"), tmp_path / "out")
    made = sorted(path.name for path in out.iterdir())
    assert made == ["bmojo_model.py", "config.json", "golden.safetensors", "model.safetensors"]
