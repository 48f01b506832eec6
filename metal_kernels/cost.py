"""What one decoded token costs: launches counted from the traced step, bytes, and the speed that bandwidth allows.

    python -m metal_kernels.cost [--write]

Nothing runs. The step is traced as on a GPU, compiled, with the kernels of bmojo_metal and without, and its graph is
read. All numbers are computed, none is measured on an Apple GPU. --write: cost.json and the table of README.md.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from bmojo_edge.config import Config, Quantization
from bmojo_edge.mlx import Model
from bmojo_edge.mlx.decode import run_step
from bmojo_edge.mlx.layout import Step
from bmojo_edge.presets import PRESETS
from bmojo_edge.quantize import is_quantizable
from bmojo_edge.state import leaves
from bmojo_metal import use_kernels

PRESET = "370m"  # 24 layers
LAUNCHES_ALLOWED, BYTES_ALLOWED = 10, 1.15  # what we want of a layer, and of bytes moved over bytes required
HERE = Path(__file__).parent
BEGIN, END = "<!-- python -m metal_kernels.cost --write -->", "<!-- end -->"

# Memory bandwidth in GB/s, from Apple's technical specifications and announcements of the chips. For M1 Apple gives
# none: it is what its LPDDR4X-4266 on 128 bits does.
BANDWIDTH = {
    "M1": 68.25,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max (40-core GPU)": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max (40-core GPU)": 546,
    "M5": 153,
}

# Primitives that launch nothing, or nothing where their input is contiguous, as all inputs of a step are.
VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "CustomTransforms", "Depends", "ExpandDims"),
    *("Flatten", "NumberOfElements", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose"),
    *("Unflatten", "View"),
}
PRODUCTS = {"Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM"}
# What stands in the trace for a kernel of ours, MLX's norm and MLX's attention: nothing else uses these primitives.
KERNEL, NORM, ATTENTION = "ErfInv", "Erf", "LogicalNot"
NAMES = {KERNEL: "kernels of ours", NORM: "norms", ATTENTION: "MLX's attention"}
PRODUCTS_OF_OURS, NORMS_OF_OURS = {"linear_wide"}, {"add_rms_norm"}


@dataclass(frozen=True)
class Primitive:
    """A node of the graph before it is compiled: bytes of each input, and of all outputs."""

    name: str
    read: list[int]
    written: int


@dataclass(frozen=True)
class Launch:
    """One call of a kernel of ours, with the bytes of its distinct inputs and of its outputs."""

    kernel: str
    read: int
    written: int


@dataclass(frozen=True)
class Trace:
    """A traced step. dispatches: primitives that launch something, counted once they are compiled."""

    dispatches: Counter[str]
    launches: list[Launch]
    primitives: list[Primitive]


# --- tracing ----------------------------------------------------------------------------------------------------------


@contextmanager
def standins(launches: list[Launch]) -> Iterator[None]:
    """What MLX runs on a GPU only, or takes apart on a CPU, leaves a mark in the graph instead."""
    order = itertools.count()

    def mark(after: Sequence[mx.array], outputs: Sequence[tuple[Any, mx.Dtype]], name: str) -> list[mx.array]:
        one = mx.array(float(next(order)))  # unlike any other: equal ones would be merged
        one = getattr(mx, name)(mx.depends([one], list(after))[0])
        return mx.depends([constant(*output) for output in outputs], [one])

    class Kernel:
        def __init__(self, name: str, **_: Any) -> None:
            self.name = name.removeprefix("bmojo_")

        def __call__(self, inputs: Sequence[Any], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            arrays = [x for x in inputs if isinstance(x, mx.array)]
            made = mark(arrays, list(zip(output_shapes, output_dtypes, strict=True)), "erfinv")
            read = sum({id(x): x.nbytes for x in arrays}.values())
            launches.append(Launch(self.name, read, sum(x.nbytes for x in made)))
            return made

    def norm(x: mx.array, weight: mx.array | None, _eps: float) -> mx.array:
        return mark([x, *([] if weight is None else [weight])], [(x.shape, x.dtype)], "erf")[0]

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None) -> mx.array:
        del scale
        arrays = [q, k, v, *([mask] if isinstance(mask, mx.array) else [])]
        return mark(arrays, [((*q.shape[:-1], v.shape[-1]), q.dtype)], "logical_not")[0]

    with (
        patch.object(mx.fast, "metal_kernel", Kernel),
        patch.object(mx.fast, "rms_norm", norm),
        patch.object(mx.fast, "scaled_dot_product_attention", attention),
        # These launch nothing here, and their primitives cannot be exported.
        patch.object(mx, "contiguous", lambda x, *_, **__: x),
        patch.object(mx, "custom_function", without_gradient),
    ):
        yield


def without_gradient(function: Any) -> Any:
    """mx.custom_function, with a gradient that nobody asks for."""

    def call(*arrays: mx.array) -> Any:
        return function(*arrays)

    call.vjp = lambda gradient: gradient  # type: ignore[attr-defined]
    return call


def constant(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An array that no primitive of the graph has made."""
    return mx.array(np.zeros(tuple(shape), str(dtype).removeprefix("mlx.core.")))


def hollow(x: Any) -> Any:
    """An array of this shape and dtype that takes no memory."""
    return mx.broadcast_to(mx.array(0, x.dtype), x.shape) if isinstance(x, mx.array) else x


def model_of(config: Config, bits: int | None) -> Model:
    """A model whose weights take no memory, quantised as `convert` does it, in groups of 64, where `bits` is given."""
    model = Model(config)
    if bits is not None:
        rule = Quantization(bits=bits, group_size=64)

        def chosen(path: str, module: Any) -> bool:
            return hasattr(module, "to_quantized") and is_quantizable(f"{path}.weight", module.weight.shape, rule)

        nn.quantize(model, rule.group_size, rule.bits, class_predicate=chosen)
    model.update(tree_map(hollow, model.parameters()))
    mx.eval(model.parameters())
    return model


def traced(model: Model, kernels: bool) -> Trace:
    """One row's step after its window and fading memory are full, away from a border of chunks."""
    config, launches, primitives = model.config, [], []
    position = 4 * (config.window + config.fading) + 1
    state = model.init_state(1)._replace(position=mx.array([position], mx.int64))
    mx.eval([x for _, x in leaves(state.layers)], state.position, state.offset)

    def step(token: mx.array, layers: Any, position: mx.array, offset: mx.array) -> list[mx.array]:
        logits, moved = run_step(model, token, layers, Step(config, position, offset, live=10**9, opening=False))
        return [logits, *(x for _, x in leaves(moved))]

    def on_constants(token: mx.array, position: mx.array, offset: mx.array) -> list[mx.array]:
        return step(token, state.layers, position, offset)

    def record(entry: dict[str, Any]) -> None:
        if entry["type"] == "primitive":
            read = [math.prod(shape) * dtype.size for _, shape, dtype in entry["inputs"]]
            written = sum(math.prod(shape) * dtype.size for _, shape, dtype in entry["outputs"])
            primitives.append(Primitive(entry["name"], read, written))

    token, text = mx.array([1]), io.StringIO()
    with standins([]), use_kernels(kernels):
        mx.export_function(record, on_constants, token, state.position, state.offset)
    mx.enable_compile()
    with standins(launches), use_kernels(kernels):
        mx.export_to_dot(text, *mx.compile(step)(token, state.layers, state.position, state.offset))
    counted = Counter(re.findall(r'label ?= ?"([A-Za-z]+)', text.getvalue()))
    assert counted[KERNEL] == len(launches), "every kernel of ours is in the graph once"
    return Trace(Counter({name: n for name, n in counted.items() if name not in VIEWS}), launches, primitives)


# --- bytes ------------------------------------------------------------------------------------------------------------


def parameters_read(model: Model) -> int:
    """Bytes of weights that one token reads: all, and a row of an embedding that is not also the head."""
    config, total = model.config, 0
    parameters: Any = tree_flatten(model.parameters())
    for name, x in parameters:
        untied = name.startswith("embed.") and not config.tie_embeddings
        total += x.nbytes // config.vocab_size if untied else x.nbytes
    return total


def state_required(model: Model) -> tuple[int, int]:
    """Bytes of state that one token must read and write, with all memories full."""
    config, read, written = model.config, 0, 0
    for name, x in leaves(model.init_state(1).layers):
        _, memory, *part = name.split(".")
        if part == ["scores"]:  # read when the eidetic set is chosen, once a chunk
            written += 4 if memory == "window" else 0
        elif memory in ("window", "fading"):
            slot = x.nbytes // x.shape[2]
            read += slot * (config.window if memory == "window" else config.fading)
            written += slot
        elif memory in ("sinks", "eidetic"):
            read += x.nbytes
        else:  # the SSM's and the history of innovation turn over
            read, written = read + x.nbytes, written + x.nbytes
    return read, written


def bytes_moved(model: Model, trace: Trace) -> int:
    """Bytes that all launches of a traced step read and write.

    Elementwise operations count as if nothing fused them, so this is from above; keys that neighbouring threadgroups
    read again come from cache and count once.
    """
    config, total = model.config, 0
    for launch in trace.launches:
        total += launch.read + launch.written
        if launch.kernel == "memory_attention_step" and config.fading:  # walks the visible slots of the fading ring
            total -= 2 * config.window * config.kv_heads * config.d_head * mx_size(config)
    for primitive in trace.primitives:
        if primitive.name in VIEWS or primitive.name == KERNEL:
            continue
        if primitive.name in ("SliceUpdate", "DynamicSliceUpdate"):  # in place: what is put in is read and written
            total += 2 * primitive.read[1]
        elif primitive.name in ("Gather", "GatherAxis"):  # reads no more than it hands on, and the indices
            total += 2 * primitive.written + sum(primitive.read[1:])
        else:
            total += sum(primitive.read) + primitive.written
    return total


def mx_size(config: Config) -> int:
    """Bytes of a number of the model's dtype."""
    return getattr(mx, config.dtype).size


# --- the report -------------------------------------------------------------------------------------------------------


def of_a_layer(config: Config, bits: int | None, kernels: bool) -> tuple[Counter[str], Counter[str], Trace]:
    """What a layer dispatches, all and without products and norms, and the trace of the whole step.

    Kernels of ours go by their own names.
    """

    def named(trace: Trace) -> Counter[str]:
        return trace.dispatches + Counter(launch.kernel for launch in trace.launches) - Counter({KERNEL: 10**9})

    trace = traced(model_of(config, bits), kernels)
    fewer = traced(model_of(config.replace(layer_types=config.layer_types[1:], n_layers=None), bits), kernels)
    everything = named(trace)
    everything.subtract(named(fewer))
    everything = +everything
    known = {*PRODUCTS, NORM, *PRODUCTS_OF_OURS, *NORMS_OF_OURS}
    return everything, Counter({name: n for name, n in everything.items() if name not in known}), trace


def row(weights: str) -> dict[str, Any]:
    """Counts and bytes of the preset with `weights` "float16", "8 bits" or "4 bits"."""
    fields: dict[str, Any] = {**PRESETS[PRESET], "dtype": "float16", "n_sinks": 4}
    config, bits = Config(**fields), None if weights == "float16" else int(weights[0])
    model = model_of(config, bits)
    found: dict[str, Any] = {"model": PRESET, "layers": len(config.layer_types), "weights": weights}
    read, written = state_required(model)
    found |= {"weight_bytes": parameters_read(model), "state_read_bytes": read, "state_written_bytes": written}
    found["required_bytes"] = found["weight_bytes"] + read + written
    for kernels in (False, True):
        a_layer, outside, trace = of_a_layer(config, bits, kernels)
        rotated = of_a_layer(config.replace(rope_theta=10000.0), bits, kernels)[1]
        moved = bytes_moved(model, trace)
        found["kernels" if kernels else "plain"] = {
            "dispatches": trace.dispatches.total(),
            "dispatches_of_a_layer": a_layer.total(),
            "outside_products_and_norms": outside.total(),
            "outside_products_and_norms_with_rope": rotated.total(),
            "which": {NAMES.get(k, k): n for k, n in sorted(outside.items(), key=lambda item: (-item[1], item[0]))},
            "products_and_norms": {NAMES.get(k, k): n for k, n in sorted((a_layer - outside).items())},
            "moved_bytes": moved,
            "moved_to_required": round(moved / found["required_bytes"], 4),
        }
    moved = found["kernels"]["moved_bytes"]
    found["ceiling_tokens_per_s"] = {chip: round(gb * 1e9 / moved, 1) for chip, gb in BANDWIDTH.items()}
    return found


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    first, lines = rows[0], []
    lines += [f"One decoded token of the {first['layers']}-layer preset `{first['model']}` with 4 sinks, one row, all"]
    lines[0] += " memories full, away from a border of chunks. Computed from the traced graph, not measured."
    lines += ["", "| weights | launches | plain MLX | with our kernels | at most |", "|---|---|---|---|---|"]
    names = {"dispatches": "of the token", "dispatches_of_a_layer": "of a layer"}
    names["outside_products_and_norms"] = "of a layer, outside products and norms"
    names["outside_products_and_norms_with_rope"] = "the same with rotary positions"
    for r in rows:
        for key, name in names.items():
            most = LAUNCHES_ALLOWED if key.startswith("outside") else ""
            lines.append(f"| {r['weights']} | {name} | {r['plain'][key]} | {r['kernels'][key]} | {most} |")
    kernels = first["kernels"]
    outside, rest = (
        ", ".join(f"{name} {n}" if n > 1 else name for name, n in kernels[key].items())
        for key in ("which", "products_and_norms")
    )
    lines += ["", f"A layer with {first['weights']} weights: {outside}. Products and norms: {rest}.", ""]
    lines += ["| weights | weights read | state read | state written | required | moved | ratio | plain MLX |"]
    lines[-1] = lines[-1].replace("ratio", f"ratio, at most {BYTES_ALLOWED}")
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in rows:
        sizes = [r["weight_bytes"], r["state_read_bytes"], r["state_written_bytes"], r["required_bytes"]]
        cells = [f"{n / 1e6:.1f} MB" for n in (*sizes, r["kernels"]["moved_bytes"])]
        ratios = [f"{r[name]['moved_to_required']:.3f}" for name in ("kernels", "plain")]
        lines.append(f"| {' | '.join([r['weights'], *cells, *ratios])} |")
    lines += [
        "",
        "Tokens a second that bandwidth allows, no more: GB/s of Apple's published specifications (M1, for which Apple",
        "gives none: of its memory chips) over bytes moved. Computed ceilings; no Apple GPU has run this.",
        "",
    ]
    lines += ["| chip | GB/s | " + " | ".join(r["weights"] for r in rows) + " |", "|---" * (len(rows) + 2) + "|"]
    for chip, gb in BANDWIDTH.items():
        lines.append(
            f"| {chip} | {gb:g} | " + " | ".join(f"{r['ceiling_tokens_per_s'][chip]:.0f}" for r in rows) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write cost.json and the table of README.md")
    rows = [row(weights) for weights in ("float16", "8 bits", "4 bits")]
    text = tables(rows)
    if parser.parse_args().write:
        found = {
            "versions": {"mlx": version("mlx")},
            "computed": "from the traced graph, nothing was run",
            "rows": rows,
        }
        (HERE / "cost.json").write_text(json.dumps(found, indent=1) + "\n")
        readme = (HERE / "README.md").read_text()
        before, _, after = readme.partition(BEGIN)
        _, _, after = after.partition(END)
        assert after, f"README.md must have {BEGIN} and {END}"
        (HERE / "README.md").write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    print(text)


if __name__ == "__main__":
    main()
