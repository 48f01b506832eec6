"""The type check: the kernel as C++14 in which device, constant and threadgroup are real address spaces.

Nothing is run. It knows Metal's types and signatures (include/msl/typecheck.h), not Apple's overload sets: a call that
is ambiguous there may pass here, and a deduction that works there may fail here.
"""

import re

from .errors import CompileError, TypeCheckError
from .rewrite import rewrite
from .toolchain import compile_with, include_flags, mlx_headers

# What Apple's compiler refuses. It takes C++17 with a warning; MLX's utils.h does so, but our kernels may not.
_ERRORS = ["return-type", "infinite-recursion", "vla", "vla-extension", "vla-cxx-extension"]
_FLAGS = [
    "-std=c++14",
    "-fsyntax-only",
    "-fno-exceptions",
    "-fno-rtti",
    "-ferror-limit=20",
    "-Wno-everything",
    *(f"-Werror={warning}" for warning in _ERRORS),
]
_VECTOR_CONSTRUCTION = re.compile(r"\b((?:metal::)?vec\s*<[^<>;(){}]*>)\s*\(")
_ARRAY_PARAMETER = re.compile(r"strides\[\d\]\)")


def typecheck(kernel: str, text: str) -> None:
    """Checks the full text of a kernel as `signature.generate` gives it. Raises `TypeCheckError`."""
    kernel_text = _VECTOR_CONSTRUCTION.sub(r"msl_construct<\1>::from(", rewrite(text))
    source = "\n".join(
        [
            '#include "msl/typecheck.h"',
            _mlx_utilities(),
            '#pragma clang diagnostic error "-Wc++17-extensions"',
            '#line 1 "kernel.metal"',
            kernel_text,
        ]
    )
    try:
        compile_with(["-x", "c++", *_FLAGS, *include_flags(), "-"], stdin=source)
    except CompileError as error:
        raise TypeCheckError(f"{kernel}: type check\n{error}") from None


def _mlx_utilities() -> str:
    """MLX's utils.h, without the one thing clang cannot say: an array parameter in an address space."""
    headers = mlx_headers()
    if headers is None:
        return ""
    text = (headers / "mlx/backend/metal/kernels/utils.h").read_text()
    return _ARRAY_PARAMETER.sub("*strides)", text.replace("#pragma once", ""))
