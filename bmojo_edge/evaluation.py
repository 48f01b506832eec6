"""Evaluation sets in files: reading them, scoring them with a model, and the metrics of each form.

A set is JSON lines, plain or .xz, of one form: {"ctx", "choices", "gold"}, where a list of contexts, one a choice, is
partial scoring (WinoGrande); {"g", "b"}, a good and a bad sentence (BLiMP); {"text"}, whose last word is to be said
(LAMBADA). A text file (.txt, .raw, .tokens) is read through for its perplexity. Knows no engine and no task library.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from bmojo_edge.scoring import Progress, Request, Score, Scorer, beginning, loglikelihoods, request

LINES, TEXTS = (".jsonl", ".ndjson"), (".txt", ".raw", ".tokens")
SPLITS = ("test", "val", "valid", "validation", "dev", "train")  # the first found stands for a name without a split


class EvaluationError(ValueError):
    """A set is unknown, missing or damaged; the message names the task, the file or the line."""


class Metric(NamedTuple):
    """A number and its standard error over the examples."""

    value: float
    stderr: float


class Result(NamedTuple):
    """What a model scored on a set."""

    examples: int
    metrics: dict[str, Metric]


class Choices(NamedTuple):
    """An example: one context for all choices, or one each; `gold` counts from 0."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


class LastWord(NamedTuple):
    """An example: a text and the word that ends it, the space before it included."""

    context: str
    word: str


Example = Choices | LastWord


def tasks_in(folder: Path) -> dict[str, Path]:
    """The files of a folder of sets by the names they can be asked for: their own, and without a split's.

    Raises EvaluationError where there is no such folder or no set in it.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder of evaluation sets")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name, form = _name_and_form(path)
        if form in LINES + TEXTS and path.is_file():
            found.setdefault(name, path)
    if not found:
        raise EvaluationError(f"{folder}: has no evaluation sets; they are named *.jsonl, *.jsonl.xz, *.raw or *.txt")
    for split in SPLITS:
        for name in list(found):
            if name.endswith(f"_{split}"):
                found.setdefault(name.removesuffix(f"_{split}"), found[name])
    if "lambada_openai" in found:
        found.setdefault("lambada", found["lambada_openai"])
    return found


def task_path(folder: Path, task: str) -> Path:
    """The file of a task. Raises EvaluationError listing the tasks there are."""
    found = tasks_in(folder)
    if task not in found:
        names = ", ".join(sorted(found))
        raise EvaluationError(
            f"{task}: no such task in {folder} (looked for {task}.jsonl and its like); known: {names}"
        )
    return found[task]


def evaluate(
    lm: Scorer,
    path: Path,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress = lambda done, total: None,
    draw: Random | None = None,
) -> Result:
    """What a model scores on the examples that `read` finds, or on the first `limit` lines of a text.

    Raises EvaluationError naming the file and the line.
    """
    if lm.tokenizer is None:
        raise EvaluationError("this model folder has no tokenizer; put tokenizer.json or tokenizer.model into it")
    if _name_and_form(path)[1] in TEXTS:
        if draw is not None:
            raise EvaluationError(f"{path}: is one text, of which lines cannot be drawn at random")
        text = "".join(islice(_lines(path), limit))
        return perplexity(lm, text, path.name, progress)
    examples = read(path, limit, draw)
    return result_of(examples, scores_of(lm, examples, batch, progress))


def scores_of(
    lm: Scorer, examples: Sequence[Example], batch: int = 8, progress: Progress = lambda done, total: None
) -> list[list[Score]]:
    """What a model makes of every choice, or of the last word, of each example."""
    requests = [request(lm, *pair) for example in examples for pair in pairs(example)]
    scores = iter(loglikelihoods(lm, requests, batch, progress))
    return [[next(scores) for _ in pairs(example)] for example in examples]


def result_of(examples: Sequence[Example], scores: Sequence[Sequence[Score]]) -> Result:
    """The metrics of examples, all of one form, with a score of each choice or word."""
    scored = list(zip(examples, scores, strict=True))
    words = [found[0] for example, found in scored if isinstance(example, LastWord)]
    return _last_words(words) if words else _accuracies([(e, s) for e, s in scored if isinstance(e, Choices)])


def read(path: Path, limit: int | None = None, draw: Random | None = None) -> list[Example]:
    """Examples of a file of lines, all of one form: the first `limit`, or so many different ones at random."""
    lines = [(n, line) for n, line in enumerate(islice(_lines(path), None if draw else limit), 1) if line.strip()]
    if draw is not None:
        lines = draw.sample(lines, len(lines) if limit is None else min(limit, len(lines)))
    examples = [_example(line, f"{path}, line {n}") for n, line in lines]
    if not examples:
        raise EvaluationError(f"{path}: holds no examples")
    if len({type(example) for example in examples}) > 1:
        raise EvaluationError(f"{path}: mixes lines of several forms")
    return examples


def perplexity(lm: Scorer, text: str, name: str, progress: Progress = lambda done, total: None) -> Result:
    """Of one text, read once with the carried state, per token and per word; nothing of it is left out.

    A word's is exp(-log-likelihood / words), which compares models whose tokens differ; `name` is for messages.
    """
    assert lm.tokenizer is not None
    ids = tuple(lm.tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise EvaluationError(f"{name}: holds no text")
    (score,) = loglikelihoods(lm, [Request(beginning(lm), ids)], 1, progress)
    words, nbytes = max(1, len(text.split())), len(text.encode())
    values = {
        "perplexity": math.exp(-score.logprob / len(ids)),
        "word_perplexity": math.exp(-score.logprob / words),
        "bits_per_byte": -score.logprob / math.log(2) / nbytes,
    }
    # One text is one draw: nothing says how far another would be.
    return Result(len(ids), {key: Metric(value, math.nan) for key, value in values.items()})


# --- examples ---------------------------------------------------------------------------------------------------------


def _name_and_form(path: Path) -> tuple[str, str]:
    inner = path.with_suffix("") if path.suffix == ".xz" else path
    return inner.stem, inner.suffix


def _lines(path: Path) -> Iterator[str]:
    compressed = path.suffix == ".xz"
    try:
        with lzma.open(path, "rt", encoding="utf-8") if compressed else path.open(encoding="utf-8") as file:
            yield from file
    except (lzma.LZMAError, EOFError) as error:
        raise EvaluationError(f"{path}: is damaged ({error})") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: is not UTF-8 text ({error.reason})") from None


def _example(line: str, where: str) -> Example:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: is not JSON ({error.msg})") from None
    if not isinstance(fields, dict):
        raise EvaluationError(f"{where}: must be an object, got {type(fields).__name__}")
    if "choices" in fields:
        return _choices(fields, where)
    if "g" in fields and "b" in fields:
        return Choices(("",), (_text(fields, "g", where), _text(fields, "b", where)), 0)
    if "text" in fields:
        context, space, word = _text(fields, "text", where).rstrip().rpartition(" ")
        if not context.strip():
            raise EvaluationError(f"{where}: text: must be of two words at least")
        return LastWord(context, space + word)
    known = '{"ctx", "choices", "gold"}, {"g", "b"} or {"text"}'
    raise EvaluationError(f"{where}: has the fields {', '.join(fields) or '(none)'}; known forms are {known}")


def _choices(fields: dict[str, Any], where: str) -> Choices:
    choices, context, gold = _texts(fields["choices"], "choices", where), fields.get("ctx"), fields.get("gold")
    contexts = (context,) if isinstance(context, str) else _texts(context, "ctx", where)
    if len(contexts) not in (1, len(choices)) or len(choices) < 2:
        raise EvaluationError(f"{where}: has {len(contexts)} contexts for {len(choices)} choices")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise EvaluationError(f"{where}: gold: must be a number from 0 to {len(choices) - 1}, got {gold!r}")
    return Choices(contexts, choices, gold)


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    return _texts([fields[name]], name, where)[0]


def _texts(value: object, name: str, where: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else []
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise EvaluationError(f"{where}: {name}: must be text, got {value!r}")
    return tuple(texts)


def pairs(example: Example) -> list[tuple[str, str]]:
    """(context, continuation) of everything an example needs scored."""
    if isinstance(example, LastWord):
        return [(example.context, example.word)]
    contexts = example.contexts * (len(example.choices) // len(example.contexts))
    return list(zip(contexts, example.choices, strict=True))


# --- metrics ----------------------------------------------------------------------------------------------------------


def chosen(example: Choices, scores: Sequence[Score]) -> dict[str, int]:
    """The choice of the largest log-likelihood: of all of it, of a character (without spaces around) and of a token."""
    found = {"acc": _best([s.logprob for s in scores])}
    if len(example.contexts) == 1:  # in partial scoring, one text follows all
        sizes = [max(1, len(choice.strip())) for choice in example.choices]
        found["acc_norm"] = _best([s.logprob / n for s, n in zip(scores, sizes, strict=True)])
        found["acc_token"] = _best([s.logprob / max(1, s.tokens) for s in scores])
    return found


def _accuracies(scored: Sequence[tuple[Choices, Sequence[Score]]]) -> Result:
    picked = [chosen(*pair) for pair in scored]
    common = [name for name in ("acc", "acc_norm", "acc_token") if all(name in found for found in picked)]
    hits = {name: [f[name] == e.gold for f, (e, _) in zip(picked, scored, strict=True)] for name in common}
    return Result(len(scored), {name: _mean(values) for name, values in hits.items()})


def _last_words(scores: Sequence[Score]) -> Result:
    """How often greedy decoding says the word, and the perplexity of a word."""
    logs = _mean([score.logprob for score in scores])
    value = math.exp(-logs.value)
    metrics = {"acc": _mean([score.greedy for score in scores]), "perplexity": Metric(value, value * logs.stderr)}
    return Result(len(scores), metrics)


def _best(values: Sequence[float]) -> int:
    return int(np.argmax(values))


def _mean(values: Sequence[float]) -> Metric:
    """Of a sample, with its standard error (n - 1 below the root, as lm-evaluation-harness has it)."""
    found = np.asarray(values, np.float64)
    spread = found.std(ddof=1) / math.sqrt(found.size) if found.size > 1 else math.nan
    return Metric(float(found.mean()), float(spread))
