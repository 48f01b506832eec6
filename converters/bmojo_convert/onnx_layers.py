"""A step of step.py as one ONNX graph: a layer of each kind is traced, and its copies for the others are joined to it.

The exporter takes seconds a layer, so a model of 30 equal layers is traced as one. Weights come from the model by
name, and nothing is folded before each layer has its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bmojo_convert.step import Commit, Decode, Graph, State

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 21  # has everything that is needed; newer ones are in fewer runtimes


class _Part(nn.Module):
    """A piece of a graph: forward(*inputs) -> outputs, both by name. The graph is no submodule: it has other layers."""

    inputs: list[str]
    outputs: list[str]

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = (graph,)

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        return self.compute(self._graph[0], dict(zip(self.inputs, arguments, strict=True)))

    def compute(self, graph: Any, given: State) -> tuple[Tensor, ...]:
        raise NotImplementedError


class _Ends(_Part):
    """Tokens (b, T) to vectors (b, T, d), and the last hidden (b, T, d) to logits (b, v)."""

    def __init__(self, graph: Decode) -> None:
        super().__init__(graph)
        self.inputs, self.outputs = ["tokens", "hidden"], ["new.hidden", "logits"]
        self.embed, self.norm, self.lm_head = graph.model.embed, graph.model.norm, graph.model.lm_head

    def compute(self, graph: Decode, given: State) -> tuple[Tensor, ...]:
        return graph.model.embed(given["tokens"]), graph.logits(given["hidden"])


class _Layer(_Part):
    """Layer i: hidden (b, T, d) and its leaves anew."""

    def __init__(self, graph: Decode, i: int) -> None:
        super().__init__(graph)
        self.i, self.block, self.names = i, graph.model.blocks()[i], _leaves_of(graph, i)
        self.inputs = [*(name for name in graph.inputs if name != "tokens"), "hidden", *self.names]
        self.outputs = ["new.hidden", *(f"new.{name}" for name in self.names)]

    def compute(self, graph: Decode, given: State) -> tuple[Tensor, ...]:
        state = {name: given[name] for name in self.names}
        h = graph.layer(self.i, given["hidden"], state, graph.plan(given))
        return (h, *(state[name] for name in self.names))


class _Choice(_Part):
    """Layer i's eidetic choice (b, e) and slots anew."""

    def __init__(self, graph: Commit, i: int) -> None:
        super().__init__(graph)
        self.i, self.names = i, _leaves_of(graph, i)
        self.changed = [name for name in self.names if name in graph.changed]
        self.inputs = [*graph.inputs, *self.names]
        self.outputs = [f"choice.{i}", *(f"new.{name}" for name in self.changed)]

    def compute(self, graph: Commit, given: State) -> tuple[Tensor, ...]:
        state = {name: given[name] for name in self.names}
        choice = graph.choose(self.i, state, graph.plan(given))
        return (choice, *(state[name] for name in self.changed))


def _leaves_of(graph: Graph, i: int) -> list[str]:
    return [name for name in graph.names if name.startswith(f"layers.{i}.")]


def outputs_of(graph: Graph) -> list[str]:
    """Names of a graph's outputs, in order; leaves that it only reads are none."""
    if isinstance(graph, Commit):
        return [*(f"choice.{i}" for i in graph.layers), *(f"new.{name}" for name in graph.changed)]
    return ["logits", *(f"new.{name}" for name in graph.names if ".eidetic." not in name)]


def whole(graph: Graph) -> ModelProto:
    """A graph as ONNX, its batch dynamic, its weights in memory."""
    joined, traced = _Joined(), {}
    layers = graph.layers if isinstance(graph, Commit) else range(len(graph.config.layer_types))
    for i in layers:
        kind = _kind(graph, i)
        if kind not in traced:
            traced[kind] = i, _trace(_Choice(graph, i) if isinstance(graph, Commit) else _Layer(_decode(graph), i))
        first, part = traced[kind]
        names = {name: name.replace(f"layers.{first}.", f"layers.{i}.") for name in (*part.inputs, *part.outputs)}
        names |= {"hidden": f"hidden.{i}", "new.hidden": f"hidden.{i + 1}", f"choice.{first}": f"choice.{i}"}
        joined.add(part, f"layers.{i}", names, ("block.", f"layers.{i}."))
    if isinstance(graph, Decode):
        part = _trace(_Ends(graph))
        names = {"hidden": f"hidden.{len(layers)}", "new.hidden": "hidden.0", "tokens": "tokens", "logits": "logits"}
        joined.add(part, "ends", names, ("", ""))
    return joined.model(graph)


def _decode(graph: Graph) -> Decode:
    assert isinstance(graph, Decode)
    return graph


def _kind(graph: Graph, i: int) -> Any:
    """What layers have in common that are traced once: everything but the values of their weights."""
    config = graph.config
    shapes = tuple((name, tuple(x.shape)) for name, x in graph.model.blocks()[i].state_dict().items())
    return config.layer_types[i], config.attention_window_of(i), config.fading_of(i), shapes


class _Traced(NamedTuple):
    """A part as ONNX, without its weights."""

    inputs: list[str]
    outputs: list[str]
    nodes: list[Any]
    constants: list[Any]
    weights: set[str]


def _trace(part: _Part) -> _Traced:
    from onnx_ir.passes.common import InlinePass
    from onnx_ir.serde import serialize_model
    from onnxscript.optimizer import fold_constants_ir

    graph = part._graph[0]
    examples = graph.examples(batch=2)
    examples["hidden"] = torch.zeros(2, graph.size, graph.config.d_model)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with _quietly():
        program = torch.onnx.export(
            part.eval(),
            tuple(examples[name] for name in part.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=part.inputs,
            output_names=part.outputs,
            dynamic_shapes=(tuple({0: batch} for _ in part.inputs),),
            external_data=False,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    InlinePass()(model)
    weights = set(part.state_dict()) & set(model.graph.initializers)
    for name in weights:
        model.graph.initializers.pop(name).const_value = None  # else they would be folded
    fold_constants_ir(model)
    # A value that is input and output has the output's name; such leaves are only read, and are no outputs.
    inputs = [value.name or "" for value in model.graph.inputs]
    outputs = [name for name in part.outputs if name not in inputs]
    proto = serialize_model(model).graph
    names = dict(zip(inputs, part.inputs, strict=True))
    for node in proto.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return _Traced(part.inputs, outputs, list(proto.node), list(proto.initializer), weights)


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter warns of packages that nobody asked for, and of its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Joined:
    """Parts put together: values by name, each part's own under a prefix."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.weights: set[str] = set()

    def add(self, part: _Traced, prefix: str, names: dict[str, str], weights: tuple[str, str]) -> None:
        """Add a copy of a part; `names` are those of its inputs and outputs here, `weights` the old and new beginning
        of its weights' names."""
        old, new = weights
        known = {"": "", **names} | {name: new + name.removeprefix(old) for name in part.weights}

        def named(name: str) -> str:
            return known.get(name, f"{prefix}.{name}")

        for node in part.nodes:
            copy = type(node)()
            copy.CopyFrom(node)
            copy.name = f"{prefix}.{node.name}"
            copy.input[:], copy.output[:] = [named(x) for x in node.input], [named(x) for x in node.output]
            copy.ClearField("metadata_props")  # where in which Python file it came from
            copy.ClearField("doc_string")
            self.nodes.append(copy)
        for constant in part.constants:
            copy = type(constant)()
            copy.CopyFrom(constant)
            copy.name = named(constant.name)
            self.constants.append(copy)
        self.weights |= {known[name] for name in part.weights}

    def model(self, graph: Graph) -> ModelProto:
        """The parts as one graph, simplified."""
        from onnx import TensorProto, helper

        config, examples = graph.config, graph.examples()
        inputs = [_described(name, examples[name]) for name in (*graph.inputs, *graph.names)]
        said = {"logits": torch.zeros(1, config.vocab_size)}
        said |= {
            name: torch.zeros(1, config.n_eidetic, dtype=torch.int32) for name in outputs_of(graph) if "choice" in name
        }
        outputs = [_described(x, said[x] if x in said else examples[x.removeprefix("new.")]) for x in outputs_of(graph)]
        weights = {name: x for name, x in graph.model.state_dict().items() if name in self.weights}
        given = inputs + [helper.make_tensor_value_info(x, TensorProto.FLOAT, weights[x].shape) for x in weights]
        made = helper.make_graph(self.nodes, type(graph).__name__.lower(), given, outputs, self.constants)
        proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)])
        return _simplified(proto, weights)


def _described(name: str, example: Tensor) -> Any:
    """An input or output of the shape of an example, its batch dynamic."""
    from onnx import TensorProto, helper

    kind = TensorProto.INT32 if example.dtype == torch.int32 else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, ["batch", *example.shape[1:]])


def _simplified(proto: ModelProto, weights: dict[str, Tensor]) -> ModelProto:
    """The model with its weights, which are its last inputs, cleaned up.

    As the exporter would, but for its rewriting rules: they take minutes and find nothing here.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir

    model = ir.serde.deserialize_model(proto)
    common.TopologicalSortPass()(model)
    for _ in weights:
        value = model.graph.inputs.pop()
        value.const_value = ir.tensor(weights[value.name or ""].numpy(), name=value.name)
        model.graph.register_initializer(value)
    fold_constants_ir(model)
    for clean in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),
    ):
        clean(model)
    simplified = ir.serde.serialize_model(model)
    del simplified.graph.value_info[:]
    return simplified
