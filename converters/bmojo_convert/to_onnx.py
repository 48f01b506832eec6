"""`to_onnx`: a model folder into ONNX graphs with constant-size state, one file of weights and a manifest.

The graphs are those of step.py: `decode` moves one token, `prefill` a chunk, `commit` is called where a chunk begins.
bmojo_edge/onnx_runner.py runs them; docs/export.md describes the folder for other runtimes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Container, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bmojo_convert.export_folder import ExportError, Target, exported_folder
from bmojo_convert.exporting import open_exportable, record
from bmojo_convert.onnx_layers import OPSET, whole
from bmojo_convert.step import Commit, Decode, Graph, Prefill, position_cycle, state_leaves
from bmojo_edge.engine import weights_fingerprint
from bmojo_edge.rope import turns_per_token
from bmojo_edge.tensors import write_text
from bmojo_edge.torch import Model

if TYPE_CHECKING:
    from onnx import ModelProto

IR_VERSION = 10
INLINE_BYTES = 1024  # smaller constants stay in the graph
ALIGNMENT = 4096  # of tensors in the file of weights, so that runtimes may map it
BLOCK = 32  # weights that share a scale
TOLERANCE = 1e-4  # RMS ratio of float32 graphs to the model
WEIGHTS = {"float32": 32, "int8": 8, "int4": 4}  # bits
FILE = "weights.bin"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Progress = Callable[[str, int, int], None]


def to_onnx(
    model: str | Path,
    out: str | Path,
    *,
    weights: str = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export a model folder (or hub id) to ONNX and return the folder written.

    weights: "float32"; "int8" or "int4": matrices in blocks of 32 with a scale each, the embedding as int8.
    overwrite: replace `out` if it is an export of ours. progress is called with (stage, done, total); the stages are
    "decode", "prefill", "commit" and "check". The folder appears whole, and only if its graphs give the model's logits.
    Raises ExportError naming the layer or the option, ModuleNotFoundError without the extra `onnx`, OSError on a full
    disk.
    """
    if weights not in WEIGHTS:
        raise ExportError(f"weights: must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    for package in PACKAGES:  # before minutes of work
        import_module(package)
    lm = open_exportable(model)
    graphs: dict[str, Graph] = {"decode": Decode(lm, scatters=True), "prefill": Prefill(lm, scatters=True)}
    commit = Commit(lm)
    if commit.layers:
        graphs["commit"] = commit
    described: dict[str, Any] = {}
    with exported_folder(Path(out), Target.onnx, overwrite) as folder:
        with WeightsFile(folder / FILE) as file:
            for name, graph in graphs.items():
                _tell(progress, name, 0)
                proto = export_graph(graph)
                if weights == "float32":
                    products_of_weights(proto, keep=_tables(proto))
                elif name != "commit":
                    proto = quantized(proto, WEIGHTS[weights])
                file.take(proto)
                (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
                described[name] = {"file": f"{name}.onnx", **description(proto)}
                _tell(progress, name, 1)
        _tell(progress, "check", 0)
        record(folder, lm)
        write_text(folder / "manifest.json", json.dumps(manifest(lm, described, weights), indent=1) + "\n")
        _check(folder, weights)
        _tell(progress, "check", 1)
    return Path(out)


def _tell(progress: Progress | None, stage: str, done: int) -> None:
    if progress is not None:
        progress(stage, done, 1)


# --- one graph --------------------------------------------------------------------------------------------------------


def export_graph(graph: Graph) -> ModelProto:
    """A graph as ONNX, its batch dynamic, its weights in memory."""
    import onnx

    proto = whole(graph)
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    onnx.checker.check_model(_without_weights(proto), full_check=True)
    return proto


def _without_weights(proto: ModelProto) -> ModelProto:
    """The graph for the checker, which cannot take 2 GB: large weights become inputs."""
    from onnx import helper

    graph = proto.graph
    large = [x for x in graph.initializer if len(x.raw_data) >= INLINE_BYTES]
    kept = [x for x in graph.initializer if len(x.raw_data) < INLINE_BYTES]
    given = [helper.make_tensor_value_info(x.name, x.data_type, list(x.dims)) for x in large]
    light = helper.make_graph(graph.node, graph.name, [*graph.input, *given], graph.output, kept)
    return helper.make_model(light, opset_imports=proto.opset_import, ir_version=proto.ir_version)


def _tables(proto: ModelProto) -> set[str]:
    """Weights that rows are looked up in: stored once, also where they are the head as well."""
    return {node.input[0] for node in proto.graph.node if node.op_type == "Gather"}


def quantized(proto: ModelProto, bits: int) -> ModelProto:
    """The graph with its matrices in blocks of 32 (MatMulNBits); tables that rows are looked up in become int8."""
    nbits, quant_format = _quantizer()
    products_of_weights(proto, keep=())
    _quantize_tables(proto)
    settings = nbits.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=4, quant_format=quant_format, bits=bits
    )
    quantizer = nbits.MatMulNBitsQuantizer(proto, algo_config=settings)
    quantizer.process()
    return quantizer.model.model


def _quantizer() -> tuple[Any, Any]:
    """onnxruntime's quantiser; importing it gives the root logger a handler and a level, which are taken back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer
    from onnxruntime.quantization.quant_utils import QuantFormat

    root.handlers, root.level = handlers, level
    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)
    return matmul_nbits_quantizer, QuantFormat.QOperator


def _quantize_tables(proto: ModelProto) -> None:
    """Rows looked up in a float table are looked up in an int8 one, in blocks of BLOCK values with a scale each.

    In standard operators, at 8 bits whatever the matrices have: rows are read, not multiplied, so speed gains nothing
    from fewer, and what is lost here is lost for every layer. A width that BLOCK does not divide is one block.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    weights, nodes, made = {x.name: x for x in graph.initializer}, [], {}
    for node in graph.node:
        name = node.input[0] if node.input else ""
        if node.op_type != "Gather" or name not in weights or weights[name].data_type != TensorProto.FLOAT:
            nodes.append(node)
            continue
        if name not in made:
            table = numpy_helper.to_array(weights[name])
            rows, width = table.shape
            blocks = table.reshape(rows, -1, BLOCK if width % BLOCK == 0 else width)
            scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), 1e-30).astype(np.float32) / 127
            made[f"{name}.scale"] = numpy_helper.from_array(scale, f"{name}.scale")
            made[name] = numpy_helper.from_array(np.rint(blocks / scale).astype(np.int8), f"{name}.int8")
            made[f"{name}.width"] = numpy_helper.from_array(np.array([width]), f"{name}.width")
        y, index = node.output[0], node.input[1]
        nodes += [
            helper.make_node("Gather", [f"{name}.int8", index], [f"{y}.int8"], f"{node.name}.rows"),
            helper.make_node("Gather", [f"{name}.scale", index], [f"{y}.scale"], f"{node.name}.scales"),
            helper.make_node("Cast", [f"{y}.int8"], [f"{y}.float"], f"{node.name}.cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{y}.float", f"{y}.scale"], [f"{y}.blocks"], f"{node.name}.scaled"),
            helper.make_node("Shape", [index], [f"{y}.count"], f"{node.name}.count"),
            helper.make_node("Concat", [f"{y}.count", f"{name}.width"], [f"{y}.shape"], f"{node.name}.shape", axis=0),
            helper.make_node("Reshape", [f"{y}.blocks", f"{y}.shape"], [y], node.name),
        ]
    _replace(graph, nodes, made.values())


def _replace(graph: Any, nodes: list[Any], made: Iterable[Any]) -> None:
    """Give a graph other nodes and further constants; constants that nobody reads go."""
    used = {name for node in nodes for name in node.input}
    constants = [x for x in (*graph.initializer, *made) if x.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def products_of_weights(proto: ModelProto, keep: Container[str]) -> None:
    """Make every linear layer a MatMul with its weight stored (in, out), but for the weights in `keep`.

    The exporter writes a Gemm for rows of vectors and a MatMul for blocks of them: made alike, graphs share weights,
    and the quantiser, which knows MatMul alone, sees them all.
    """
    from onnx import helper, numpy_helper

    graph = proto.graph
    weights, transposed, nodes = {x.name: x for x in graph.initializer}, {}, []
    for node in graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Gemm" or name not in weights or name in keep or not attributes.get("transB"):
            nodes.append(node)
            continue
        if name not in transposed:
            value = np.ascontiguousarray(numpy_helper.to_array(weights[name]).T)
            transposed[name] = numpy_helper.from_array(value, f"{name}.transposed")
        x, y = node.input[0], node.output[0]
        product = f"{y}.product" if len(node.input) > 2 else y
        nodes.append(helper.make_node("MatMul", [x, transposed[name].name], [product], node.name))
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [y], f"{node.name}.bias"))
    _replace(graph, nodes, transposed.values())


# --- files ------------------------------------------------------------------------------------------------------------


class WeightsFile:
    """The file that holds the large tensors of all graphs, each content once, written as graphs come."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0
        self._places: dict[bytes, int] = {}

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def take(self, proto: ModelProto) -> None:
        """Move a graph's large tensors here and leave references."""
        from onnx import TensorProto

        for tensor in proto.graph.initializer:
            if len(tensor.raw_data) < INLINE_BYTES:
                continue
            data = tensor.raw_data
            where, size = self._place(data), len(data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in (("location", self.path.name), ("offset", where), ("length", size)):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)

    def _place(self, data: bytes) -> int:
        found = hashlib.sha256(data).digest()
        if found not in self._places:
            self._file.write(bytes(-self._at % ALIGNMENT))
            self._at += -self._at % ALIGNMENT
            self._places[found] = self._at
            self._file.write(data)
            self._at += len(data)
        return self._places[found]


def description(proto: ModelProto) -> dict[str, list[str]]:
    """A graph's inputs and outputs by name, and the leaves of the state that may be written where they are.

    Those are read by one scatter alone, which makes their new value: whatever order nodes run in, a buffer bound as
    both holds the right thing.
    """
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    inputs, outputs = [x.name for x in proto.graph.input], [x.name for x in proto.graph.output]
    in_place = []
    for name in inputs:
        found = readers.get(name, [])
        if len(found) == 1 and found[0].op_type == "ScatterElements" and found[0].output[0] == f"new.{name}":
            in_place.append(name)
    return {"inputs": inputs, "outputs": outputs, "in_place": in_place}


def manifest(lm: Model, graphs: dict[str, Any], weights: str) -> dict[str, Any]:
    """What a runner needs to know besides the graphs (docs/export.md)."""
    config, quantize = lm.config, None if weights == "float32" else weights
    turns = turns_per_token(config)
    base, period = position_cycle(config)
    state = [
        {"name": name, "shape": list(leaf.shape), "dtype": "float32", "fill": leaf.fill}
        for name, leaf in state_leaves(config).items()
    ]
    return {
        "format": Target.onnx.value,
        "version": 1,
        "config": config.to_dict(),
        "weights": weights_fingerprint(lm) + (f"-{quantize}" if quantize else ""),
        "quantize": quantize,
        "block": BLOCK if quantize else None,
        "opset": OPSET,
        "chunk": config.chunk_size,
        "position": {"base": base, "period": period},
        "turns": None if turns is None else [str(turn) for turn in turns],
        "graphs": graphs,
        "state": state,
        "made_with": {name: importlib.metadata.version(name) for name in ("torch", *PACKAGES)},
    }


def _check(folder: Path, weights: str) -> None:
    """Run what was written: float32 graphs must give the model's logits, quantised ones finite logits."""
    from bmojo_edge.onnx_runner import OnnxModel, self_test

    found = self_test(OnnxModel.load(folder))
    if weights == "float32" and not found.error < TOLERANCE:
        raise ExportError(f"{folder.name}: the graphs give other logits than the model, RMS ratio {found.error:.1e}")
    if not np.isfinite(found.error):
        raise ExportError(f"{folder.name}: the quantised graphs give logits that are no numbers")
