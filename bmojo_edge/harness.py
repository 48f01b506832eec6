"""A model as EleutherAI's lm-evaluation-harness takes one: `simple_evaluate(model=HarnessLM(lm), tasks=[...])`.

Either twin; the extra `eval` installs the harness. Texts of any length are read whole with the carried state: there is
no window beyond which a context is cut off. Knows nothing of how models are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

from bmojo_edge.evaluation import Metric, Result
from bmojo_edge.sampling import Sampling
from bmojo_edge.scoring import Asked, Progress, Request, Scorer, beginning, continuations, loglikelihoods

MAX_TOKENS = 256  # of an answer whose task names no bound, the harness's own

_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_BOUNDS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessLM(TemplateLM):
    """The harness's face of a model of either twin; at most `batch` sequences are computed together.

    progress(done, total) is called as the requests of a kind are answered. Raises ValueError for a model without a
    tokenizer, or for an option of generation that is not known.
    """

    def __init__(self, lm: Scorer, batch: int = 8, progress: Progress = lambda done, total: None) -> None:
        super().__init__()
        if lm.tokenizer is None:
            raise ValueError("this model folder has no tokenizer; put tokenizer.json or tokenizer.model into it")
        self.lm, self.batch, self.progress = lm, batch, progress
        self._tokenizer = lm.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return min(self._tokenizer.eos_ids) if self._tokenizer.eos_id is None else self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        return beginning(self.lm)[-1]

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells caches of prompts apart by."""
        return str(self._tokenizer.folder or "tokenizer").replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the special tokens the model expects around it unless told otherwise."""
        ids = self._tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        bos = self._tokenizer.bos_id
        twice = add_special_tokens is None and bos is not None and ids[:2] == [bos, bos]  # templates write it as well
        return ids[1:] if twice else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, by the model's own template."""
        return self._tokenizer.render_chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness writes into its log of the template; the tokenizer applies its own."""
        return "" if self._tokenizer.has_chat_template else None

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = [(s.logprob, s.greedy) for s in loglikelihoods(self.lm, asked, self.batch, self.progress)]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, read in one stream."""
        keys = [cast("tuple[str]", one.args) for one in requests]
        start = beginning(self.lm)
        asked = [Request(start, tuple(self._tokenizer.encode(text, add_special_tokens=False))) for (text,) in keys]
        found = [score.logprob for score in loglikelihoods(self.lm, asked, self.batch, self.progress)]
        for key, answer in zip(keys, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", key, answer)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first of its stop strings; greedy unless the task samples."""
        keys = [cast("tuple[str, dict[str, Any]]", one.args) for one in requests]
        asked = [_asked(tuple(self.tok_encode(text)) or beginning(self.lm), options) for text, options in keys]
        found = continuations(self.lm, asked, self.batch, self.progress)
        for key, answer in zip(keys, found, strict=True):
            self.cache_hook.add_partial("generate_until", key, answer)
        return found


def results_of(found: Mapping[str, Any]) -> dict[str, Result]:
    """What `simple_evaluate` returns, task by task; a filter that a metric went through stays in its name."""
    results = {}
    for task, values in found["results"].items():
        metrics = {}
        for key, value in values.items():
            name, comma, chosen = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{name}_stderr,{chosen}")
            spread = float(stderr) if isinstance(stderr, int | float) else math.nan
            metrics[name if chosen == "none" else key] = Metric(float(value), spread)
        results[task] = Result(found["n-samples"].get(task, {}).get("effective", 0), metrics)
    return results


def _asked(prompt: tuple[int, ...], options: Mapping[str, Any]) -> Asked:
    """A prompt with what a task says of its answer, in the words of transformers' `generate`."""
    left = {name: value for name, value in options.items() if value is not None}
    until = left.pop("until", ())
    stop = (until,) if isinstance(until, str) else tuple(until)
    bounds = [left.pop(name) for name in _BOUNDS if name in left]
    sampling = {name: left.pop(name) for name in _OPTIONS if name in left}
    sampled = left.pop("do_sample", None)
    if sampled is not None:
        sampling["temperature"] = sampling.get("temperature", 1.0) if sampled else 0.0
    if left:
        raise ValueError(f"generation_kwargs: {', '.join(left)} is not known to this model")
    return Asked(
        prompt, int(bounds[0]) if bounds else MAX_TOKENS, tuple(text for text in stop if text), Sampling(**sampling)
    )
