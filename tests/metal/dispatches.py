"""Counts what one decoded token launches, layer by layer: python -m tests.metal.dispatches [preset].

The step is traced as on a GPU, compiled, with the kernels of bmojo_metal and without; nothing runs. What only changes
how memory is looked at is not counted. Computed, not measured on an Apple GPU.
"""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from bmojo_edge.config import Config
from bmojo_edge.mlx import Model
from bmojo_edge.mlx.decode import run_step
from bmojo_edge.mlx.layout import Step
from bmojo_edge.presets import PRESETS
from bmojo_edge.state import leaves
from bmojo_metal import use_kernels

# Primitives that launch nothing, or nothing where their input is contiguous.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "CustomTransforms", "Depends", "ExpandDims",
    "Flatten", "Full", "NumberOfElements", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose",
    "Unflatten", "View",
}  # fmt: skip
KERNEL, NORM = "ErfInv", "Erf"  # primitives that stand for a kernel of ours and for MLX's norm: nothing else uses them
MATRIX = {"Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM", NORM}


_order = itertools.count()


class Standin:
    """In place of mx.fast.metal_kernel: outputs that depend on the inputs, and a mark to count a launch by."""

    def __init__(self, name: str, **_: Any) -> None:
        self.name = name

    def __call__(self, inputs: Sequence[Any], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        arrays = [x for x in inputs if isinstance(x, mx.array)]
        mark = mx.erfinv(mx.array(float(next(_order))))  # unlike any other: equal ones would be merged
        outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        return mx.depends(outputs, mx.depends([mark], arrays))


def launches(config: Config, kernels: bool) -> Counter[str]:
    """Primitives of one decoding step after the window is full, far from a border of chunks."""
    model = Model(config)
    position = 3 * config.window + 1
    state = model.init_state(1)._replace(position=mx.array([position], mx.int64))
    given = [x for _, x in leaves(state.layers)]
    mx.eval(model.parameters(), given)

    def step(token: mx.array, layers: Any, position: mx.array, offset: mx.array) -> Any:
        live = config.window * 4
        return run_step(model, token, layers, Step(config, position, offset, None, live, opening=False))

    def norm(x: mx.array, weight: mx.array | None, _eps: float) -> mx.array:  # on a CPU MLX takes it apart
        return mx.erf(mx.depends([x], [] if weight is None else [weight])[0])

    mx.enable_compile()
    with (
        patch.object(mx.fast, "metal_kernel", Standin),
        patch.object(mx.fast, "rms_norm", norm),
        use_kernels(kernels),
    ):
        logits, layers = mx.compile(step)(mx.array([1]), state.layers, state.position, state.offset)
    text = io.StringIO()
    mx.export_to_dot(text, logits, *(x for _, x in leaves(layers)))
    return Counter(re.findall(r'label ?= ?"([A-Za-z]+)', text.getvalue()))


def a_layer(preset: str, kernels: bool) -> Counter[str]:
    """Launches of one layer: what a model of four has more than one of three."""
    fields = dict(PRESETS[preset])
    counts = [launches(Config(**{**fields, "layer_types": fields["layer_types"][:1] * n}), kernels) for n in (3, 4)]
    counts[1].subtract(counts[0])
    return Counter({name: n for name, n in counts[1].items() if n and name not in VIEWS})


def main(preset: str = "tiny") -> None:
    for kernels in (False, True):
        counts = a_layer(preset, kernels)
        matrix = sum(n for name, n in counts.items() if name in MATRIX)
        print(f"{'kernels' if kernels else 'plain MLX'}: {counts.total() - matrix} + {matrix} products and norms")
        print("  " + ", ".join(f"{name} {n}" for name, n in counts.most_common()))


if __name__ == "__main__":
    main(*sys.argv[1:])
