"""Unmodified MLX code runs its Metal kernels on this machine once the harness is installed."""

from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="the harness stands in for MLX's own function")

from metal_kernels.host import CheckError, Run, metal_kernel  # noqa: E402
from metal_kernels.host.install import install, installed, mlx_metal_kernel, running, uninstall  # noqa: E402

pytestmark = pytest.mark.usefixtures("harness")

SQUARE = "uint i = thread_position_in_grid.x; o[i] = x[i] * x[i];"


def square(x: Any, **call: Any) -> Any:
    kernel = mx.fast.metal_kernel(name="square", input_names=["x"], output_names=["o"], source=SQUARE)
    arguments = {
        "inputs": [x],
        "grid": (x.size, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [x.shape],
        "output_dtypes": [x.dtype],
    }
    return kernel(**{**arguments, **call})[0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_example_of_mlx_s_documentation(dtype: str, contiguous: bool) -> None:
    source = """
        uint elem = thread_position_in_grid.x;
        uint loc = elem_to_loc(elem, inp_shape, inp_strides, inp_ndim);
        T tmp = T(inp[loc]);
        out[elem] = T(metal::exp(float(tmp)));
    """
    a = mx.random.normal((6, 8), key=mx.random.key(0)).astype(getattr(mx, dtype))
    for x in (a, a.T, a[1:, ::3], mx.broadcast_to(a[2], (3, 8))):
        with installed():
            kernel = mx.fast.metal_kernel(
                name="myexp",
                input_names=["inp"],
                output_names=["out"],
                source=source,
                ensure_row_contiguous=contiguous,
            )
            (out,) = kernel(
                inputs=[x],
                template=[("T", x.dtype)],
                grid=(x.size, 1, 1),
                threadgroup=(32, 1, 1),
                output_shapes=[x.shape],
                output_dtypes=[x.dtype],
            )
        assert isinstance(out, mx.array)
        assert out.dtype == x.dtype
        assert mx.allclose(out.astype(mx.float32), mx.exp(x.astype(mx.float32)), rtol=1e-2)


def test_views_of_numpy_arrays_keep_their_strides() -> None:
    source = "uint i = thread_position_in_grid.x; o[i] = x[int64_t(i) * x_strides[0]];"
    kernel = metal_kernel("strided", ["x"], ["o"], source, ensure_row_contiguous=False)
    x = np.arange(40, dtype=np.float32)
    for view in (x, x[5:], x[::-1], x[30:2:-3], x[::4]):
        (out,) = kernel(
            inputs=[view],
            grid=(view.size, 1, 1),
            threadgroup=(8, 1, 1),
            output_shapes=[view.shape],
            output_dtypes=[np.float32],
        )
        np.testing.assert_array_equal(out, view)


def test_gradients_go_through_a_custom_function() -> None:
    function = mx.custom_function(lambda x: square(x))

    @function.vjp
    def _(x: Any, cotangent: Any, _output: Any) -> Any:
        return 2 * x * cotangent

    x = mx.arange(20).astype(mx.float32)
    with installed(Run(mode="fast")):
        value, gradient = mx.value_and_grad(lambda x: function(x).sum())(x)
    assert mx.allclose(gradient, 2 * x)
    assert value.item() == (x * x).sum().item()


def test_installing_and_giving_back() -> None:
    install()
    assert mx.fast.metal_kernel is metal_kernel
    uninstall()
    assert mx.fast.metal_kernel is mlx_metal_kernel
    with pytest.raises(CheckError), installed():
        square(mx.arange(4), grid=(5, 1, 1))
    assert mx.fast.metal_kernel is mlx_metal_kernel


def test_running_changes_how_existing_kernels_run() -> None:
    kernel = metal_kernel("square", ["x"], ["o"], SQUARE)
    call: dict[str, Any] = {"inputs": [np.arange(4.0, dtype=np.float32)], "grid": (4, 1, 1), "threadgroup": (4, 1, 1)}
    call |= {"output_shapes": [(4,)], "output_dtypes": [np.float32]}
    for mode in ("check", "fast"):
        with running(Run(mode=mode)):
            np.testing.assert_array_equal(kernel(**call)[0], [0, 1, 4, 9])
        assert kernel.statistics is not None
        assert (kernel.statistics.accesses > 0) == (mode == "check")


def test_scalars_small_and_empty_arrays() -> None:
    source = (
        "uint i = thread_position_in_grid.x; o[i] = float(flag) + s * float(n) + (empty_shape[1] == 3 ? 1.0f : 0.0f);"
    )
    kernel = metal_kernel("scalars", ["s", "n", "flag", "empty"], ["o"], source)
    (out,) = kernel(
        inputs=[2.5, 3, True, mx.zeros((0, 3))],
        grid=(2, 1, 1),
        threadgroup=(2, 1, 1),
        output_shapes=[(2,)],
        output_dtypes=[mx.float32],
    )
    assert out.tolist() == [9.5, 9.5]


def test_outputs_are_of_the_inputs_kind() -> None:
    with installed():
        assert isinstance(square(mx.arange(3)), mx.array)
        assert isinstance(square(np.arange(3, dtype=np.int32)), np.ndarray)


def test_verbose_prints_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    with installed():
        square(mx.arange(9), verbose=True)
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Generated source code for `square`:\n```\n[[kernel]] void custom_kernel_square_int32_t_int32_t(\n"
    )
    assert printed.endswith(f"{SQUARE}\n}}\n\n```\n")


@pytest.mark.parametrize("transform", ["compile", "vmap"])
def test_transforms_that_trace_are_refused(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "0")
    mx.enable_compile()
    try:
        with installed(), pytest.raises(RuntimeError, match="runs a kernel at once"):
            getattr(mx, transform)(square)(mx.ones((2, 3)))
    finally:
        mx.disable_compile()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"inputs": []}, "Expected `inputs` to have size 1 but got size 0"),
        ({"output_shapes": []}, "Expected `output_shapes` to have size 1 but got size 0"),
        ({"output_dtypes": [mx.int32] * 2}, "Expected `output_dtypes` to have size 1 but got size 2"),
        ({"threadgroup": (32, 33, 1)}, r"Thread group size \(1056\) is greater than"),
        ({"grid": (0, 1, 1)}, "`grid` must be three positive numbers"),
        ({"stream": mx.cpu}, "Only supports the GPU"),
    ],
)
def test_wrong_calls_are_refused_as_mlx_does(call: dict[str, Any], message: str) -> None:
    with installed(), pytest.raises(ValueError, match=message):
        square(mx.arange(4), **call)


def test_a_kernel_without_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one output"):
        metal_kernel("nothing", ["x"], [], "")


def test_compile_options_are_mlx_s() -> None:
    source = """
        #if defined(__FAST_MATH__) && __FAST_MATH__
        o[0] = 1;
        #else
        o[0] = 0;
        #endif
    """
    for mode, expected in (("safe", 0), ("fast", 1)):
        kernel = metal_kernel("math_mode", ["x"], ["o"], source, compile_options={"math_mode": mode})
        (out,) = kernel(
            inputs=[np.zeros(1, np.float32)],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[np.float32],
        )
        assert out[0] == expected
    with pytest.raises(ValueError, match="math_mode"):
        metal_kernel("square", ["x"], ["o"], SQUARE, compile_options={"math_mode": "sloppy"})


def test_the_checker_takes_one_worker() -> None:
    with pytest.raises(ValueError, match="workers=1"):
        Run(mode="check", workers=2)
