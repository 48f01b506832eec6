"""Arrays and dtypes between NumPy, MLX and the harness. Inside it a dtype is NumPy's name ("float32", "bfloat16").

MLX is imported only when an MLX array is at hand, so that the CUDA runner works without it.
"""

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

# The dtypes a kernel can take, and their names in Metal as MLX writes them.
METAL_TYPES = {
    "bool": "bool",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "float32": "float",
}


def is_mlx(x: object) -> bool:
    return type(x).__module__.startswith("mlx.")


def dtype_name(dtype: Any) -> str:
    """NumPy's name of a NumPy or MLX dtype. Raises `TypeError` for one that Metal kernels do not have."""
    name = str(dtype).removeprefix("mlx.core.") if is_mlx(dtype) else np.dtype(dtype).name
    name = {"bool_": "bool"}.get(name, name)
    if name not in METAL_TYPES:
        raise TypeError(f"a Metal kernel cannot take {name}; it can take {', '.join(METAL_TYPES)}")
    return name


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def to_numpy(x: Any) -> np.ndarray:
    """`x` as a NumPy array, sharing its memory and strides where it can; a Python scalar takes the dtype MLX gives it.

    Raises `RuntimeError` inside `mx.compile` and `mx.vmap`, where an array has no value yet.
    """
    if is_mlx(x):
        import mlx.core as mx

        try:
            mx.eval(x)
        except ValueError as error:
            raise RuntimeError(
                "the harness runs a kernel at once, so it cannot be called inside mx.compile, mx.vmap or "
                "mx.export_function, where an array has no value yet"
            ) from error
        if x.dtype == mx.bfloat16:
            return np.array(x.view(mx.uint16), copy=False).view(ml_dtypes.bfloat16)
        return np.array(x, copy=False)
    if isinstance(x, bool | int | float):
        return np.array(x, {bool: np.bool_, int: np.int32, float: np.float32}[type(x)])
    return np.asarray(x)


def to_mlx(x: np.ndarray) -> Any:
    import mlx.core as mx

    if x.dtype == ml_dtypes.bfloat16:
        return mx.array(x.view(np.uint16)).view(mx.bfloat16)
    return mx.array(x)


def memory_of(x: np.ndarray) -> tuple[bytes, int]:
    """The bytes that the elements of `x` span, whatever its strides, and where in them its first element is."""
    if x.size == 0:
        return b"", 0
    low, high = np.lib.array_utils.byte_bounds(x)
    return ctypes.string_at(low, high - low), x.ctypes.data - low
