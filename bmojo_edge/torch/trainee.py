"""A model as it is trained: its loss, in which precision each layer computes, what is kept for the backward pass.

Parameters stay float32 and are cast where they are used, so that gradients and the optimizer are float32 too. It knows
neither data nor optimizer nor processes; `parallel` wraps what comes out of here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bmojo_edge.config import Config
from bmojo_edge.state import State, map_leaves
from bmojo_edge.torch.block import Block, BlockResult
from bmojo_edge.torch.data import NO_TARGET
from bmojo_edge.torch.loss import linear_cross_entropy
from bmojo_edge.torch.model import Model


class Trainee(nn.Module):
    """A model whose forward pass is the sum of its losses.

    With `cast`, embedding, last norm and head compute in that dtype; the layers are `prepare`d for theirs.
    """

    def __init__(self, model: Model, cast: torch.dtype | None = None) -> None:
        super().__init__()
        self.loss = _Loss(model)
        self.cast = cast

    def forward(
        self, tokens: Tensor, targets: Tensor, segments: Any, state: State | None, restarts: Tensor | None
    ) -> tuple[Tensor, State | None]:
        """Sum of the losses in nats over targets (n, t) that are not NO_TARGET, and the state after tokens (n, t).

        segments (n, t) as `Model.forward` takes them; state None: rows begin here, and leave none; restarts (n,): rows
        that drop their state. Segments in NumPy let nothing wait for a GPU.
        """
        arguments = (tokens, targets, segments, state, restarts)
        if self.cast is None:
            return self.loss(*arguments)
        own = {n: p for n, p in self.loss.named_parameters() if not n.startswith("model.layers.")}
        return functional_call(self.loss, {n: p.to(self.cast) for n, p in own.items()}, arguments)


class _Loss(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, targets: Tensor, segments: Any, state: State | None, restarts: Tensor | None
    ) -> tuple[Tensor, State | None]:
        if state is None:
            hidden = self.model.activations(tokens, segments)
        else:
            state = state if restarts is None else self.model.reset(state, restarts)
            hidden, state = self.model.hidden(tokens, state, segments)
            # A copy: leaves are views that would keep a call's activations, in strides of their own.
            state = map_leaves(lambda x: x.clone(memory_format=torch.contiguous_format), state)
        return linear_cross_entropy(hidden, self.model.head_weight, targets, NO_TARGET), state


class _Body(nn.Module):
    """A layer as a function of its parameters, whatever its own `forward` has been made to do.

    Gradients end with a call: its state is detached.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, *arguments: Any) -> BlockResult:
        result = Block.forward(self.block, *arguments)
        state = None if result.state is None else map_leaves(lambda x: x.detach(), result.state)
        return BlockResult(result.out, state, None)


def float32_names(config: Config) -> set[str]:
    """Parameters that a model of this config keeps in float32 whatever it computes in: what the scan is made of."""
    with torch.device("meta"):
        model = Model(config)
    return {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}


def prepare(model: Model, cast: torch.dtype | None, recompute: bool, compiled: bool) -> None:
    """Make every layer compute in `cast`, forget all but its inputs until the backward pass, run compiled."""
    kept = float32_names(model.config)
    for i, block in enumerate(model.blocks()):
        body = _Body(block)
        if compiled:
            body.compile()
        names = [n for n, _ in block.named_parameters() if f"layers.{i}.{n}" not in kept] if cast else []
        run = partial(_run, body, names, cast)
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False) if recompute else run
        block.forward = run  # pyright: ignore[reportAttributeAccessIssue]


def _run(body: _Body, names: list[str], cast: torch.dtype | None, *arguments: Any) -> BlockResult:
    if not names:
        return body(*arguments)
    parameters = dict(body.block.named_parameters())
    return functional_call(body, {f"block.{n}": parameters[n].to(cast) for n in names}, arguments)
