"""Runs a saved Core ML package in NumPy: what its MIL program means by our reading, not what Apple's runtime does.

`Package` reads the file back, weights and all, and executes one function at a time on states that outlive the call.
Every operation computes in float32 (float64 is not needed for the bounds) and its result is rounded to the type that
the program gives it; `states="float32"` leaves the states unrounded, to tell the graph's meaning from half precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

WANTED = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "int16": np.int16, "bool": np.bool_}
WANTED |= {"int8": np.int8, "uint8": np.uint8, "uint16": np.uint16}


class Package:
    """A saved .mlpackage. `run(function, inputs, states)` returns outputs by name and changes `states`."""

    def __init__(self, path: Path, states: str = "float16") -> None:
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        import coremltools as ct  # pyright: ignore[reportMissingImports]
        from coremltools.converters.mil.frontend.milproto.load import load  # pyright: ignore[reportMissingImports]
        from coremltools.converters.mil.mil.types import nptype_from_builtin  # pyright: ignore[reportMissingImports]

        model = ct.models.MLModel(str(path), skip_model_load=True)
        spec = model.get_spec()
        self.spec = spec
        self.functions = load(spec, spec.specificationVersion, model.weights_dir or "").functions
        self._nptype, self.rounded = nptype_from_builtin, states == "float16"
        self._constants: dict[int, Array] = {}

    def states(self, function: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a function's states."""
        found = next(f for f in self.spec.description.functions if f.name == function)
        return {x.name: tuple(x.type.stateType.arrayType.shape) for x in found.state}

    def inputs(self, function: str) -> set[str]:
        """Names of what a function takes besides states."""
        found = next(f for f in self.spec.description.functions if f.name == function)
        return {x.name for x in found.input}

    def operations(self, function: str) -> set[str]:
        """Types of the operations a function consists of."""
        return {op.op_type for op in self.functions[function].operations}

    def places(self, function: str) -> dict[int, int]:
        """Bytes of each constant that a function reads from the file of weights, by its place there."""
        found = self.spec.mlProgram.functions[function]
        sizes = {1: 1, 10: 2, 11: 4, 12: 8}  # bool, float16, float32, float64; integers are few and small
        places = {}
        for op in found.block_specializations[found.opset].operations:
            for value in (*op.attributes.values(), *(b.value for x in op.inputs.values() for b in x.arguments)):
                if value.HasField("blobFileValue"):
                    kind = value.type.tensorType
                    count = int(np.prod([d.constant.size for d in kind.dimensions]))
                    places[value.blobFileValue.offset] = count * sizes.get(kind.dataType, 4)
        return places

    def run(self, function: str, inputs: Mapping[str, Array], states: dict[str, Array]) -> dict[str, Array]:
        program = self.functions[function]
        held: dict[Any, Any] = {v: inputs.get(name, name) for name, v in program.inputs.items()}

        def value(x: Any) -> Any:
            if isinstance(x, tuple | list):
                return [value(each) for each in x]
            return held.get(x, x.val)

        for op in program.operations:
            given = {name: value(x) for name, x in op.inputs.items() if x is not None}
            if op.op_type == "read_state":
                results: Any = states[given["input"]].copy()
            elif op.op_type == "coreml_update_state":
                results = states[given["state"]] = np.array(given["value"], self._stored(given["value"]))
            elif op.op_type == "const" or op.op_type.startswith("constexpr"):
                results = self._constant(op)
            elif op.op_type in OPERATIONS:
                results = OPERATIONS[op.op_type](_Given(given))
            else:
                raise NotImplementedError(f"MIL operation {op.op_type}")
            for out, result in zip(op.outputs, results if isinstance(results, list) else [results], strict=True):
                held[out] = self._typed(result, out, op.op_type)
        return {out.name: held[out] for out in program.outputs}

    def _stored(self, value: Array) -> Any:
        return np.float16 if self.rounded else value.dtype

    def _constant(self, op: Any) -> Array:
        if id(op) not in self._constants:
            found = op.outputs[0].val
            self._constants[id(op)] = op.materialized_val_inference() if found is None else found
        return self._constants[id(op)]

    def _typed(self, result: Any, out: Any, kind: str) -> Any:
        """The result in the type that the program declares; shapes it declares are checked."""
        if isinstance(result, str):
            return result
        wanted, result = self._nptype(out.dtype), np.asarray(result)
        if all(isinstance(n, int | np.integer) for n in out.shape):
            assert result.shape == tuple(out.shape), f"{kind} {out.name}: {result.shape}, declared {out.shape}"
        keep = not self.rounded and wanted == np.float16 and result.dtype == np.float32
        return result if keep else result.astype(wanted)


class State:
    """Stands in for coremltools' MLState."""

    def __init__(self, values: dict[str, Array]) -> None:
        self.values = values

    def write_state(self, name: str, value: Array) -> None:
        assert value.shape == self.values[name].shape, name
        self.values[name] = value.astype(self.values[name].dtype)


class Function:
    """Stands in for coremltools' MLModel: one function of a package."""

    def __init__(self, package: Package, name: str) -> None:
        self.package, self.name = package, name

    def make_state(self) -> State:
        kind = np.float16 if self.package.rounded else np.float32
        return State({name: np.zeros(shape, kind) for name, shape in self.package.states(self.name).items()})

    def predict(self, given: Mapping[str, Array], state: State) -> dict[str, Array]:
        assert set(given) == self.package.inputs(self.name)
        return self.package.run(self.name, given, state.values)


def functions(path: Path, states: str = "float16") -> dict[str, Function]:
    """Every function of a saved package, by name."""
    package = Package(path, states)
    return {name: Function(package, name) for name in package.functions}


class _Given:
    """An operation's arguments by name; half precision is read as float32."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    def __getattr__(self, name: str) -> Any:
        found = self.arguments[name]
        return _wide(found)

    def get(self, name: str, default: Any) -> Any:
        return _wide(self.arguments.get(name, default))

    def axes(self) -> tuple[int, ...]:
        return tuple(int(a) for a in np.atleast_1d(self.arguments["axes"]))


def _wide(x: Any) -> Any:
    if isinstance(x, list):
        return [_wide(each) for each in x]
    return x.astype(np.float32) if getattr(x, "dtype", None) == np.float16 else x


def _index(given: _Given) -> tuple[Any, ...]:
    n = np.ndim(given.x)
    begin, end, stride = (given.get(name, None) for name in ("begin", "end", "stride"))
    masks = [given.get(f"{name}_mask", None) for name in ("begin", "end", "squeeze")]
    masks = [np.zeros(n, bool) if mask is None else mask for mask in masks]
    found: list[Any] = []
    for d in range(n):
        if masks[2][d]:
            found.append(int(begin[d]))
            continue
        first, last = None if masks[0][d] else int(begin[d]), None if masks[1][d] else int(end[d])
        found.append(slice(first, last, 1 if stride is None else int(stride[d])))
    return tuple(found)


def _slice_update(given: _Given) -> Array:
    x = np.array(given.x)
    x[_index(given)] = given.update
    return x


def _matmul(given: _Given) -> Array:
    x, y = given.x, given.y
    x = x.swapaxes(-1, -2) if given.get("transpose_x", False) else x
    return x @ (y.swapaxes(-1, -2) if given.get("transpose_y", False) else y)


def _softmax(given: _Given) -> Array:
    x = np.exp(given.x - given.x.max(int(given.axis), keepdims=True))
    return x / x.sum(int(given.axis), keepdims=True)


def _split(given: _Given) -> list[Array]:
    sizes = given.get("split_sizes", None)
    where = int(given.num_splits) if sizes is None else np.cumsum(sizes)[:-1]
    return list(np.split(given.x, where, int(given.axis)))


def _band_part(given: _Given) -> Array:
    lower, upper = int(given.get("lower", -1)), int(given.get("upper", -1))
    x = given.x if lower < 0 else np.triu(given.x, -lower)
    return x if upper < 0 else np.tril(x, upper)


def _expand_dims(given: _Given) -> Array:
    return np.expand_dims(given.x, given.axes())


def _squeeze(given: _Given) -> Array:
    return np.squeeze(given.x, given.axes() if "axes" in given.arguments else None)


def _pad(given: _Given) -> Array:
    assert given.mode == "constant"
    widths = np.reshape(given.pad, (-1, 2))
    widths = np.concatenate([np.zeros((np.ndim(given.x) - len(widths), 2), int), widths])
    return np.pad(given.x, widths, constant_values=given.constant_val)


def _conv(given: _Given) -> Array:
    """One dimension, whole groups: a causal convolution's."""
    x, weight, groups = given.x, given.weight, int(given.get("groups", 1))
    assert x.ndim == 3 and given.pad_type == "valid" and groups == x.shape[1] == weight.shape[0]
    views = np.lib.stride_tricks.sliding_window_view(x, weight.shape[-1], axis=-1)  # (b, c, t, k)
    return (views * weight[:, 0, None]).sum(-1) + np.reshape(given.get("bias", np.float32(0)), (-1, 1))


def _binary(function: Callable[[Any, Any], Array]) -> Callable[[_Given], Array]:
    return lambda given: function(given.x, given.y)


def _reduce(function: Callable[..., Array]) -> Callable[[_Given], Array]:
    return lambda given: function(given.x, given.axes(), keepdims=bool(given.get("keep_dims", False)))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


OPERATIONS: dict[str, Callable[[_Given], Any]] = {
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "real_div": _binary(np.divide),
    "floor_div": _binary(np.floor_divide),
    "mod": _binary(np.mod),
    "pow": _binary(np.power),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "equal": _binary(np.equal),
    "not_equal": _binary(np.not_equal),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "logical_and": _binary(np.logical_and),
    "logical_or": _binary(np.logical_or),
    "logical_not": lambda given: np.logical_not(given.x),
    "select": lambda given: np.where(given.cond, given.a, given.b),
    "exp": lambda given: np.exp(given.x),
    "sqrt": lambda given: np.sqrt(given.x),
    "square": lambda given: np.square(given.x),
    "rsqrt": lambda given: 1 / np.sqrt(given.x + given.get("epsilon", 0)),
    "sigmoid": lambda given: _sigmoid(given.x),
    "silu": lambda given: given.x * _sigmoid(given.x),
    "softplus": lambda given: np.logaddexp(np.float32(0), given.x),
    "clip": lambda given: np.clip(given.x, given.alpha, given.beta),
    "band_part": _band_part,
    "cumsum": lambda given: np.cumsum(given.x, int(given.get("axis", 0))),
    "softmax": _softmax,
    "reduce_sum": _reduce(np.sum),
    "reduce_mean": _reduce(np.mean),
    "reduce_l2_norm": _reduce(lambda x, *axes, **keep: np.sqrt(np.sum(np.square(x), *axes, **keep))),
    "abs": lambda given: np.abs(given.x),
    "linear": lambda given: given.x @ given.weight.T + given.get("bias", np.float32(0)),
    "matmul": _matmul,
    "conv": _conv,
    "cast": lambda given: given.x.astype(WANTED[given.dtype]) if given.dtype != "fp16" else np.asarray(given.x),
    "identity": lambda given: given.x,
    "reshape": lambda given: np.reshape(given.x, given.shape),
    "transpose": lambda given: np.transpose(given.x, given.perm),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "concat": lambda given: np.concatenate([np.asarray(v) for v in given.values], int(given.axis)),
    "stack": lambda given: np.stack(given.values, int(given.axis)),
    "tile": lambda given: np.tile(given.x, given.reps),
    "split": _split,
    "pad": _pad,
    "slice_by_index": lambda given: np.asarray(given.x)[_index(given)],
    "slice_update": _slice_update,
    "fill_like": lambda given: np.full(np.shape(given.ref_tensor), given.value),
    "gather": lambda given: np.take(given.x, given.indices, int(given.get("axis", 0))),
    "gather_along_axis": lambda given: np.take_along_axis(
        given.x, np.asarray(given.indices, np.int64), int(given.axis)
    ),
}
