"""States of an ONNX export on their provider's device: values that are written in place where nobody can tell.

Knows onnxruntime's arrays and bindings, and nothing of models. A `Step` is a call of a graph that has not run. It holds
the arrays it reads; what it may write in place (docs/export.md) it does where no leaf holds the old value any more when
it runs. Otherwise it writes to spare arrays, of which two sets take turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


class _Slot:
    """An array on the device, once it is there, and how many leaves hold it."""

    __slots__ = ("holders", "shape", "value")

    def __init__(self, shape: tuple[int, ...], value: Any = None) -> None:
        self.shape, self.value, self.holders = shape, value, 0


class Leaf:
    """An array of a state, float32; of a step that has not run, which then runs when it is looked at."""

    __slots__ = ("_buffers", "_slot", "_step")

    def __init__(self, buffers: Buffers, slot: _Slot, step: Step | None = None) -> None:
        self._buffers, self._slot, self._step = buffers, slot, step
        slot.holders += 1

    def __del__(self) -> None:
        self._slot.holders -= 1
        if not self._slot.holders:
            self._buffers.give_back(self._slot)

    @property
    def dtype(self) -> np.dtype:
        """Always float32."""
        return np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """(b, ...)."""
        return self._slot.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return 4 * math.prod(self._slot.shape)

    def settled(self) -> _Slot:
        """The slot, its array written."""
        if self._step is not None:
            self._step.run()
            self._step = None
        return self._slot

    def claim(self) -> Leaf:
        """Another leaf of the same array, written."""
        return Leaf(self._buffers, self.settled())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.settled().value.numpy(), dtype)  # a copy: the array may be written later


class Buffers:
    """Device arrays by shape. One that no leaf holds any more is given out again."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._spare: dict[tuple[int, ...], list[Any]] = {}

    def filled(self, content: np.ndarray) -> Leaf:
        """A leaf that holds `content`."""
        import onnxruntime as ort

        value = ort.OrtValue.ortvalue_from_numpy(np.array(content, np.float32), self.device, 0)
        return Leaf(self, _Slot(content.shape, value))

    def take(self, shape: tuple[int, ...]) -> Any:
        """An array to be written."""
        import onnxruntime as ort

        if self._spare.get(shape):
            return self._spare[shape].pop()
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.float32, self.device, 0)

    def give_back(self, slot: _Slot) -> None:
        """Make a slot's array spare, if it has one."""
        if slot.value is not None:
            self._spare.setdefault(slot.shape, []).append(slot.value)
            slot.value = None

    def count(self) -> int:
        """How many arrays are spare."""
        return sum(map(len, self._spare.values()))


class Step:
    """A call of a graph. It runs once, when one of its leaves or what it says is looked at."""

    def __init__(
        self,
        session: Any,
        graph: Mapping[str, list[str]],
        given: Mapping[str, np.ndarray],
        held: Mapping[str, Leaf],
        buffers: Buffers,
    ) -> None:
        """graph: its `inputs`, `outputs` and `in_place`; given: inputs on the host; held: leaves by name.

        What it makes of `held` are leaves, named `new.` and the old one's name; whatever else it makes it says.
        """
        self._session, self._graph, self._given, self._buffers = session, graph, given, buffers
        # Steps before this one run now: their callers have let go of older states, and none waits for a long chain.
        self._read = {name: held[name].claim() for name in graph["inputs"] if name in held}
        made = [name.removeprefix("new.") for name in graph["outputs"]]
        self._made = {name: _Slot(held[name].shape) for name in made if name in held}
        self._said: dict[str, np.ndarray] | None = None

    def leaves(self) -> dict[str, Leaf]:
        """The leaves it makes, for a state to hold."""
        return {name: Leaf(self._buffers, slot, self) for name, slot in self._made.items()}

    def said(self) -> dict[str, np.ndarray]:
        """What the graph makes besides leaves, on the host."""
        self.run()
        assert self._said is not None
        return self._said

    def run(self) -> None:
        """Run, if that has not been done."""
        if self._said is not None:
            return
        binding, outputs = self._session.io_binding(), self._graph["outputs"]
        slots = {name: leaf.settled() for name, leaf in self._read.items()}
        for name in self._graph["inputs"]:
            if name in slots:
                binding.bind_ortvalue_input(name, slots[name].value)
            else:
                binding.bind_cpu_input(name, self._given[name])
        in_place = {name for name in self._graph["in_place"] if slots[name].holders == 1}  # this step alone
        for output in outputs:
            name = output.removeprefix("new.")
            if name not in self._made:
                binding.bind_output(output)
                continue
            slot = self._made[name]
            slot.value = slots[name].value if name in in_place else self._buffers.take(slot.shape)
            binding.bind_ortvalue_output(output, slot.value)
        self._session.run_with_iobinding(binding)
        for name in in_place:
            slots[name].value = None
        values = dict(zip(outputs, binding.get_outputs(), strict=True))
        self._said = {x: value.numpy() for x, value in values.items() if x.removeprefix("new.") not in self._made}
        self._read, self._given = {}, {}
        for slot in self._made.values():
            if not slot.holders:
                self._buffers.give_back(slot)


class Logits:
    """The logits (b, v) of a step; it runs when they are looked at. NumPy takes them as an array."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._step.said()["logits"], dtype)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]
