"""AdamW with the paper's groups, the learning rate of a step, and the norm of the gradient.

State-space parameters learn `ssm_lr_scale` times as fast as the others; norms, biases and what the scan is made of do
not decay. It knows parameters by their names (docs/checkpoints.md) and nothing of losses or processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bmojo_edge.config import SSM_KINDS, Config
from bmojo_edge.train_config import Optimizer

_NO_DECAY = ("norm.weight", ".bias", ".A_log", ".D", ".dt_bias")


def is_ssm(name: str, config: Config) -> bool:
    """Whether a parameter belongs to a state-space mixer, by itself or inside a bmojo layer."""
    parts = name.split(".")
    if len(parts) < 4 or parts[0] != "layers" or parts[2] != "mixer":
        return False
    return parts[3] == "ssm" or config.layer_types[int(parts[1])] in SSM_KINDS


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: not on norms, biases, A_log, D and the bias of dt."""
    return not name.endswith(_NO_DECAY)


def adamw(model: nn.Module, config: Config, settings: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW over groups: state-space or not, decaying or not; `scale` multiplies the learning rate.

    Sharded parameters and whole ones are apart as well, for one kernel takes one kind.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = (is_ssm(name, config), decays(name), isinstance(parameter, DTensor))
        groups.setdefault(kind, []).append(parameter)
    tables = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decaying else 0.0,
            "scale": settings.ssm_lr_scale if ssm else 1.0,
        }
        for (ssm, decaying, _), parameters in groups.items()
    ]
    return torch.optim.AdamW(tables, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(settings: Optimizer, step: int, steps: int, scale: float = 1.0) -> float:
    """The rate of step 0 .. steps - 1: a linear warm-up to scale * lr, then a cosine that ends at final_lr."""
    peak, warm = scale * settings.lr, round(settings.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - 1 - warm)
    final = min(settings.final_lr, peak)
    return final + (peak - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: Optimizer, step: int, steps: int) -> None:
    """Give every group the rate of a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step, steps, group["scale"])


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale all gradients so that their norm is at most `limit`; the norm before, over all processes."""
    having = [p for p in parameters if p.grad is not None]
    sharded = [p for p in having if isinstance(p.grad, DTensor)]
    whole = [p for p in having if not isinstance(p.grad, DTensor)]
    norms = []
    for group in (sharded, whole):
        if group:
            norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
    for group in (sharded, whole):
        if group:
            nn.utils.clip_grads_with_norm_(group, limit, total)
    return float(total)
