"""The states that rows carry from one step to the next, and how they are kept in a checkpoint.

A process has one state for every batch of rows it computes at a time. In a checkpoint they are one, the rows of all
processes in order, so that another number of processes or another batch can take them up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from bmojo_edge.config import Config
from bmojo_edge.state import State, leaves, map_leaves, state_spec
from bmojo_edge.torch.layout import fresh_state
from bmojo_edge.torch.parallel import World

_PREFIX = "carried."


class Carried:
    """States of `rows` rows of this process, `at_once` rows each, in `states`."""

    def __init__(self, config: Config, rows: int, at_once: int, world: World) -> None:
        self.world, self.at_once = world, at_once
        self.states = [fresh_rows(config, at_once, world.device) for _ in range(rows // at_once)]
        self._growing = tuple(f"layers.{i}." for i in config.growing_layers)

    def tensors(self) -> dict[str, Tensor]:
        """Every leaf of all rows by its name; caches that grow are made equally long."""
        found: dict[str, Tensor] = {}
        for name in [name for name, _ in leaves(self.states[0])]:
            parts = [dict(leaves(state))[name] for state in self.states]
            if name.startswith(self._growing):
                size = torch.tensor([max(part.shape[2] for part in parts)], device=self.world.device)
                parts = [_of_size(part, int(self.world.largest(size))) for part in parts]
            found[_PREFIX + name] = self.world.shared_rows(torch.cat(parts))
        return found

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Grow caches to the shapes a checkpoint has them in, so that `tensors` can be filled from it."""
        for i, state in enumerate(self.states):
            values = dict(leaves(state))
            for name in values:
                if name.startswith(self._growing) and _PREFIX + name in shapes:
                    values[name] = _of_size(values[name], shapes[_PREFIX + name][2])
            self.states[i] = _with(state, values)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the rows the states that were loaded into what `tensors` gave."""
        own: dict[str, Tensor] = {}
        for name in [name for name, _ in leaves(self.states[0])]:
            tensor = tensors[_PREFIX + name]
            own[name] = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        parts = {name: tensor.split(self.at_once) for name, tensor in own.items()}
        self.states = [_with(s, {name: parts[name][i].clone() for name in own}) for i, s in enumerate(self.states)]


def fresh_rows(config: Config, rows: int, device: torch.device) -> State:
    """The state of rows that have read nothing, in the precision of `config`."""
    return fresh_state(state_spec(config), rows, getattr(torch, config.dtype), torch.empty(0, device=device))


def _of_size(cache: Tensor, size: int) -> Tensor:
    """A cache (b, g, n, p) with at least `size` slots."""
    return F.pad(cache, (0, 0, 0, max(0, size - cache.shape[2])))


def _with(state: State, values: Mapping[str, Tensor]) -> State:
    """A state of the same form with other leaves, by their names."""
    names = iter([name for name, _ in leaves(state)])
    return map_leaves(lambda _: values[next(names)], state)
