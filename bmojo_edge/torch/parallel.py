"""Several processes training one model: who they are, how gradients are averaged, how parameters are sharded.

One process needs no group. torchrun starts the others and sets what `World.start` reads. Parameters and reductions are
float32; with FSDP2 each layer's parameters are gathered in the computation's precision.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from bmojo_edge.checks import fail
from bmojo_edge.torch.model import Model
from bmojo_edge.torch.trainee import Trainee, float32_names, prepare
from bmojo_edge.train_config import System


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # None: one process

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def start(cls, device: str | None) -> Iterator[World]:
        """The processes torchrun started, or this one alone; the group ends with the block."""
        kind, size = _device_kind(device), int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield cls(0, 1, torch.device(kind, 0) if kind == "cuda" else torch.device(kind), None)
            return
        if kind == "mps":
            fail("system.device", "mps is one device: train in one process there")
        place = torch.device(kind)
        if kind == "cuda":
            place = torch.device(kind, int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), size, place, init_device_mesh(kind, (size,)))
        finally:
            dist.destroy_process_group()

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all processes."""
        if self.mesh is not None:
            dist.all_reduce(x)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The maximum of x over all processes."""
        if self.mesh is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def shared_rows(self, x: Tensor) -> Tensor:
        """This process's rows as its part of all rows, in the order of ranks."""
        return x if self.mesh is None else DTensor.from_local(x, self.mesh, [Shard(0)], run_check=False)


def _device_kind(wanted: str | None) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted is None:
        return next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[wanted]:
        fail("system.device", f"{wanted} is not available to PyTorch on this machine")
    return wanted


class Parallel:
    """A model that trains in all processes of a world: call it as a `Trainee`, then `backward`, then `reduce`."""

    def __init__(self, model: Model, system: System, cast: torch.dtype | None, world: World) -> None:
        self.model, self.world = model, world
        sharded = world.mesh is not None and system.strategy == "fsdp"
        prepare(model, None if sharded else cast, system.recompute, system.compile)
        self.module: nn.Module = Trainee(model, None if sharded else cast)
        self.apart: list[nn.Parameter] = []  # parameters that are whole in every process and reduced by `reduce`
        if sharded:
            self._shard(cast)
        elif world.mesh is not None:
            self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)

    def _shard(self, cast: torch.dtype | None) -> None:
        policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
        kept = float32_names(self.model.config) if cast is not None else set()
        self.apart = [p for n, p in self.model.named_parameters() if n in kept]
        mesh, apart = self.world.mesh, set(self.apart)
        for block in self.model.blocks():
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=apart)
        fully_shard(self.module, mesh=mesh, mp_policy=policy, ignored_params=apart)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss that is this process's share of a sum over all processes."""
        (loss * self.world.size).backward()  # processes average

    @contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        """Where `more` gradients are to come, do not average yet (sharded gradients always are: they stay small)."""
        if more and isinstance(self.module, DistributedDataParallel):
            with self.module.no_sync():
                yield
        else:
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute without gradients."""
        with torch.no_grad():
            yield
        if isinstance(self.module, FSDPModule):  # else the root stays gathered, and its next gradient is wrong
            self.module.reshard()

    def reduce(self) -> None:
        """Average what the wrappers do not, once a step."""
        grads = [p.grad for p in self.apart if p.grad is not None]
        if grads:
            flat = self.world.total(torch.cat([g.flatten() for g in grads])) / self.world.size
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))
