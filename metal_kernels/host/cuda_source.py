"""CUDA text of a Metal kernel: the harness's headers, the same body, and an entry that a launcher can call.

Metal's dispatchThreads makes smaller threadgroups at the grid's edge; CUDA has blocks of one size. So the entry takes
where its blocks begin, and a launcher (cupy_runner.py) covers the grid with up to eight launches.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .compile import ATTRIBUTE_VALUES
from .rewrite import rewrite
from .signature import GeneratedKernel
from .tokens import Token, tokenize

OPTIONS = ["-std=c++17", "--device-as-default-execution-space", "--fmad=false", "-lineinfo"]

# CUDA has global functions of these names, so a call of Metal's by its bare name would be ambiguous.
_SHARED_NAMES = """
    abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh exp exp10 exp2 fabs fdim floor fma fmax fmin fmod
    isfinite isinf isnan log log10 log2 max min pow powr rint round rsqrt saturate signbit sin sinh sqrt tan tanh trunc
"""
_SHARED = frozenset(_SHARED_NAMES.split())
_ADDRESS_SPACES = {"device": "", "thread": "", "threadgroup": "", "constant": "const"}

_ENTRY = """
#define MSL_UINT3(v) uint3((v)[0], (v)[1], (v)[2])
#define MSL_COUNT(v) ((v)[0] * (v)[1] * (v)[2])
extern "C" __global__ void msl_entry({parameters}uint first_x, uint first_y, uint first_z, uint grid_x, uint grid_y,
                                     uint grid_z, uint threadgroup_x, uint threadgroup_y, uint threadgroup_z) {{
  const uint first[3] = {{first_x, first_y, first_z}}, grid[3] = {{grid_x, grid_y, grid_z}};
  const uint threadgroup[3] = {{threadgroup_x, threadgroup_y, threadgroup_z}};
  const uint block[3] = {{blockIdx.x, blockIdx.y, blockIdx.z}}, size[3] = {{blockDim.x, blockDim.y, blockDim.z}};
  const uint thread[3] = {{threadIdx.x, threadIdx.y, threadIdx.z}};
  msl_thread id;
  for (int k = 0; k < 3; k++) {{
    id.position_in_threadgroup[k] = thread[k];
    id.threadgroup_position[k] = first[k] + block[k];
    id.position_in_grid[k] = id.threadgroup_position[k] * threadgroup[k] + thread[k];
    id.threadgroups_per_grid[k] = (grid[k] + threadgroup[k] - 1) / threadgroup[k];
    id.threads_per_grid[k] = grid[k];
    id.threads_per_threadgroup[k] = size[k];
    id.dispatch_threads_per_threadgroup[k] = threadgroup[k];
  }}
  id.index_in_threadgroup = metal::msl_index_in_block();
  id.lane = metal::msl_lane();
  id.simdgroup = id.index_in_threadgroup / 32;
  id.simdgroups_per_threadgroup = (MSL_COUNT(size) + 31) / 32;
  const msl_thread* thread_id = &id;
  (void)thread_id;
  {call};
}}
"""


def cuda_source(kernel: GeneratedKernel) -> str:
    """The text for NVRTC, with OPTIONS and the include directory. MLX's utils.h is not in it: no elem_to_loc."""
    parameters, arguments = "", []
    for index, parameter in enumerate(kernel.parameters):
        const = "" if parameter.kind == "output" else "const "
        parameters += f"{const}{parameter.metal_type}* a{index}, "
        arguments.append(f"*a{index}" if parameter.by_reference else f"a{index}")
    arguments += [ATTRIBUTE_VALUES[attribute] for attribute in kernel.attributes]
    call = f"{kernel.function}{kernel.template_arguments}({', '.join(arguments)})"
    text = "".join(_without_metal_words(tokenize(rewrite(kernel.text))))
    entry = _ENTRY.format(parameters=parameters, call=call)
    return f'#include "msl/cuda.h"\n#line 1 "kernel.metal"\n{text}\n{entry}'


def _without_metal_words(tokens: list[Token]) -> Iterator[str]:
    """Drops address spaces and attributes, and writes metal:: before functions that CUDA has too."""
    previous = ""
    in_attribute = False
    for token, following in itertools.zip_longest(tokens, tokens[1:]):
        text = token.text
        if token.text == "[[":
            in_attribute = True
        if in_attribute:
            text = "\n" * text.count("\n")
        elif token.kind == "name" and text in _ADDRESS_SPACES:
            text = _ADDRESS_SPACES[text]
        elif text in _SHARED and previous not in ("::", ".", "->") and following and following.text == "(":
            text = f"metal::{text}"
        if token.text == "]]":
            in_attribute = False
        if token.is_code:
            previous = token.text
        yield text


@dataclass(frozen=True)
class Launch:
    """Blocks of one size: the threadgroup that the first one is, how many, and how large; each in x, y, z."""

    first: tuple[int, int, int]
    blocks: tuple[int, int, int]
    size: tuple[int, int, int]


def launches(grid: tuple[int, int, int], threadgroup: tuple[int, int, int]) -> Iterator[Launch]:
    """The launches that together are Metal's grid: one inside, and those of smaller threadgroups at the edges."""
    pieces = []
    for extent, wanted in zip(grid, threadgroup, strict=True):
        size = min(extent, wanted)
        full, rest = divmod(extent, size)
        pieces.append([(0, full, size)] + ([(full, 1, rest)] if rest else []))
    for x, y, z in itertools.product(*pieces):
        first, blocks, size = zip(x, y, z, strict=True)
        yield Launch(first, blocks, size)
