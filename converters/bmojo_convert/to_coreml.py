"""`to_coreml`: a model folder into one Core ML package whose functions share weights and half-precision states.

The functions are the graphs of step.py: `decode`, `prefill` and, with eidetic slots, `commit`. Core ML itself runs on
Apple systems only: this module converts anywhere and runs nothing; docs/export.md describes the folder.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo_convert.export_folder import SELF_TEST, ExportError, Target, exported_folder
from bmojo_convert.exporting import open_exportable, record
from bmojo_convert.step import Commit, Decode, Graph, Prefill, StateLeaf, position_cycle, state_leaves
from bmojo_edge.config import Config
from bmojo_edge.rope import turns_per_token
from bmojo_edge.tensors import write_text
from bmojo_edge.torch import Model

PACKAGE = "model.mlpackage"
ALIGN = 32  # the Neural Engine takes states whose last dimension is a multiple of it
BLOCK = 32  # weights that share a scale
GROUP = 16  # channels that share a palette
HALF = ("linear", "softmax", "gather")  # in half precision; sums, norms, angles and recurrences are float32
# Weights, and the RMS error that a self-test allows, as a share of the logits' RMS.
WEIGHTS = {"float32": 2e-2, "float16": 2e-2, "int8": 0.1, "int4": 0.5, "palettized4": 0.5}
# Where coremltools' loops live, and how much of a conversion is done, in per cent, as each of its four ends.
LOOPS = {
    "coremltools.converters.mil.frontend.torch.ops": "_tqdm",
    "coremltools.converters.mil.mil.passes.pass_pipeline": "tqdm",
    "coremltools.optimize.coreml._quantization_passes": "tqdm",
}
ENDS = (20, 25, 90, 95)

Progress = Callable[[str, int, int], None]


def to_coreml(
    model: str | Path,
    out: str | Path,
    *,
    weights: str = "float16",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a model folder (or hub id) to a Core ML package for iOS 18 and macOS 15, and return the folder written.

    weights: "float16"; "int8" or "int4" in blocks of 32 with a scale each; "palettized4": 16 values for every 16
    channels; "float32": weights and arithmetic in float32, states in half precision still. overwrite: replace `out` if
    it is an export of ours. progress is called with (stage, done, total); stages are the functions and "package".
    The folder appears whole. Raises ExportError naming the layer or the option, ModuleNotFoundError without the extra
    `coreml`, OSError on a full disk.
    """
    if weights not in WEIGHTS:
        raise ExportError(f"weights: must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    _require_packages(weights)
    lm = open_exportable(model)
    empty = [name for name, leaf in state_leaves(lm.config).items() if 0 in leaf.shape]
    if empty:
        raise ExportError(f"{', '.join(empty)}: Core ML has no empty arrays, so no convolution of one tap (d_conv 1)")
    graphs: dict[str, Graph] = {"decode": Decode(lm), "prefill": Prefill(lm)}
    commit = Commit(lm)
    if commit.layers:
        graphs["commit"] = commit
    with exported_folder(Path(out), Target.coreml, overwrite) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as parts, _own_temporaries():
            for name, graph in graphs.items():
                with _told(progress, name):
                    _compressed(convert(graph, weights), weights).save(str(Path(parts) / f"{name}.mlpackage"))
            with _told(progress, "package"):
                _join(Path(parts), list(graphs), folder / PACKAGE)
        record(folder, lm)
        write_text(folder / "manifest.json", json.dumps(manifest(lm, graphs, weights), indent=1) + "\n")
    return Path(out)


@contextmanager
def _own_temporaries() -> Iterator[None]:
    """A folder of our own for coremltools' temporary files: when a disk is full it leaves some behind."""
    former, folder = tempfile.tempdir, tempfile.mkdtemp(prefix="bmojo-")
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(remove)  # the traceback of a failure holds files in it that want to be removed themselves
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = former
    remove()
    atexit.unregister(remove)


@contextmanager
def _told(progress: Progress | None, stage: str) -> Iterator[None]:
    """How far coremltools is in its loops goes to `progress` in per cent, not to bars and remarks of its own."""
    ends, at = iter(ENDS), 0

    def tell(done: int) -> None:
        if progress is not None:
            progress(stage, done, 100)

    def loop(items: Iterable[Any], *_: Any, **__: Any) -> Iterator[Any]:
        nonlocal at
        found, first, last = list(items), at, next(ends, 100)
        for n, item in enumerate(found):
            tell(first + (last - first) * n // len(found))
            yield item
        at = last

    modules = [(import_module(name), attribute) for name, attribute in LOOPS.items()]
    bars = [getattr(module, attribute) for module, attribute in modules]
    tell(0)
    try:
        for module, attribute in modules:
            setattr(module, attribute, loop)
        with _quiet():
            yield
    except RuntimeError as error:  # coremltools' writer knows no better
        if "FileWriter" not in str(error):
            raise
        raise OSError(f"a file could not be written; is the disk full? ({error})") from error
    finally:
        for (module, attribute), bar in zip(modules, bars, strict=True):
            setattr(module, attribute, bar)
    tell(100)


def _require_packages(weights: str) -> None:
    """Fail before minutes of work."""
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        raise ExportError(f"coremltools 9 does not work with numpy {np.__version__}: pip install 'numpy<2.4'")
    with _quiet():
        import_module("coremltools")
    if weights == "palettized4":
        import_module("sklearn")


@contextmanager
def _quiet() -> Iterator[None]:
    """coremltools without its remarks on versions, on what Linux lacks, on its casts and on what it leaves as it is;
    PyTorch's tracer without those on sizes, which are constants here."""
    loggers = [logging.getLogger(), logging.getLogger("coremltools")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- one function -----------------------------------------------------------------------------------------------------


def feature(name: str) -> str:
    """A leaf's name where dots are not allowed."""
    return name.replace(".", "_")


def padded(leaf: StateLeaf) -> tuple[int, ...]:
    """The shape of a leaf as a state, batch of 1 first."""
    *front, last = leaf.shape
    return (1, *front, last + -last % ALIGN)


class Stateful(nn.Module):
    """A graph whose leaves are states, but for the wide ones, which stay inputs and outputs.

    forward(*inputs, *wide leaves) -> (what the graph returns before its leaves, *wide leaves). Every function has all
    states, read or not: they have to be the same for functions to share them.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.step, self.leaves = graph, state_leaves(graph.config)
        self.wide = tuple(name for name in graph.names if self.leaves[name].wide)
        self.states = tuple(name for name, leaf in self.leaves.items() if not leaf.wide)
        self.changed = graph.changed if isinstance(graph, Commit) else graph.names
        for name in self.states:
            self.register_buffer(feature(name), torch.zeros(padded(self.leaves[name])))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arguments."""
        return (*self.step.inputs, *self.wide)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results."""
        if isinstance(self.step, Commit):
            return tuple(f"choice_{i}" for i in self.step.layers)
        return ("logits", *(f"new_{feature(name)}" for name in self.wide))

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, arguments, strict=True))
        for name in self.step.names:
            if name in self.states:
                given[name] = self._held(name)
        results = self.step(*(given[name] for name in (*self.step.inputs, *self.step.names)))
        first = len(results) - len(self.changed)
        new = dict(zip(self.changed, results[first:], strict=True))
        for name in self.states:
            buffer = self.get_buffer(feature(name))
            if name in new:
                missing = buffer.shape[-1] - self.leaves[name].shape[-1]
                buffer[:] = F.pad(new[name], (0, missing)) if missing else new[name]
            elif name not in self.step.names:  # a state that a function does not use cannot be converted
                buffer[:] = buffer + 0
        return (*results[:first], *(new[name] for name in self.wide))

    def _held(self, name: str) -> Tensor:
        """A state without its padding; by split, as the converter takes slices of a buffer for places to write to.

        It is never the buffer itself: the trace would mistake it for one of the graph's values and write nothing.
        """
        buffer, n = self.get_buffer(feature(name)), self.leaves[name].shape[-1]
        missing = buffer.shape[-1] - n
        return buffer.split([n, missing], dim=-1)[0] if missing else buffer * 1


def multiplies_states(config: Config) -> bool:
    """Whether products of matrices are part of a recurrence; elsewhere they are attention's alone."""
    ssms = (config.ssm_of(i) for i in range(len(config.layer_types)))
    return any(ssm is not None and ssm.kind != "mamba" for ssm in ssms)


def convert(graph: Graph, weights: str) -> Any:
    """A graph as a Core ML model of one function, its matrices in float16 or, if `weights` says so, float32."""
    ct: Any = import_module("coremltools")
    module = Stateful(graph).eval()
    examples = graph.examples(1)
    given = tuple(examples[name] for name in module.inputs)

    def described(name: str) -> Any:
        dtype = np.int32 if examples[name].dtype == torch.int32 else np.float32
        return ct.TensorType(name=feature(name), shape=tuple(examples[name].shape), dtype=dtype)

    def state(name: str) -> Any:
        shape = padded(module.leaves[name])
        return ct.StateType(name=feature(name), wrapped_type=ct.TensorType(shape=shape, dtype=np.float16))

    import_module("bmojo_convert.coreml_ops")
    halved = HALF if multiplies_states(graph.config) else (*HALF, "matmul")
    half = ct.transform.FP16ComputePrecision(op_selector=lambda op: op.op_type in halved)
    try:
        with torch.no_grad():
            model = ct.convert(
                torch.jit.trace(module, given, check_trace=False),
                inputs=[described(name) for name in module.inputs],
                outputs=[
                    ct.TensorType(name=name, dtype=np.int32 if name.startswith("choice") else np.float32)
                    for name in module.outputs
                ],
                states=[state(name) for name in module.states],
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32 if weights == "float32" else half,
                skip_model_load=True,
            )
    except NotImplementedError as error:
        raise ExportError(f"Core ML has no form for an operation of this model: {error}") from error
    _check_writes(model, module)
    return model


def _check_writes(model: Any, module: Stateful) -> None:
    """Raise ExportError where a state that has to change is not written: the converter drops writes without a word."""
    function = model.get_spec().mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    written = {op.inputs["input"].arguments[0].name for op in operations if op.type == "write_state"}
    lost = [name for name in module.states if name in module.changed and feature(name) not in written]
    if lost:
        raise ExportError(f"{', '.join(lost)}: coremltools lost the writes to these states; please report it")


def _compressed(model: Any, weights: str) -> Any:
    """The model with its matrices in fewer bits; those that blocks do not divide stay as they are."""
    from coremltools.optimize import coreml as shrink  # pyright: ignore[reportMissingImports]

    if weights in ("int8", "int4"):
        op: Any = shrink.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype=weights, granularity="per_block", block_size=BLOCK
        )
        change = shrink.linear_quantize_weights
    elif weights == "palettized4":
        op = shrink.OpPalettizerConfig(mode="kmeans", nbits=4, granularity="per_grouped_channel", group_size=GROUP)
        change = shrink.palettize_weights
    else:
        return model
    return change(model, shrink.OptimizationConfig(global_config=op))


def _join(parts: Path, functions: list[str], target: Path) -> None:
    """One package of several, weights that are equal stored once."""
    ct: Any = import_module("coremltools")
    whole = ct.utils.MultiFunctionDescriptor()
    for name in functions:
        whole.add_function(str(parts / f"{name}.mlpackage"), src_function_name="main", target_function_name=name)
    whole.default_function_name = "decode"
    ct.utils.save_multifunction(whole, str(target))


# --- the folder -------------------------------------------------------------------------------------------------------


def manifest(lm: Model, graphs: dict[str, Graph], weights: str) -> dict[str, Any]:
    """What a host needs to know besides the package (docs/export.md)."""
    config, turns = lm.config, turns_per_token(lm.config)
    base, period = position_cycle(config)
    functions = {}
    for name, graph in graphs.items():
        module = Stateful(graph)
        functions[name] = {"inputs": [feature(x) for x in module.inputs], "outputs": list(module.outputs)}
    return {
        "format": Target.coreml.value,
        "version": 1,
        "config": config.to_dict(),
        "weights": weights,
        "package": PACKAGE,
        "chunk": config.chunk_size,
        "position": {"base": base, "period": period},
        "turns": None if turns is None else [str(turn) for turn in turns],
        "functions": functions,
        "state": _states(config),
        "self_test": {"file": SELF_TEST, "bound": WEIGHTS[weights]},
        "made_with": {name: importlib.metadata.version(name) for name in ("torch", "coremltools")},
    }


def _states(config: Config) -> list[dict[str, Any]]:
    found = []
    for name, leaf in state_leaves(config).items():
        kind, dtype = ("input", "float32") if leaf.wide else ("state", "float16")
        shape = (1, *leaf.shape) if leaf.wide else padded(leaf)
        found.append({"name": feature(name), "kind": kind, "dtype": dtype, "shape": list(shape), "fill": leaf.fill})
    return found
