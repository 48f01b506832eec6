"""The adapter of lm-evaluation-harness, driven by the harness itself on task files written here."""

from __future__ import annotations

import json
import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmojo_edge import evaluation
from bmojo_edge.generate import generate
from tests.absent import absent
from tests.unit.test_evaluation import CHOICES, folder, naive, opened, run, write  # noqa: F401 (folder: a fixture)

TASKS = {
    "tiny_choices": """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_text": """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
    "tiny_answers": """
task: tiny_answers
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/answers.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
TEXTS = ["The river runs to the sea. " * 9, "Hello, how are you?"]


@pytest.fixture(autouse=True)
def harness() -> Any:
    """The harness's own warnings are its own."""
    if find_spec("lm_eval") is None:
        absent("the lm-evaluation-harness adapter", "lm_eval is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module", params=["mlx", "torch"])
def lm(folder: Path, request: pytest.FixtureRequest) -> Any:  # noqa: F811
    return opened(folder, request.param)


@pytest.fixture
def tasks(lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "choices.jsonl", CHOICES)
    write(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    asked = ["The river", "Hello, how are"]
    answers = [generate(lm, asked[0], max_tokens=8), "something else"]
    write(tmp_path / "answers.jsonl", [{"question": q, "answer": a} for q, a in zip(asked, answers, strict=True)])
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("DIR", str(tmp_path)))
    return tmp_path


def test_the_harness_gets_our_numbers(lm: Any, tasks: Path) -> None:
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from bmojo_edge.harness import HarnessLM, results_of

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    adapter = HarnessLM(lm, batch=3)
    evaluate: Any = lm_eval.simple_evaluate
    results = results_of(evaluate(adapter, tasks=list(TASKS), task_manager=manager, bootstrap_iters=10))

    ours = evaluation.evaluate(lm, tasks / "choices.jsonl")
    theirs = results["tiny_choices"]
    assert theirs.examples == ours.examples == len(CHOICES)
    assert theirs.metrics["acc"] == pytest.approx(ours.metrics["acc"])

    logs = 0.0
    for text in TEXTS:
        ids = tuple(lm.tokenizer.encode(text, add_special_tokens=False))
        logs += naive(lm, (adapter.prefix_token_id,), ids)[0]
    nbytes = sum(len(text.encode()) for text in TEXTS)
    assert results["tiny_text"].metrics["byte_perplexity"].value == pytest.approx(math.exp(-logs / nbytes), rel=1e-4)
    (answered,) = [m.value for name, m in results["tiny_answers"].metrics.items() if name.startswith("exact_match")]
    assert answered == 0.5


def test_options_of_answers(lm: Any) -> None:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    from bmojo_edge.harness import HarnessLM

    def ask(**options: Any) -> list[str]:
        one = Instance("generate_until", {}, ("The river", options), 0)
        return HarnessLM(lm).generate_until([one])

    whole = generate(lm, "The river", max_tokens=8)
    assert ask(max_gen_toks=8, until=[]) == [whole]
    assert ask(max_new_tokens=8, until=whole[3:5]) == [whole.split(whole[3:5])[0]]
    assert ask(max_gen_toks=8, do_sample=False, temperature=3.0) == [whole]
    drawn = {ask(max_gen_toks=8, do_sample=True, temperature=3.0, seed=seed)[0] for seed in range(3)}
    assert len(drawn) > 1
    with pytest.raises(ValueError, match="num_beams is not known"):
        ask(num_beams=4)


@pytest.mark.slow  # the harness reads its thousands of task files
@pytest.mark.parametrize("lm", ["torch"], indirect=True)
def test_the_command_runs_tasks_of_the_harness(folder: Path, tasks: Path) -> None:  # noqa: F811
    arguments = (folder, "--tasks", "tiny_choices", "--include", tasks, "--limit", "2", "--engine", "torch", "--json")
    found = json.loads(run(*arguments).stdout)["tasks"]["tiny_choices"]
    assert found["examples"] == 2
    ours = evaluation.evaluate(opened(folder, "torch"), tasks / "choices.jsonl", limit=2)
    assert found["metrics"]["acc"]["value"] == pytest.approx(ours.metrics["acc"].value)
    assert np.isfinite(found["metrics"]["acc"]["stderr"])
    message = run(folder, "--tasks", "tiny_choice", "--include", tasks, code=2).stderr
    assert "no 'tiny_choice'" in message and "tiny_choices" in message
