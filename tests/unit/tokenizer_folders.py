"""Small tokenizers trained on the spot, saved as model folders have them."""

from __future__ import annotations

import io
import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello, how are you? I am fine, thank you; and you?",
    "naïve café, Größe, señor, žluťoučký kůň",
    "中文字符和日本語のテキスト 한국어",
    "print('hello world')\n    return x == 1.5e-3\n\n",
    "The river runs to the sea, the sea runs to the river.",
] * 20


def byte_level(folder: Path, template: str | None = CHATML) -> Path:
    """A GPT-2 style byte-level BPE with ChatML's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {"bos_token": "<|im_start|>", "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}},
    )
    _write(folder / "generation_config.json", {"eos_token_id": [2, 0]})
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def sentencepiece(folder: Path, model_type: str = "bpe", template: str | None = LLAMA2, prefix: bool = True) -> Path:
    """A SentencePiece model with byte fallback, as Llama 2 and Mistral have it."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=400,
        model_type=model_type,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    _write(folder / "tokenizer_config.json", config | ({} if template is None else {"chat_template": template}))
    return folder


def metaspace_json(folder: Path, source: Path) -> Path:
    """The tokenizer.json that transformers makes of a SentencePiece folder."""
    from transformers import LlamaTokenizer

    LlamaTokenizer.from_pretrained(source).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    return folder


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
