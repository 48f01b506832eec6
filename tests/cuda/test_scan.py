"""The selective scan: its plain op against the oracle, its kernels interpreted, compiled, and on a GPU."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from bmojo_edge import reference_ssm
from bmojo_edge.config import SSM
from bmojo_edge.state import MambaState
from tests.cuda.processes import compiled, need_triton, run_interpreted
from tests.helpers import assert_close, odd

torch = pytest.importorskip("torch")

from bmojo_cuda import causal_conv_reference, scan_launch, selective_scan, selective_scan_reference  # noqa: E402
from tests.cuda.scan_cases import ScanCase, assert_scan_equals_float64, documents, each  # noqa: E402

# --- anywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carried", [False, True])
def test_plain_ops_make_the_oracles_mamba(carried: bool) -> None:
    config = odd("mamba")
    ssm = config.ssm
    assert isinstance(ssm, SSM)
    assert ssm.dt_rank is not None
    d, n, r, taps = ssm.expand * config.d_model, ssm.d_state, ssm.dt_rank, ssm.d_conv
    rng = np.random.default_rng(0)
    shapes = {
        "in_proj.weight": (2 * d, config.d_model), "conv.weight": (d, taps), "conv.bias": (d,), "D": (d,),
        "x_proj.weight": (r + 2 * n, d), "dt_proj.weight": (d, r), "dt_proj.bias": (d,), "A_log": (d, n),
        "out_proj.weight": (config.d_model, d),
    }  # fmt: skip
    weights = {name: rng.standard_normal(shape) / 2 for name, shape in shapes.items()}
    u = rng.standard_normal((23, config.d_model))
    state = MambaState(rng.standard_normal((taps - 1, d)), rng.standard_normal((d, n))) if carried else None
    ref, ref_state = reference_ssm.mamba(config, ssm, reference_ssm.Weights(weights, np.float64), u, state)

    w = {name: torch.from_numpy(value) for name, value in weights.items()}
    x, z = (torch.from_numpy(u)[None] @ w["in_proj.weight"].T).chunk(2, -1)
    past = None if state is None else torch.from_numpy(state.conv)[None]
    x, last_inputs = causal_conv_reference(x, w["conv.weight"], w["conv.bias"], past)
    dt, B, C = (x @ w["x_proj.weight"].T).split([r, n, n], -1)
    dt = dt @ w["dt_proj.weight"].T
    first = None if state is None else torch.from_numpy(state.ssm)[None]
    y, last = selective_scan_reference(x, dt, -w["A_log"].exp(), B, C, w["D"], z, w["dt_proj.bias"], first)
    assert_close((y @ w["out_proj.weight"].T)[0], ref, 1e-13, "y")
    assert_close(last[0], ref_state.ssm, 1e-13, "state")
    assert_close(last_inputs[0], ref_state.conv, 1e-13, "last inputs")


def test_packed_documents_equal_documents_alone() -> None:
    case = ScanCase(1, 20, 3, 4)
    given = each(case.inputs("cpu"), torch.Tensor.double)
    ids = torch.tensor([[0] * 6 + [1] * 1 + [2] * 9 + [-1] * 4])
    y, last = selective_scan_reference(**given, segment_ids=ids)
    for begin, end in ((0, 6), (6, 7), (7, 16)):
        part = {name: t[:, begin:end] if name in ("x", "dt", "B", "C", "z") else t for name, t in given.items()}
        part["state"] = None if begin else given["state"]
        alone, state = selective_scan_reference(**part)
        assert_close(y[:, begin:end], alone, 1e-13)
    assert_close(last, state, 1e-13)


@pytest.mark.parametrize(
    ("name", "shape"), [("dt", (1, 5, 4)), ("A", (4, 2)), ("B", (1, 5, 3)), ("state", (1, 3, 3)), ("z", (1, 4, 3))]
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    given = ScanCase(1, 5, 3, 2).inputs("cpu")
    with pytest.raises(ValueError, match=f"^{name}: must have shape"):
        selective_scan(**{**given, name: torch.zeros(shape)})


def test_kernels_interpreted() -> None:
    run_interpreted("scan_interpreted.py", "test_scan or many_states or contract or autograd")


TYPES = {
    **dict.fromkeys(("X", "DT", "Z", "Y", "DY", "DX", "DDT", "DZ"), "*bf16"),
    **dict.fromkeys(("B", "C", "A", "SKIP", "BIAS", "FIRST", "SAVED", "STATES", "SUMS", "BLOCKS", "CARRY"), "*fp32"),
    **dict.fromkeys(("DBC", "DA", "DSKIP", "DBIAS", "FORGET", "ENDS", "LAST"), "*fp32"),
    **dict.fromkeys(("L", "D", "span", "phase", "x_b", "x_t", "dt_b", "dt_t", "z_b", "z_t"), "i32"),
    **dict.fromkeys(("BC", "BCT"), "*i32"),
    **dict.fromkeys(("spans", "segments"), "i32"),
    "RESET": "*i64",
}
FLAGS = dict.fromkeys(("HAS_Z", "HAS_SKIP", "HAS_BIAS", "SOFTPLUS", "RESETS"), True)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_without_spills(arch: int) -> None:
    need_triton("compilation of Triton's kernels")
    from bmojo_cuda import scan_kernels as kernels

    n, segment, walk = 16, scan_launch.SEGMENT, scan_launch.FORWARD
    lanes = walk.lanes(n)
    spans = {
        "N": n, "G": lanes, "W": walk.states, "R": walk.tokens // lanes, "AHEAD": walk.ahead, "SEGMENT": segment,
        "HAS_FIRST": True, "EVEN": False, **FLAGS,
    }  # fmt: skip
    plan = scan_launch.ADJOINTS
    adjoints = {"U": plan.tokens, "UB": scan_launch.GRADIENTS.tokens, "BD": plan.channels}
    plan = scan_launch.GRADIENTS
    gradients = {"U": plan.tokens, "NU": plan.states, "BD": plan.channels, "EXACT": False}
    cases = [
        (kernels.scan_spans, {**spans, "OUTPUTS": True}, 128),  # 16 warps a multiprocessor
        (kernels.scan_spans, {**spans, "OUTPUTS": False}, 128),
        (kernels.pass_states, {"N": n, "BD": 256, "HAS_FIRST": True, "RESETS": True}, 255),
        (kernels.pass_adjoints, {"N": n, "BD": 256, "U": 8, "HAS_LAST": True, "RESETS": True}, 255),
        (kernels.segment_adjoints, {"N": n, "SEGMENT": segment, "EVEN": False, **adjoints, **FLAGS}, 255),
        (kernels.segment_gradients, {"N": n, "SEGMENT": segment, "EVEN": True, **gradients, **FLAGS}, 255),
    ]
    for kernel, constants, most in cases:
        code = compiled(kernel, TYPES, constants, arch, warps=4 if constants.get("BD") == 256 else 1)
        assert code.spilled == 0, (kernel.fn.__name__, code[:2])
        assert code.registers <= most, (kernel.fn.__name__, code[:2])


# --- on a GPU -------------------------------------------------------------------------------------------------------

CASES = {
    "bf16, documents": ScanCase(2, 333, 96, 16, torch.bfloat16, documents=True),
    "fp16, odd": ScanCase(3, 61, 35, 8, torch.float16),
    "fp32, odd, documents": ScanCase(2, 129, 70, 5, documents=True),
    "one token": ScanCase(2, 1, 64, 16, torch.bfloat16),
    "nothing optional, steps as they are": ScanCase(2, 100, 64, 16, torch.bfloat16, optional=(), softplus=False),
    "fp32, 32 states": ScanCase(1, 77, 40, 32),
    "bf16, 64 states": ScanCase(1, 70, 40, 64, torch.bfloat16),
    "large, bf16": ScanCase(2, 2048, 1024, 16, torch.bfloat16),
    "large, odd, fp32": ScanCase(2, 2049, 520, 16, documents=True),
}


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str) -> None:
    torch.manual_seed(0)
    assert_scan_equals_float64(CASES[name], "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("spans", [1, 2, 3, 8])
@pytest.mark.parametrize("l", [512, 509])
def test_every_cut_of_time_equals_float64(spans: int, l: int) -> None:
    torch.manual_seed(0)
    assert_scan_equals_float64(ScanCase(1, l, 96, 16, torch.bfloat16, documents=True), "cuda", spans=spans)


def leaves(case: ScanCase, device: str = "cuda") -> dict:
    return each(case.inputs(device), torch.Tensor.requires_grad_)


@pytest.mark.cuda
def test_public_op_compiles_and_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    given = leaves(ScanCase(2, 96, 64, 16, torch.bfloat16))
    ids = documents(2, 96, "cuda")
    present = [t for t in given.values() if t is not None]

    def run(scan) -> list:
        y, last = scan(**given, segment_ids=ids)
        return [y, last, *torch.autograd.grad(y.float().square().sum() + last.sum(), present)]

    eager = run(selective_scan)
    for wrapped in (
        torch.compile(selective_scan, fullgraph=True),
        lambda **named: checkpoint(selective_scan, use_reentrant=False, **named),
    ):
        for got, ref in zip(run(wrapped), eager, strict=True):
            assert_close(got, ref, 1e-6)


@pytest.mark.cuda
def test_operators_keep_their_contract_with_torch() -> None:
    from bmojo_cuda import scan
    from bmojo_cuda.documents import forget_marks

    case = ScanCase(1, 70, 66, 16, torch.bfloat16)
    torch.library.opcheck(scan._scan, (*leaves(case).values(), forget_marks(documents(1, 70, "cuda")), True, True))


@pytest.mark.cuda
def test_trains_in_an_fsdp2_module() -> None:
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    case = ScanCase(1, 64, 64, 16)
    given = case.inputs("cuda")

    class Scan(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = torch.nn.Parameter(given["A"].clone())

        def forward(self, x):
            return selective_scan(x, given["dt"], self.A, given["B"], given["C"])[0]

    alone = Scan()
    alone(given["x"]).sum().backward()
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    try:
        sharded = Scan()
        fully_shard(sharded)  # in place
        sharded(given["x"]).sum().backward()
        assert isinstance(sharded.A.grad, DTensor)
        assert_close(sharded.A.grad.full_tensor(), alone.A.grad, 1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.cuda
def test_too_many_states_are_left_to_plain_torch_with_a_warning() -> None:
    given = ScanCase(1, 3, 4, 257).inputs("cuda")
    with pytest.warns(RuntimeWarning, match="selective_scan: 257 states"):
        y, _ = selective_scan(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact, _ = selective_scan(**each(given, torch.Tensor.double))
    assert_close(y, exact, 1e-6)


@pytest.mark.cuda
def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 70 << 30:
        pytest.skip("needs 70 GiB of GPU memory")
    d, n = 2048, 16
    l, end = (1 << 31) // d + 131, 400
    torch.manual_seed(0)
    x, dt = (torch.randn(1, l, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    B, C = (torch.randn(1, l, n, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    A = -torch.linspace(0.5, 2, d * n, device="cuda").reshape(d, n)
    assert x.numel() > 1 << 31
    y, last = selective_scan(x, dt, A, B, C)
    dy = torch.randn(1, end, d, device="cuda", dtype=torch.bfloat16)
    found = torch.autograd.grad(y[:, -end:], (x, dt, B, C), dy)
    tails = [t.detach()[:, -2 * end :].double().requires_grad_() for t in (x, dt, B, C)]
    ref, ref_last = selective_scan_reference(tails[0], tails[1], A.double(), tails[2], tails[3])
    exact = torch.autograd.grad(ref[:, -end:], tails, dy.double())
    assert_close(y[:, -end:], ref[:, -end:], 3e-3, "y")  # the state forgets within `end` tokens
    assert_close(last, ref_last, 1e-5, "last state")
    for got, want in zip(found, exact, strict=True):
        assert_close(got[:, -end:], want[:, -end:], 5e-3)
