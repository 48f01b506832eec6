"""The text that mx.fast.metal_kernel hands the Metal compiler: MLX writes the signature around the kernel's body.

A re-statement of MLX 0.32's rules (mlx/backend/common/metal_kernel.cpp); a test compares it, character by character,
with what MLX itself prints. What each parameter is, is kept beside the text for whoever calls the kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .arrays import METAL_TYPES

CONSTANT_BELOW = 8  # an input of fewer elements comes in the constant address space

# Thread attributes: MLX adds those whose name occurs in the body, in this order.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

Array = tuple[str, tuple[int, ...]]  # dtype name and shape
Template = Sequence[tuple[str, bool | int | str]]  # a str is a dtype name


@dataclass(frozen=True)
class Parameter:
    """One buffer of the signature: which array it comes from, and as what."""

    kind: Literal["input", "shape", "strides", "ndim", "output"]
    index: int
    metal_type: str
    by_reference: bool

    def name(self, array_names: Sequence[str]) -> str:
        suffix = "" if self.kind in ("input", "output") else f"_{self.kind}"
        return array_names[self.index] + suffix


@dataclass(frozen=True)
class GeneratedKernel:
    """A kernel's full text, with what is needed to call it."""

    text: str
    function: str
    template_arguments: str  # "" or "<float, 64>"
    parameters: tuple[Parameter, ...]
    attributes: tuple[str, ...]


def generate(
    name: str,
    header: str,
    source: str,
    input_names: Sequence[str],
    inputs: Sequence[Array],
    output_names: Sequence[str],
    output_dtypes: Sequence[str],
    template: Template = (),
    atomic_outputs: bool = False,
) -> GeneratedKernel:
    """The text of kernel `name` for inputs of these dtypes and shapes."""
    arguments = [str(int(v)) if isinstance(v, int) else METAL_TYPES[v] for _, v in template]
    template_arguments = f"<{', '.join(arguments)}>" if template else ""
    function = _function_name(name, arguments, inputs, output_dtypes)
    parameters, declarations = _parameters(source, input_names, inputs, output_names, output_dtypes, atomic_outputs)
    attributes = tuple(attribute for attribute in ATTRIBUTES if attribute in source)

    text = header
    if template:
        text += f"template <{', '.join(f'{_template_kind(v)} {n}' for n, v in template)}>\n"
    text += f"[[kernel]] void {function}(\n"
    for index, declaration in enumerate(declarations):
        is_output = parameters[index].kind == "output"
        # MLX ends the list by counting arrays, not parameters. That is its own business: we want its text.
        more = not is_output or index < len(inputs) + len(output_names) - 1 or attributes
        text += declaration + (",\n" if more else ") {\n")
    lines = [f"  {ATTRIBUTES[attribute]} {attribute} [[{attribute}]]" for attribute in attributes]
    if lines:
        text += ",\n".join(lines) + ") {\n"
    text += source + "\n}\n"
    if template:
        instance = function + template_arguments
        text += f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({instance}) {instance};\n'
    return GeneratedKernel(text, function, template_arguments, tuple(parameters), attributes)


def _template_kind(value: bool | int | str) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "typename"


def _function_name(name: str, arguments: Sequence[str], inputs: Sequence[Array], output_dtypes: Sequence[str]) -> str:
    parts = ["custom_kernel", name]
    if arguments:
        parts.append("_" + "_".join(arguments))
    for dtype, shape in inputs:
        mark = "s" if not shape else "c" if math.prod(shape) < CONSTANT_BELOW else ""
        parts.append(METAL_TYPES[dtype] + mark)
    parts.extend(METAL_TYPES[dtype] for dtype in output_dtypes)
    return "_".join(parts)


def _parameters(
    source: str,
    input_names: Sequence[str],
    inputs: Sequence[Array],
    output_names: Sequence[str],
    output_dtypes: Sequence[str],
    atomic_outputs: bool,
) -> tuple[list[Parameter], list[str]]:
    parameters: list[Parameter] = []
    declarations: list[str] = []

    def add(parameter: Parameter, qualifiers: str, name: str) -> None:
        mark = "&" if parameter.by_reference else "*"
        declarations.append(f"  {qualifiers} {parameter.metal_type}{mark} {name} [[buffer({len(parameters)})]]")
        parameters.append(parameter)

    for index, (name, (dtype, shape)) in enumerate(zip(input_names, inputs, strict=True)):
        space = "constant" if math.prod(shape) < CONSTANT_BELOW else "device"
        add(Parameter("input", index, METAL_TYPES[dtype], not shape), f"const {space}", name)
        if not shape:
            continue
        if f"{name}_shape" in source:
            add(Parameter("shape", index, "int", False), "const constant", f"{name}_shape")
        if f"{name}_strides" in source:
            add(Parameter("strides", index, "int64_t", False), "const constant", f"{name}_strides")
        if f"{name}_ndim" in source:
            add(Parameter("ndim", index, "int", True), "const constant", f"{name}_ndim")
    for index, (name, dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
        metal_type = METAL_TYPES[dtype]
        add(
            Parameter("output", index, f"atomic<{metal_type}>" if atomic_outputs else metal_type, False), "device", name
        )
    return parameters, declarations
