"""Whole layers, forward and backward: B'MOJO beside a Transformer's and a pair of Mamba's of as many parameters.

A part of apps/bench/kernels.py. Layers are compiled as the trainer compiles them, one graph a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timing
import torch
from torch import Tensor, nn

from bmojo_edge.config import Config
from bmojo_edge.torch import Model

# The widths of the preset "370m"; parameters of the three are equal within 1%.
LAYERS: dict[str, dict[str, Any]] = {
    "bmojo": {"layer_types": ("bmojo",), "d_model": 1024, "d_ff": 2048, "window": 512, "n_eidetic": 256},
    "transformer": {"layer_types": ("attention",), "d_model": 1024, "d_ff": 4192, "ssm": None, "n_eidetic": 0},
    "mamba pair": {"layer_types": ("mamba", "mamba"), "d_model": 1104, "d_ff": 0, "n_eidetic": 0},
}
ROPE = {"bmojo": None, "transformer": 10_000.0, "mamba pair": None}

# Which part of a layer a GPU kernel belongs to, by what its name contains; the first that fits.
PARTS = {
    "scan": ("scan_", "span_", "pass_states", "pass_adjoints", "segment_", "selective_scan"),
    "elementwise": ("triton_",),  # what the compiler made
    "convolution": ("conv_forward", "conv_backward"),
    "selection": ("innovation", "membership", "compact"),
    "attention": ("attend_", "row_products", "members", "add_slots", "flash", "fmha", "cudnn", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "sm90_xmma", "splitk"),
}


def config_of(name: str) -> Config:
    """The layer's config: bfloat16, heads of 64, one key head for four query heads."""
    fields = {"n_heads": 16, "n_kv_heads": 4, "head_dim": 64, "vocab_size": 32, "dtype": "bfloat16"}
    return Config.preset("370m", **{**fields, "rope_theta": ROPE[name], **LAYERS[name]})


def build(name: str, b: int, l: int, device: str) -> tuple[nn.ModuleList, Tensor, Any]:
    """The layers of a case, an input (b, l, d_model) that wants its gradient, and what else a layer is called with."""
    torch.manual_seed(0)
    model, seen = Model(config_of(name)).to(device), []
    hook = model.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    with torch.no_grad():
        model.activations(torch.zeros(b, l, dtype=torch.int64, device=device))
    hook.remove()
    h = torch.randn(b, l, model.config.d_model, device=device, dtype=torch.bfloat16).requires_grad_()
    return model.layers, h, seen[0][1:]


def passes(layers: nn.ModuleList, h: Tensor, others: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward without gradients, and forward with backward to the parameters and the input."""
    inputs, grad = [h, *layers.parameters()], torch.randn_like(h)

    def run() -> Tensor:
        x = h
        for layer in layers:
            x = layer(x, *others).out
        return x

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    return forward, lambda: torch.autograd.grad(run(), inputs, grad)


def split(call: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """Milliseconds a call spends in each part of a layer on the GPU, "rest" for what is elementwise."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        name, ms = event.key.lower(), event.self_device_time_total / 1e3 / repeats
        part = next((part for part, words in PARTS.items() if any(word in name for word in words)), "rest")
        found[part] += ms
    return {part: round(ms, 3) for part, ms in found.items() if ms >= 0.0005}


def rows(device: str, b: int, l: int, names: list[str], compiled: bool) -> list[dict[str, Any]]:
    """Times and splits of the layers named."""
    found = []
    for name in names:
        with timing.fail_soft(found, kernel="layer", case=f"B{b} L{l} d1024", engine=name):
            layers, h, others = build(name, b, l, device)
            if compiled:
                for layer in layers:
                    layer.compile(fullgraph=True)
            forward, both = passes(layers, h, others)
            row = {
                "kernel": "layer", "case": f"B{b} L{l} d1024", "b": b, "l": l, "dtype": "bfloat16", "engine": name,
                "params": sum(p.numel() for p in layers.parameters()), "compiled": compiled,
                "fwd_ms": timing.median_ms(forward, device), "fwdbwd_ms": timing.median_ms(both, device),
            }  # fmt: skip
            if device == "cuda":
                row |= {"split_ms": split(both), "peak_bytes": torch.cuda.max_memory_allocated()}
                torch.cuda.reset_peak_memory_stats()
            found.append(row)
    return found
