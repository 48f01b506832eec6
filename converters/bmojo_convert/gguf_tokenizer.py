"""tokenizer.json and its companions rebuilt from GGUF metadata.

Byte-level BPE (`gpt2`) with the pre-tokenizers of the supported families, and SentencePiece BPE (`llama`). A kind that
cannot be rebuilt faithfully is refused by name. The flags and defaults are those llama.cpp documents for its files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bmojo_convert.names import ConvertError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types
_ENDS_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "</s>")

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)


_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class _Pre(NamedTuple):
    """How a family cuts text before merging: digit by digit, by `splits` in turn, by GPT-2's pattern if `words`."""

    splits: tuple[str, ...] = ()
    words: bool = False
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = _Pre((f"{_ENDINGS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}",), ignore_merges=True, add_bos=True)
_QWEN2 = _Pre((f"{_ENDINGS}|{_WORDS}|\\p{{N}}|{_REST}",), nfc=True)
_TEKKEN = _Pre(
    (rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), ignore_merges=True, add_bos=True
)
_GPT2 = _Pre(words=True)
_DIGITS = _Pre(words=True, digits=True)
# What llama.cpp does with a file that names no pre-tokenizer.
_UNNAMED = _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"))

# tokenizer.ggml.pre
_PRE = {
    "default": _UNNAMED,
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3, "pixtral": _LLAMA3, "falcon3": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "tekken": _TEKKEN,
    "gpt-2": _GPT2, "olmo": _GPT2, "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "codeshell": _DIGITS,
}  # fmt: skip


class _Vocabulary(NamedTuple):
    """What metadata says of a vocabulary, its lists of one length."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None

    def of_type(self, *types: int) -> list[str]:
        """Tokens of these types, in order of their ids."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def build(metadata: Mapping[str, Any], context: int | None, where: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Texts of the tokenizer files by name and the content of generation_config.json; both empty without a tokenizer.

    Raises ConvertError naming the key that cannot be honoured.
    """
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    kind = keys.get("model")
    if kind in (None, "no_vocab", "none"):
        return {}, {}
    vocabulary = _vocabulary(keys, where)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(keys, vocabulary, where)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(keys, vocabulary, where), True
        keys = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **keys}
    else:
        raise ConvertError(f"{where}: tokenizer.ggml.model {kind!r} is not supported; known are gpt2, llama")
    special = {name: _token(keys, f"{key}_token_id", vocabulary, where) for name, key in _SPECIAL.items()}
    special = {name: token for name, token in special.items() if token is not None}
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in vocabulary.of_type(_UNKNOWN, _CONTROL)]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in vocabulary.of_type(_USER_DEFINED)]
    )
    _surround(tokenizer, keys, special, add_bos, where)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    config |= {"model_max_length": context} if context else {}
    config |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    if (template := _template(metadata)) is not None:
        config["chat_template"] = template
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }
    return files, _generation(keys, vocabulary, template)


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _vocabulary(keys: Mapping[str, Any], where: str) -> _Vocabulary:
    tokens = keys.get("tokens")
    if not tokens:
        raise ConvertError(f"{where}: tokenizer.ggml.tokens is missing")
    if len(set(tokens)) != len(tokens):
        raise ConvertError(f"{where}: tokenizer.ggml.tokens: a token occurs twice")
    types, scores = keys.get("token_type", [_NORMAL] * len(tokens)), keys.get("scores")
    for name, values in (("token_type", types), ("scores", scores)):
        if values is not None and len(values) != len(tokens):
            raise ConvertError(f"{where}: tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens")
    return _Vocabulary(tokens, types, scores, keys.get("merges"))


def _byte_level(keys: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> tuple[Tokenizer, bool]:
    name = keys.get("pre", "default")
    if name not in _PRE:
        raise ConvertError(f"{where}: tokenizer.ggml.pre {name!r} is not supported; known are {', '.join(_PRE)}")
    if vocabulary.merges is None:
        raise ConvertError(f"{where}: tokenizer.ggml.merges is missing")
    pre = _PRE[name]
    # The first character is never the border: a token may begin with a space of its own.
    merges = [(merge[: (at := merge.index(" ", 1))], merge[at + 1 :]) for merge in vocabulary.merges]
    ids = {token: n for n, token in enumerate(vocabulary.tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre.ignore_merges))
    except Exception as error:  # a merge of tokens that are not there; the library raises bare Exception
        raise ConvertError(f"{where}: tokenizer.ggml.merges: {error}") from error
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    steps += [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    prefix = bool(keys.get("add_space_prefix", False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pre.words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(keys: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> Tokenizer:
    """SentencePiece BPE: a merge's rank is the score of what it makes, pieces without a merge fall back to bytes."""
    if vocabulary.scores is None:
        raise ConvertError(f"{where}: tokenizer.ggml.scores is missing")
    for key in ("precompiled_charsmap", "remove_extra_whitespaces", "escape_whitespaces"):
        if keys.get(key) not in (None, False, []) and not (key == "escape_whitespaces" and keys[key] is True):
            raise ConvertError(f"{where}: tokenizer.ggml.{key} is not supported")
    ids = {token: n for n, token in enumerate(vocabulary.tokens)}
    unknown = keys.get("unknown_token_id", 0)
    model = models.BPE(
        ids, _merges(vocabulary), unk_token=vocabulary.tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = bool(keys.get("add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return tokenizer


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first, as SentencePiece would choose."""
    assert vocabulary.scores is not None
    ids = {token: n for n, token in enumerate(vocabulary.tokens)}
    found = []
    for n, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind != _NORMAL:
            continue
        for at in range(1, len(token)):
            left, right = ids.get(token[:at]), ids.get(token[at:])
            if left is not None and right is not None:
                found.append((-vocabulary.scores[n], left, right))
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, left, right in sorted(found)]


def _token(keys: Mapping[str, Any], name: str, vocabulary: _Vocabulary, where: str) -> str | None:
    token_id = keys.get(name)
    if token_id is None:
        return None
    if not 0 <= token_id < len(vocabulary.tokens):
        raise ConvertError(f"{where}: tokenizer.ggml.{name} {token_id} is outside the {len(vocabulary.tokens)} tokens")
    return vocabulary.tokens[token_id]


def _surround(
    tokenizer: Tokenizer, keys: Mapping[str, Any], special: Mapping[str, str], add_bos: bool, where: str
) -> None:
    """Have the tokenizer put the first and last token around a text, as the flags say."""
    first, last = [], []
    for flag, name, default, place in (
        ("add_bos_token", "bos_token", add_bos, first),
        ("add_eos_token", "eos_token", False, last),
    ):
        if keys.get(flag, default):
            if name not in special:
                raise ConvertError(f"{where}: tokenizer.ggml.{flag} is set, but {name}_id is missing")
            place.append(special[name])
    if first or last:
        single = [*first, "$A", *last]
        pair = [*first, "$A", *last, *(f"{x}:1" for x in first), "$B:1", *(f"{x}:1" for x in last)]
        pieces = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*first, *last])]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=pieces)


def _template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template, or all of them by name where there are several."""
    default = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates")
    if not names:
        return default
    named = [{"name": n, "template": metadata[f"tokenizer.chat_template.{n}"]} for n in names]
    return [{"name": "default", "template": default}, *named] if default is not None else named


def _generation(keys: Mapping[str, Any], vocabulary: _Vocabulary, template: Any) -> dict[str, Any]:
    """Every token that ends an answer: those the keys name, and the end of a turn where the chat template writes it."""
    ends = [keys[f"{name}_token_id"] for name in ("eos", "eot", "eom") if f"{name}_token_id" in keys]
    control, written = {*vocabulary.of_type(_CONTROL, _USER_DEFINED)}, json.dumps(template, ensure_ascii=False)
    for n, token in enumerate(vocabulary.tokens):
        if token in _ENDS_OF_TURN and token in control and token in written:
            ends.append(n)
    generation: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        if key in keys:
            generation[name] = keys[key]
    return generation
