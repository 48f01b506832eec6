"""Trains small models on fixed examples, several at once on one GPU: a run's step is a CUDA graph on its own stream.

A step of such a model is hundreds of small kernels that leave a GPU almost idle. Captured once and replayed, it costs
one launch, and steps of different runs overlap. On a CPU the same code runs the steps one by one.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.repro.tasks import IGNORED, Examples
from bmojo_edge import Config
from bmojo_edge.torch import Model

SSM_PARAMETERS = (".ssm.", ".in_proj.", ".conv.", ".x_proj.", ".dt_proj.", ".A_log", ".D")
NO_DECAY = ("norm.weight", "A_log", ".D", "bias")
WARM_UP_STEPS = 3  # eager steps before a capture, as torch.cuda.graph asks for
AHEAD = 8  # steps of a run that wait on the device: enough to keep it busy, few enough for every run to get its turn


@dataclass(frozen=True)
class Recipe:
    """How a run is trained. `epochs` are at most; a run that answers `enough` of the test right ends early."""

    lr: float
    seed: int
    epochs: int = 32
    batch: int = 128
    fresh: bool = False  # an epoch is that share of the examples, each seen once; else it is all of them
    weight_decay: float = 0.1
    warm_up: float = 0.1  # share of the steps in which the learning rate rises
    ssm_lr: float = 1.0  # learning rate of the SSM's parameters over that of the others
    clip: float = 1.0
    enough: float = 0.9995


@dataclass
class Outcome:
    """What a run came to."""

    accuracy: float = 0.0  # of the last evaluation
    best: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)  # accuracy after each epoch


class Questions(NamedTuple):
    """Examples on a device, and where in each of them something is asked."""

    tokens: Tensor  # (n, t) int16
    targets: Tensor  # (n, t) int16, IGNORED where nothing is asked
    columns: Tensor  # (n, q) int64


def questions(examples: Examples, device: torch.device) -> Questions:
    """Examples as a run takes them; vocabularies fit into 16 bits."""
    tokens, targets = (torch.from_numpy(x.astype(np.int16)).to(device) for x in examples)
    columns = [_queries(part) for part in targets.split(65_536)]
    widest = max(part.shape[1] for part in columns)
    columns = [part[:, torch.arange(widest, device=device).clamp(max=part.shape[1] - 1)] for part in columns]
    return Questions(tokens, targets, torch.cat(columns))


def _queries(targets: Tensor) -> Tensor:
    """Columns (n, q) of the scored targets of each row, padded with the row's last one. Every row has at least one."""
    asked = targets != IGNORED
    count = int(asked.sum(1).max())
    order = (~asked).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    last = asked.sum(1, keepdim=True).clamp(min=1) - 1
    return torch.where(torch.arange(count, device=targets.device) <= last, order, order.gather(1, last))


def groups(model: Model, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay."""
    found: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        slow = any(part in f".{name}" for part in SSM_PARAMETERS)
        found.setdefault((slow, name.endswith(NO_DECAY)), []).append(parameter)
    return [
        {
            "params": parameters,
            "scale": recipe.ssm_lr if slow else 1.0,
            "weight_decay": 0.0 if plain else recipe.weight_decay,
        }
        for (slow, plain), parameters in found.items()
    ]


def schedule(recipe: Recipe, steps: int) -> list[float]:
    """The learning rate of every step: linear warm-up, then a cosine to zero."""
    rising = max(1, round(recipe.warm_up * steps))
    up = [recipe.lr * (i + 1) / rising for i in range(rising)]
    down = max(1, steps - rising)
    return [*up, *(0.5 * recipe.lr * (1 + math.cos(math.pi * i / down)) for i in range(down))][:steps]


class Run:
    """One model in training; `advance()` enqueues a step and says nothing of when it ends."""

    def __init__(self, config: Config, train: Questions, test: Questions, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device, self.outcome = recipe, device, Outcome()
        self.model = Model(config).to(device)
        self.train, self.test = train, test
        self.each = len(train.tokens) // (recipe.epochs if recipe.fresh else 1)  # examples of an epoch
        self.batches = self.each // recipe.batch
        if not self.batches:
            raise ValueError(f"batch: {recipe.batch} is more than the {self.each} training examples of an epoch")
        steps = recipe.epochs * self.batches
        self.rates = torch.tensor(schedule(recipe, steps), device=device)
        self.order = torch.zeros(self.batches * recipe.batch, dtype=torch.int64, device=device)
        self.shuffle = np.random.default_rng(recipe.seed)
        self.unseen = self.shuffle.permutation(len(train.tokens))
        self.step, self.batch = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups(self.model, recipe), lr=torch.tensor(recipe.lr, device=device), betas=(0.9, 0.98), capturable=on_gpu
        )
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(recipe.lr, device=device)
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = self.left = 0  # steps run without a graph, steps left in this epoch
        self.waiting: deque[torch.cuda.Event] = deque()  # steps enqueued that the device may not have ended
        self.began = time.perf_counter()

    def _train_step(self) -> None:
        """One step, without a look at the host: which batch and which learning rate are read from the device."""
        size = self.recipe.batch
        rows = self.order[self.batch * size + torch.arange(size, device=self.device)]
        columns = self.train.columns[rows]
        hidden = self.model.activations(self.train.tokens[rows].long())  # a growing cache would be counted on the host
        asked = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        answers = self.train.targets[rows].gather(1, columns).long()
        loss = F.cross_entropy(self.model.head(asked).flatten(0, 1).float(), answers.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip, foreach=True)
        rate = self.rates.take(self.step)  # an index would be read by the host
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate * group["scale"])
        self.optimizer.step()
        self.step += 1
        self.batch += 1

    def _reshuffle(self) -> None:
        if len(self.unseen) < self.each:
            self.unseen = self.shuffle.permutation(len(self.train.tokens))
        self.order.copy_(torch.from_numpy(self.unseen[: len(self.order)]))
        self.unseen = self.unseen[self.each :]
        self.batch.zero_()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; the eager steps it needs before it were the first steps of training."""
        torch.cuda.synchronize()  # no other run may allocate while this one is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._train_step()
        return graph

    def begin_epoch(self) -> None:
        """Put the training examples in a new order."""
        with torch.cuda.stream(self.stream):
            self._reshuffle()
        self.left = self.batches

    def busy(self) -> bool:
        """Whether the device has as many steps of this run to do as it should."""
        while self.waiting and self.waiting[0].query():
            self.waiting.popleft()
        return len(self.waiting) >= (AHEAD if self.left else 1)

    def advance(self) -> None:
        """Enqueue one step."""
        with torch.cuda.stream(self.stream):
            if self.stream is None or self.eager < WARM_UP_STEPS:
                self._train_step()
                self.eager += 1
            else:
                if self.graph is None:
                    self.graph = self._captured()
                self.graph.replay()
        if self.stream is not None:
            event = torch.cuda.Event()
            event.record(self.stream)
            self.waiting.append(event)
        self.left -= 1
        self.outcome.steps += 1

    @torch.no_grad()
    def answers(self, asked: Questions) -> Tensor:
        """What the model says at every column (n, q) where something is asked, of examples of any length."""
        found = []
        with torch.cuda.stream(self.stream):
            for tokens, _, columns in zip(*(x.split(self.recipe.batch) for x in asked), strict=True):
                hidden = self.model.activations(tokens.long())
                hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
                found.append(self.model.head(hidden).argmax(-1).to(asked.targets.dtype))
            said = torch.cat(found)
        if self.stream is not None:
            self.stream.synchronize()  # who reads it may do so on another stream
        return said

    def score(self, asked: Questions) -> float:
        """Share of the questions answered right."""
        with torch.cuda.stream(self.stream):
            said = torch.full_like(asked.targets, IGNORED - 1).scatter(1, asked.columns, self.answers(asked))
            return int((said == asked.targets).sum()) / int((asked.targets != IGNORED).sum())

    def evaluate(self) -> bool:
        """Wait for the epoch, test the model, and say whether the run is over."""
        accuracy = self.score(self.test)
        self.outcome.accuracy = accuracy
        self.outcome.best = max(self.outcome.best, accuracy)
        self.outcome.curve.append(round(accuracy, 4))
        self.outcome.seconds = time.perf_counter() - self.began
        return accuracy >= self.recipe.enough or len(self.outcome.curve) >= self.recipe.epochs


def train_together(
    starts: Iterator[Callable[[], Run]], at_once: int, more_time: Callable[[], bool] = lambda: True
) -> Iterator[Run]:
    """Keep `at_once` runs going, yield each as it ends, start the next in its place; stop when there is no more time.

    Runs that are cut off by the clock are not yielded: their results would be those of unfinished training.
    """
    active: list[Run] = []
    waiting = True
    while active or waiting:
        while waiting and len(active) < at_once:
            start = next(starts, None)
            if start is None:
                waiting = False
            else:
                active.append(start())
                active[-1].begin_epoch()
        if not active or not more_time():
            return
        ready = [run for run in active if not run.busy()]
        if not ready:
            time.sleep(1e-4)
        for run in ready:
            if run.left:
                run.advance()
            elif not run.evaluate():
                run.begin_epoch()
            else:
                active.remove(run)
                yield run
