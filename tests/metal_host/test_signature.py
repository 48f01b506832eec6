"""The text the harness runs is the text MLX would hand Apple's compiler, character by character."""

import ctypes
import os
import random
import sys
import tempfile
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX writes the signatures to compare with")

from metal_kernels.host.arrays import METAL_TYPES, dtype_name  # noqa: E402
from metal_kernels.host.install import mlx_metal_kernel  # noqa: E402
from metal_kernels.host.signature import ATTRIBUTES, generate  # noqa: E402

DTYPES = list(METAL_TYPES)


def dtype(name: str) -> Any:
    return getattr(mx, "bool_" if name == "bool" else name)


def printed_by_mlx(kernel: dict[str, Any], call: dict[str, Any], arrays: list[Any]) -> str:
    """What MLX prints with verbose=True; tracing for an export is how it generates the text without a Metal device."""
    run = mlx_metal_kernel(**kernel)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(output.fileno(), 1)
        try:
            mx.export_function(
                f"{folder}/kernel.mlxfn", lambda *a: run(inputs=list(a), verbose=True, stream=mx.gpu, **call), *arrays
            )
            ctypes.CDLL(None).fflush(None)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        output.seek(0)
        return output.read().decode().split("```\n", 1)[1].rsplit("\n```", 1)[0]


@pytest.mark.parametrize("seed", range(60))
def test_generated_text_is_mlx_s(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"in{i}" for i in range(rng.randint(0, 4))]
    outputs = [f"out{i}" for i in range(rng.randint(1, 3))]
    shapes = [tuple(rng.randint(1, 4) for _ in range(rng.randint(0, 3))) for _ in names]
    dtypes = [rng.choice(DTYPES) for _ in names]
    output_dtypes = [rng.choice(DTYPES) for _ in outputs]
    values = [rng.choice([rng.randint(0, 9), True, False, *DTYPES]) for _ in range(rng.randint(0, 3))]
    template = [(f"P{i}", value) for i, value in enumerate(values)]
    mentioned = [f"{name}_{what}" for name in names for what in ("shape", "strides", "ndim") if rng.random() < 0.3]
    mentioned += [attribute for attribute in ATTRIBUTES if rng.random() < 0.2]
    source = "uint i = thread_position_in_grid.x;\n// " + " ".join(mentioned) if rng.random() < 0.8 else "int nothing;"
    header = rng.choice(["", "// a header\n"])
    atomic = rng.random() < 0.3

    expected = printed_by_mlx(
        {
            "name": "kernel",
            "input_names": names,
            "output_names": outputs,
            "source": source,
            "header": header,
            "atomic_outputs": atomic,
        },
        {
            "template": [(name, dtype(v) if isinstance(v, str) else v) for name, v in template],
            "grid": (32, 1, 1),
            "threadgroup": (32, 1, 1),
            "output_shapes": [(4,)] * len(outputs),
            "output_dtypes": [dtype(name) for name in output_dtypes],
        },
        [mx.zeros(shape, dtype(name)) for shape, name in zip(shapes, dtypes, strict=True)],
    )
    arrays = list(zip(dtypes, shapes, strict=True))
    kernel = generate("kernel", header, source, names, arrays, outputs, output_dtypes, template, atomic)
    assert kernel.text == expected


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_names(name: str) -> None:
    assert dtype_name(dtype(name)) == name


@pytest.mark.parametrize("other", ["float64", "complex64"])
def test_dtypes_that_metal_kernels_lack_are_refused(other: str) -> None:
    with pytest.raises(TypeError, match=f"cannot take {other}"):
        dtype_name(other)
