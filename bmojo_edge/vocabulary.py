"""A vocabulary learnt from texts: SentencePiece BPE with byte fallback, the family of the paper's tokenizer.

It learns from a sample of lines, spread evenly over all texts and of bounded size, so the same texts always give the
same file. Knows nothing of where texts come from.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from bmojo_edge.tensors import write_text

SAMPLE = 16_000_000  # characters learnt from; more changes a vocabulary of thousands of pieces little
# SentencePiece passes over sentences of more than 4,192 bytes: longer lines are cut, before a space where there is one.
_LINE = re.compile(r"[^\n]{1,1000}(?= |\n|$)|[^\n]{1,1000}")


class VocabularyError(ValueError):
    """No vocabulary of the size asked for can be learnt from these texts."""


def train(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Learn `vocab_size` pieces from texts and write tokenizer.model and tokenizer_config.json into a folder.

    Pieces 0 to 2 are unknown, start and end of a document, the next 256 are bytes; digits stand alone, white space and
    line ends stay as they are. Raises VocabularyError where there are too many or too few pieces for the texts.
    """
    from sentencepiece import SentencePieceTrainer

    model, lines = io.BytesIO(), sample(texts, SAMPLE)
    if not lines:
        raise VocabularyError("--train-vocab: there is no text to learn from")
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,  # a line begins with no space, so neither does a text
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise VocabularyError(f"--train-vocab: {_reason(str(error), vocab_size)}") from None
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _reason(message: str, vocab_size: int) -> str:
    """What SentencePiece says about sizes, in our words; anything else as it is."""
    fewest = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if fewest:
        return f"{vocab_size} pieces are too few: the bytes and the characters of these texts alone need {fewest[1]}"
    most = re.search(r"value <= (\d+)", message)
    if most:
        return f"{vocab_size} pieces are too many: these texts give no more than {most[1]}"
    return message


def sample(texts: Iterable[str], size: int) -> list[str]:
    """Lines of texts, about `size` characters at most, every line or every 2nd, 4th, ... of all of them."""
    kept: list[str] = []
    used, every = 0, 1
    for n, line in enumerate(_lines(texts)):
        if n % every:
            continue
        kept.append(line)
        used += len(line)
        if used > size:
            kept, every = kept[::2], every * 2
            used = sum(map(len, kept))
    return kept


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for found in _LINE.finditer(text):
            if not found[0].isspace():
                yield found[0]
