"""Evaluation: scores are those of whole forward passes, contexts are read once, files are read or refused clearly."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from bmojo_edge import checkpoint, evaluation
from bmojo_edge.cli import app
from bmojo_edge.config import Config
from bmojo_edge.evaluation import EvaluationError
from bmojo_edge.generate import generate
from bmojo_edge.parameters import parameter_shapes
from bmojo_edge.scoring import (
    Asked,
    Request,
    Scorer,
    beginning,
    continuations,
    divergences,
    loglikelihoods,
    predictions,
    request,
)
from bmojo_edge.tensors import as_numpy
from bmojo_edge.tokenizer import Tokenizer

ENGINES = ("mlx", "torch")


@pytest.fixture(scope="module")
def folder(byte_level_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of every memory, full attention beside it, with a tokenizer; answers are far from uniform."""
    path, tokenizer = tmp_path_factory.mktemp("models") / "tiny", Tokenizer.load(byte_level_folder)
    config = Config.preset(
        "tiny", vocab_size=tokenizer.vocab_size, layer_types=("bmojo", "attention"), n_sinks=2, window=16, n_eidetic=8
    )
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.normal(size=shape) * (3 if "embed" in name else 1) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    checkpoint.save(path, config, weights, byte_level_folder)
    return path


@pytest.fixture(scope="module", params=ENGINES)
def lm(folder: Path, request: pytest.FixtureRequest) -> Any:
    return opened(folder, request.param)


def opened(folder: Path, engine: str) -> Any:
    if engine == "mlx":
        from bmojo_edge.mlx import load

        return load(folder)
    from bmojo_edge.torch import load as load_torch

    return load_torch(folder)


def naive(lm: Any, context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[float, bool]:
    """One forward pass over the whole sequence, alone in its batch."""
    ids = np.array([*context, *continuation])
    logits = as_numpy(lm.forward(ids[None])[0])[0].astype(np.float64)
    logs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    at = np.arange(len(context) - 1, len(ids) - 1)
    return float(logs[at, ids[at + 1]].sum()), bool((logs[at].argmax(-1) == ids[at + 1]).all())


def greedy_ids(lm: Any, context: tuple[int, ...], n: int) -> tuple[int, ...]:
    ids = list(context)
    for _ in range(n):
        ids.append(int(as_numpy(lm.forward(np.array(ids)[None])[0])[0, -1].argmax()))
    return tuple(ids[len(context) :])


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_scores_are_those_of_whole_forward_passes(lm: Any, batch: int) -> None:
    rng = np.random.default_rng(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, lm.config.vocab_size, n).tolist())

    contexts = [ids(n) for n in (1, 5, 37, 23)]
    asked = [Request(context, ids(n)) for context in contexts for n in (1, 2, 9)]
    asked += [Request(contexts[1], greedy_ids(lm, contexts[1], 4)), Request(contexts[2], ())]
    asked.append(Request(ids(3), ids(150)))  # longer than a block, than the window and than what is read before it
    seen: list[tuple[int, int]] = []
    found = loglikelihoods(lm, asked, batch, lambda done, total: seen.append((done, total)))
    for one, score in zip(asked, found, strict=True):
        logprob, same = naive(lm, *one)
        assert score.logprob == pytest.approx(logprob, rel=2e-5, abs=2e-5)
        assert score.greedy == same and score.tokens == len(one.continuation)
    total = sum(len(one.continuation) for one in asked)
    assert seen[-1] == (total, total) and seen == sorted(seen)
    assert found[-3].greedy and not found[2].greedy  # both answers occur


def test_a_shared_context_is_read_once(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    prefill = lm.prefill

    def counting(tokens: Any, state: Any, lengths: Any = None) -> Any:
        read.extend(np.asarray(lengths).tolist())
        return prefill(tokens, state, lengths)

    monkeypatch.setattr(type(lm), "prefill", lambda self, *args: counting(*args))
    shared = (3, 4, 5, 6)
    loglikelihoods(lm, [Request(shared, (n, n + 1)) for n in range(5)] + [Request((9, 8), (7,))], batch=2)
    assert sorted(read) == [2, 4]


def test_gradients_are_not_kept(folder: Path) -> None:
    import torch

    with torch.enable_grad():
        model: Any = opened(folder, "torch")
        kept: list[bool] = []
        head = model.head
        model.head = lambda hidden: kept.append(hidden.requires_grad) or head(hidden)
        loglikelihoods(model, [Request((1, 2), (3, 4, 5))])
    assert kept and not any(kept)


def test_answers_written_together_are_those_written_alone(lm: Any) -> None:
    texts = ["The river", "Hello, how are you? I am", "x", "print('hello"]
    alone = [generate(lm, text, max_tokens=12) for text in texts]
    stop = next(answer[3:5] for answer in alone if len(answer) > 5)
    asked = [Asked(tuple(lm.tokenizer.encode(text)), 12, (stop,)) for text in texts]
    assert continuations(lm, asked, batch=3) == [answer.split(stop)[0] for answer in alone]
    assert continuations(lm, [one._replace(max_tokens=0) for one in asked]) == [""] * 4


def test_texts_are_cut_where_tokens_meet(lm: Any) -> None:
    tokenizer = lm.tokenizer
    whole = tokenizer.encode("The river runs")
    for context, continuation in (("The river", " runs"), ("The river ", "runs")):
        cut = request(lm, context, continuation)
        assert [*cut.context, *cut.continuation] == whole and cut.context == tuple(tokenizer.encode("The river"))
    across = request(lm, "The riv", "er")  # one token of the whole text
    assert across.context == tuple(tokenizer.encode("The riv"))
    assert tokenizer.decode(across.continuation) == "er"
    assert request(lm, "", "The").context == beginning(lm)


# --- sets in files


CHOICES = [
    {"ctx": "The river runs to", "choices": [" the sea", " you and the lazy dog"], "gold": 0},
    {"ctx": "Hello,", "choices": [" fox", " how are you?", " x"], "gold": 1},
    {"ctx": "The quick", "choices": [" brown fox", " dog"], "gold": 1},
]
PARTIAL = [
    {"ctx": ["The fox", "The dog"], "choices": [" jumps", " jumps"], "gold": 1},
    {"ctx": ["I am", "you am"], "choices": [" fine", " fine"], "gold": 0},
]
WORDS = [{"text": "The river runs to the sea"}, {"text": "how are you"}, {"text": "the lazy dog"}]
PAIRS = [{"g": "the sea runs", "b": "runs sea the"}, {"g": "I am fine", "b": "fine am I"}]


def write(path: Path, rows: list[Any]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with lzma.open(path, "wt") if path.suffix == ".xz" else path.open("w") as file:
        file.write(text)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets")
    write(path / "quiz_test.jsonl.xz", CHOICES)
    write(path / "quiz_val.jsonl", CHOICES[1:2])
    write(path / "schemas.jsonl", PARTIAL)
    write(path / "lambada_openai_test.jsonl.xz", WORDS)
    write(path / "pairs.jsonl", PAIRS)
    (path / "book_test.txt").write_text("The river runs to the sea.\nthe sea runs to the river.\n" * 4)
    (path / "README.md").write_text("not a set")
    return path


def logprob(lm: Any, context: str, text: str) -> float:
    return naive(lm, *request(lm, context, text))[0]


def test_metrics_are_those_of_the_definition(lm: Scorer, sets: Path) -> None:
    known = evaluation.tasks_in(sets)
    assert known["quiz"].name == "quiz_test.jsonl.xz" and "README" not in known

    logs = [[logprob(lm, row["ctx"], choice) for choice in row["choices"]] for row in CHOICES]
    plain = [float(np.argmax(found) == row["gold"]) for found, row in zip(logs, CHOICES, strict=True)]
    normed = [
        float(np.argmax([x / len(c.strip()) for x, c in zip(found, row["choices"], strict=True)]) == row["gold"])
        for found, row in zip(logs, CHOICES, strict=True)
    ]
    result = evaluation.evaluate(lm, known["quiz"])
    assert result.examples == 3 and set(result.metrics) == {"acc", "acc_norm", "acc_token"}
    for name, hits in (("acc", plain), ("acc_norm", normed)):
        assert result.metrics[name].value == pytest.approx(np.mean(hits))
        assert result.metrics[name].stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(3))
    assert evaluation.evaluate(lm, known["quiz"], limit=2).metrics["acc"].value == pytest.approx(np.mean(plain[:2]))

    hits = [logprob(lm, r["ctx"][r["gold"]], r["choices"][0]) > logprob(lm, r["ctx"][1 - r["gold"]], r["choices"][0])
            for r in PARTIAL]  # fmt: skip
    assert evaluation.evaluate(lm, known["schemas"]).metrics == {"acc": evaluation._mean(hits)}

    hits = [logprob(lm, "", row["g"]) > logprob(lm, "", row["b"]) for row in PAIRS]
    assert evaluation.evaluate(lm, known["pairs"]).metrics["acc"].value == np.mean(hits)


def test_examples_drawn_at_random(lm: Scorer, sets: Path) -> None:
    known = evaluation.tasks_in(sets)
    everything = evaluation.read(known["quiz"])
    draw, again = Random(0), Random(0)
    first, second = (evaluation.read(known["quiz"], 2, draw) for _ in range(2))
    assert first == again.sample(everything, 2) and second == again.sample(everything, 2)
    assert sorted(evaluation.read(known["quiz"], 99, draw)) == sorted(everything)
    with pytest.raises(EvaluationError, match="is one text"):
        evaluation.evaluate(lm, known["book"], 2, draw=draw)


def test_last_words_and_perplexity(lm: Scorer, sets: Path) -> None:
    known = evaluation.tasks_in(sets)
    assert known["lambada"] == known["lambada_openai_test"]
    cut = [row["text"].rpartition(" ") for row in WORDS]
    found = [naive(lm, *request(lm, context, space + word)) for context, space, word in cut]
    result = evaluation.evaluate(lm, known["lambada"])
    assert result.metrics["acc"].value == np.mean([same for _, same in found])
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(-np.mean([x for x, _ in found])), rel=1e-4)

    text, tokenizer = (sets / "book_test.txt").read_text(), lm.tokenizer
    assert tokenizer is not None
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    total, _ = naive(lm, beginning(lm), ids)
    result = evaluation.evaluate(lm, known["book"])
    assert result.examples == len(ids)
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert values["perplexity"] == pytest.approx(math.exp(-total / len(ids)), rel=1e-4)
    assert values["word_perplexity"] == pytest.approx(math.exp(-total / 48), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(-total / math.log(2) / len(text), rel=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("[1]", "line 1: must be an object"),
        ('{"question": "x"}', "line 1: has the fields question; known forms"),
        ('{"ctx": "x", "choices": ["a", "b"], "gold": 2}', "line 1: gold: must be a number from 0 to 1, got 2"),
        ('{"ctx": "x", "choices": ["a", "b"], "gold": true}', "line 1: gold"),
        ('{"ctx": ["x", "y", "z"], "choices": ["a", "b"], "gold": 0}', "line 1: has 3 contexts for 2 choices"),
        ('{"ctx": 1, "choices": ["a", "b"], "gold": 0}', "line 1: ctx: must be text, got 1"),
        ('{"ctx": "x", "choices": ["a", ""], "gold": 0}', "line 1: choices: must be text"),
        ('{"text": "word"}', "line 1: text: must be of two words"),
        ('{"text": "two words"}\n{"g": "x", "b": "y"}', "mixes lines"),
        ("\n", "holds no examples"),
    ],
)
def test_bad_lines_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=r"bad\.jsonl.*" + message.replace("(", r"\(")):
        evaluation.read(tmp_path / "bad.jsonl")


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    whole = lzma.compress(json.dumps(WORDS[0]).encode() * 50)
    for name, content in (("cut.jsonl.xz", whole[:-30]), ("not.jsonl.xz", b"plain")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EvaluationError, match=f"{name}: is damaged"):
            evaluation.read(tmp_path / name)


# --- the command


def run(*arguments: object, code: int = 0) -> Result:
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], env=environment)
    assert result.exit_code == code, result.output
    return result


def test_both_engines_print_the_same(folder: Path, sets: Path) -> None:
    arguments = (folder, "--tasks", "quiz,lambada,schemas", "--data", sets, "--json")
    found = {engine: json.loads(run(*arguments, "--engine", engine).stdout) for engine in ENGINES}
    mlx, torch = (found[engine]["tasks"] for engine in ENGINES)
    assert list(mlx) == list(torch) == ["quiz", "lambada", "schemas"]
    for name, task in mlx.items():
        assert (
            task["examples"]
            == torch[name]["examples"]
            == len(WORDS if name == "lambada" else CHOICES) - (name == "schemas")
        )
        for metric, value in task["metrics"].items():
            assert value["value"] == pytest.approx(torch[name]["metrics"][metric]["value"], rel=1e-4)
    table = run(folder, "--tasks", "quiz", "--data", sets, "--engine", "torch").stdout
    assert "acc_norm" in table and "standard error" in table


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--tasks", "nothing", "--data", "SETS"), 1, "known: book, book_test, lambada"),
        (("--tasks", "quiz", "--data", "nowhere"), 1, "nowhere: no such folder of evaluation sets"),
        (("--tasks", ",", "--data", "SETS"), 2, "--tasks: give one name"),
        (("--tasks", "quiz", "--data", "SETS", "--limit", "0"), 2, "--limit"),
        (("--tasks", "quiz", "--data", "SETS", "--seed", "0"), 2, "--seed draws --limit N examples"),
        (("--tasks", "quiz", "--limit", "5", "--seed", "0"), 2, "--seed draws --limit N examples"),
        (("--tasks", "quiz", "--data", "SETS", "--engine", "mlx", "--device", "cuda"), 2, "--device is PyTorch's"),
        (("--tasks", "quiz", "--data", "SETS", "--engine", "torch", "--device", "warp"), 2, "--device warp: PyTorch"),
    ],
)
def test_misuse_is_told_before_a_model_is_loaded(
    arguments: tuple[str, ...], code: int, message: str, sets: Path
) -> None:
    given = [str(sets) if argument == "SETS" else argument for argument in arguments]
    assert message in run("no-such-model", *given, code=code).stderr


def test_a_missing_model_is_named(sets: Path, tmp_path: Path) -> None:
    assert "none" in run(tmp_path / "none", "--tasks", "quiz", "--data", sets, code=1).stderr


def test_predictions_and_how_far_they_are_apart(lm: Any) -> None:
    """The calls' sizes change nothing; a model is no distance from itself, and some from one that is half as sure."""
    ids, sizes = np.arange(3, 33, dtype=np.int32), [1, 7, 1, 20, 1]
    ours, ends = predictions(lm, ids, sizes), np.cumsum(sizes) - 1
    np.testing.assert_allclose(np.exp(ours).sum(-1), 1, rtol=1e-12)
    for row, end in zip(ours, ends, strict=True):
        for token in (int(row.argmax()), 5):
            assert row[token] == pytest.approx(naive(lm, tuple(ids[: end + 1].tolist()), (token,))[0], abs=1e-4)
    half = ours / 2
    half -= np.log(np.exp(half).sum(-1, keepdims=True))
    kl = divergences(ours, half)
    np.testing.assert_array_equal(divergences(ours, ours), 0)
    p = np.exp(ours)
    want = -(p * half).sum(-1) - (-(p * ours).sum(-1))  # cross entropy less entropy
    np.testing.assert_allclose(kl, want, rtol=1e-9)
    assert (kl > 0).all()
