"""The training loop: rows in, a step of AdamW, a line in the log; checkpoints, validation, and the end of it.

`train` runs in every process that torchrun starts, or in one by itself. What a step reads, and so the whole loss
curve, follows from the settings and the step: a run that was killed goes on from its last checkpoint as if nothing had
happened. docs/training.md tells it from the outside.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmojo_edge import __version__, run_log
from bmojo_edge.checks import ConfigError, fail
from bmojo_edge.config import Config
from bmojo_edge.dataset import Dataset
from bmojo_edge.divergence import STEPS, Divergence
from bmojo_edge.flops import peak_flops, training_flops_per_token
from bmojo_edge.run_log import Record, RunLog
from bmojo_edge.state import State
from bmojo_edge.torch import trackers
from bmojo_edge.torch.carried import Carried
from bmojo_edge.torch.data import NO_TARGET, Rows, Stream
from bmojo_edge.torch.export import export, whole_parameters
from bmojo_edge.torch.load import load
from bmojo_edge.torch.model import Model
from bmojo_edge.torch.optimizer import adamw, clip_gradients, set_learning_rate
from bmojo_edge.torch.parallel import Parallel, World
from bmojo_edge.torch.run_checkpoint import RunCheckpoints
from bmojo_edge.train_config import TrainConfig

SETTINGS, CHECKPOINTS, MODEL = "config.json", "checkpoints", "model"

# May differ between the parts of a run that is resumed: they change a step's result by rounding at most.
_MAY_CHANGE = ("out", "checkpoints", "validation", "log", "max_divergence", "system", "batch.rows")


class Diverged(ArithmeticError):
    """The loss is no number any more, or has risen far above its lowest; the message names the last checkpoint."""


def train(settings: TrainConfig, resume: bool = False, watch: Callable[[Record], None] | None = None) -> Path:
    """Train a model and write it to `settings.out`/model; the folder of the model.

    resume: go on from the run's last checkpoint, from the beginning where it has none yet. watch is called with every
    record of the log, in the process that leads. Raises ConfigError naming a field, DatasetError, CheckpointError, or
    Diverged.
    """
    trackers.check(settings)
    with World.start(settings.system.device) as world, _folder(settings, resume, world), _determinism(settings):
        trainer = Trainer(settings, world, watch)
        try:
            return trainer.run(resume)
        finally:
            trainer.close()


@contextmanager
def _folder(settings: TrainConfig, resume: bool, world: World) -> Iterator[None]:
    """The run's folder, held by this run alone; what is in it fits what is asked for."""
    out = Path(settings.out)
    with ExitStack() as held:
        if world.leads:
            (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            held.enter_context(_only_user(out))
            known, begun = out / SETTINGS, (out / run_log.FILE).is_file()
            if begun and not resume:
                fail("out", f"{out} holds a run already: resume it, or choose another folder")
            if begun and known.is_file():
                _check_same(json.loads(known.read_text(encoding="utf-8")), json.loads(json.dumps(settings.to_dict())))
            partial = known.with_suffix(".partial")
            partial.write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")
            partial.replace(known)
        world.total(torch.zeros(1, device=world.device))  # the others wait
        yield


@contextmanager
def _only_user(out: Path) -> Iterator[None]:
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(f"out: another process trains in {out}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _check_same(before: dict[str, Any], now: dict[str, Any], owner: str = "") -> None:
    for key in sorted({*before, *now}):
        name, was, wanted = owner + key, before.get(key), now.get(key)
        if name in _MAY_CHANGE or was == wanted:
            continue
        if isinstance(was, dict) and isinstance(wanted, dict):
            _check_same(was, wanted, f"{name}.")
        else:
            raise ConfigError(f"{name}: is {wanted!r}, but the run to resume has {was!r}")


@contextmanager
def _determinism(settings: TrainConfig) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if settings.system.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def start_model(settings: TrainConfig, vocab_size: int) -> Model:
    """The model as training starts, float32, on the CPU: drawn from the seed, or read from `model.init`."""
    if "init" in settings.model:
        fields = {name: value for name, value in settings.model.items() if name != "init"}
        if "preset" in fields:
            fail("model.preset", "says nothing beside model.init, whose folder has a config")
        model = load(settings.model["init"], dtype="float32")
        if model.config.vocab_size < vocab_size:
            fail("model.init", f"has {model.config.vocab_size} tokens, the data has {vocab_size}")
        return model if not fields else _changed(model, fields)
    torch.manual_seed(settings.seed)
    return Model(settings.model_config(vocab_size).replace(dtype="float32"))


def _changed(model: Model, fields: dict[str, Any]) -> Model:
    """A model of the same weights with other memories."""
    try:
        other = Model(model.config.replace(**{**fields, "dtype": "float32"}))
        other.load_state_dict(model.state_dict())
    except (ConfigError, TypeError, RuntimeError) as error:
        raise ConfigError(f"model: does not go with the weights of model.init ({error})") from None
    return other


class Trainer:
    """One process's part of a run: model, optimizer, rows and carried states. `train` makes one and runs it."""

    def __init__(self, settings: TrainConfig, world: World, watch: Callable[[Record], None] | None) -> None:
        self.settings, self.world, self.watch = settings, world, watch
        self.out, self.log, self.trackers, self.closers = Path(settings.out), None, [], []
        self.data = Dataset.open(settings.data.train)
        model = start_model(settings, self.data.vocab_size).to(world.device)
        precision = settings.system.precision or ("bfloat16" if world.device.type == "cuda" else "float32")
        model.config = self.config = model.config.replace(dtype=precision)
        self.own, self.at_once = settings.rows_of(world.size)
        length, align = settings.data.sequence_length, settings.align_of(self.config)
        self.stream = Stream(self.data, length, settings.rows, align, settings.data.carry, settings.seed)
        self.valid = None if settings.data.valid is None else self._validation(align)
        cast = torch.bfloat16 if precision == "bfloat16" else None
        self.parallel = Parallel(model, settings.system, cast, world)
        self.optimizer = adamw(model, self.config, settings.optimizer)
        self.carried = Carried(self.config, self.own, self.at_once, world) if settings.data.carry else None
        self.checkpoints = RunCheckpoints(self.out / CHECKPOINTS, settings.checkpoints.keep)
        self.flops = training_flops_per_token(self.config, length)
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
        tflops = settings.system.peak_tflops
        self.device_name, self.peak = name, peak_flops(name) if tflops is None else tflops * 1e12
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="rows")

    def _validation(self, align: int) -> Stream:
        data, settings = Dataset.open(self.settings.data.valid or ""), self.settings
        if data.vocab_size != self.data.vocab_size:
            fail("data.valid", f"has {data.vocab_size} tokens, data.train has {self.data.vocab_size}")
        return Stream(data, settings.data.sequence_length, 1, align, carry=False, seed=None)

    def close(self) -> None:
        """End the log and what follows it."""
        self.reader.shutdown(wait=False, cancel_futures=True)
        for close in self.closers:
            close()
        if self.log is not None:
            self.log.close()

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self, resume: bool) -> Path:
        """Train from the last checkpoint or from the beginning to the end; the folder of the model."""
        settings, step = self.settings, self._resume() if resume else 0
        self._open_log(step if resume else None)
        ahead = self._ahead(step)
        while step < settings.steps:
            begun, rows = time.perf_counter(), ahead.result()
            ahead = self._ahead(step + 1)
            loss, norm, rate = self.step(step, rows)
            step += 1
            self._record(step, loss, norm, rate, time.perf_counter() - begun)
            last = step == settings.steps
            if self.valid is not None and (last or step % settings.validation.every == 0):
                self._write({"step": step, "valid_loss": self._valid_loss(self.valid)})
            if last or step % settings.checkpoints.every == 0:
                self.checkpoints.save(step, self._tensors(), {"tokens": step * settings.batch.tokens})
        self.checkpoints.wait()
        weights = whole_parameters(self.parallel.model)
        if self.world.leads:
            export(self.out / MODEL, self.config, weights, self.data.folder)
        return self.out / MODEL

    def _ahead(self, step: int) -> Future[list[Rows]]:
        return self.reader.submit(self.batches, step)

    def batches(self, step: int) -> list[Rows]:
        """This process's rows of a step, as many at a time as it computes."""
        first = self.world.rank * self.own
        return [self.stream.rows(step, begin, self.at_once) for begin in range(first, first + self.own, self.at_once)]

    def step(self, step: int, batches: list[Rows]) -> tuple[float, float, float]:
        """Loss, norm of the gradient and learning rate of a step; changes the parameters unless one is not finite."""
        device, parameters = self.world.device, list(self.parallel.model.parameters())
        targets = sum(int((rows.targets != NO_TARGET).sum()) for rows in batches)
        totals = self.world.total(torch.tensor([targets], dtype=torch.int64, device=device))
        count, losses = int(totals), torch.zeros((), device=device)
        for i, rows in enumerate(batches):
            with self.parallel.accumulating(more=i + 1 < len(batches)):
                loss, state = self._forward(rows, None if self.carried is None else self.carried.states[i])
                self.parallel.backward(loss / count)
            losses += loss.detach()
            if self.carried is not None and state is not None:
                self.carried.states[i] = state
        self.parallel.reduce()
        norm = clip_gradients(parameters, self.settings.optimizer.clip)
        loss = float(self.world.total(losses)) / count
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "norm of the gradient"
            self._stop(step + 1, f"the {what} is {loss if what == 'loss' else norm}")
        set_learning_rate(self.optimizer, self.settings.optimizer, step, self.settings.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["scale"]

    def _forward(self, rows: Rows, state: State | None) -> tuple[Tensor, State | None]:
        def put(x: Any) -> Tensor:
            tensor = torch.from_numpy(x)
            pinned = tensor.pin_memory() if self.world.device.type == "cuda" else tensor
            return pinned.to(self.world.device, non_blocking=True)

        segments = None if rows.plain else rows.segments
        restarts = put(rows.restarts) if state is not None and rows.restarts.any() else None
        return self.parallel.module(put(rows.tokens), put(rows.targets), segments, state, restarts)

    def _valid_loss(self, stream: Stream) -> float:
        """Mean loss of the first rows of the validation data, each fresh, shared among the processes."""
        count, world = min(self.settings.validation.rows, stream.steps_per_epoch), self.world
        totals = torch.zeros(2, dtype=torch.float64)
        turns = -(-count // world.size)  # every process takes as many turns: sharded layers gather together
        for turn in range(turns):
            row = turn * world.size + world.rank
            rows = stream.rows(min(row, count - 1), 0, 1)
            with self.parallel.evaluating():
                loss, _ = self._forward(rows, None)
            if row < count:
                totals += torch.tensor([float(loss), float((rows.targets != NO_TARGET).sum())], dtype=torch.float64)
        total, targets = world.total(totals).tolist()
        return total / max(targets, 1.0)

    # --- what is kept -------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on, by name; loading fills the same tensors."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parallel.model.named_parameters():
            found[f"model.{name}"] = parameter.detach()
            state = self.optimizer.state[parameter]
            if not state:  # before the first step: as AdamW would make it
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            found[f"optimizer.{name}.step"] = state["step"].view(1)
            found |= {f"optimizer.{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        return found if self.carried is None else found | self.carried.tensors()

    def _resume(self) -> int:
        """Load the last checkpoint; its step, 0 where there is none."""
        if self.world.leads:
            self.checkpoints.clean()
        last = self.checkpoints.steps()[-1:]
        if not last:
            return 0
        step = last[0]
        self.checkpoints.info(step)
        if self.carried is not None:
            self.carried.make_room(self.checkpoints.shapes(step))
        tensors = self._tensors()
        self.checkpoints.load(step, tensors)
        if self.carried is not None:
            self.carried.take(tensors)
        return step

    # --- what is told -------------------------------------------------------------------------------------------------

    def _open_log(self, upto: int | None) -> None:
        before = run_log.read(self.out) if upto and (self.out / run_log.FILE).is_file() else []
        self.divergence = Divergence(run_log.losses(before, upto or 0))
        if not self.world.leads:
            return
        self.log = RunLog(self.out, upto)
        self.trackers, self.closers = trackers.open_trackers(self.settings)
        config: Config = self.config
        self._write(
            {
                "event": "start" if not upto else "resume",
                "at": upto or 0,
                "steps": self.settings.steps,
                "tokens_per_step": self.settings.batch.tokens,
                "parameters": sum(p.numel() for p in self.parallel.model.parameters()),
                "flops_per_token": self.flops,
                "device": self.device_name,
                "processes": self.world.size,
                "precision": config.dtype,
                "versions": {"bmojo-edge": __version__, "torch": torch.__version__},
            }
        )

    def _record(self, step: int, loss: float, norm: float, rate: float, seconds: float) -> None:
        """Log a step; stop where the loss has left its lowest far behind."""
        speed, cuda = self.settings.batch.tokens / seconds, self.world.device.type == "cuda"
        record: Record = {
            "step": step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": step * self.settings.batch.tokens,
            "seconds": seconds,
            "tokens_per_s": speed,
            "mfu": None if self.peak is None else speed * self.flops / (self.peak * self.world.size),
            "memory_bytes": torch.cuda.max_memory_allocated(self.world.device) if cuda else None,
        }
        self._write(record)
        rise = self.divergence.rise(loss)
        if rise > self.settings.max_divergence:
            self._stop(step, f"the mean loss of {STEPS} steps is {rise:.2f} nats above its lowest")

    def _write(self, record: Record) -> None:
        if self.log is None:
            return
        self.log.write(record)
        for tracker in self.trackers if "step" in record else ():
            tracker(record)
        if self.watch is not None:
            self.watch(record)

    def _stop(self, step: int, why: str) -> None:
        self.checkpoints.wait()
        last = self.checkpoints.steps()
        kept = f"the last checkpoint is {self.checkpoints.path(last[-1])}" if last else "there is no checkpoint yet"
        half = self.config.dtype != "float32" and "bmojo" in self.config.layer_types and not self.config.qk_norm
        norm = ", set model.qk_norm (docs/training.md)" if half else ""
        raise Diverged(
            f"step {step}: {why}; training stopped, {kept}. Lower optimizer.lr{norm}, or look at the data of this step."
        )
