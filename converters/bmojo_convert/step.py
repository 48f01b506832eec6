"""The pure step that other runtimes run: tokens, a position and the state go in, logits and the state come out.

Written for exporters: shapes are fixed, positions are int32 data, nothing is decided on the host but when to call which
of three graphs. `Decode` moves one token, `Prefill` a whole chunk that starts at a multiple of `chunk`, and `Commit` is
called before either wherever the position is such a multiple, to let tokens that leave the window compete for eidetic
slots. The weights and all mixers are those of the PyTorch twin; this module only restates how memories are kept.

What differs from the twin's state, so that it fits half precision and may run for ever: a slot has no position but
`admitted`, the offset in the running chunk from which it may be seen (EMPTY where the slot is), slots are in order of
position, and angles come in as cosines and sines of the position, which the host takes modulo a turn (docs/export.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo_convert.export_folder import check_exportable
from bmojo_edge.config import Config
from bmojo_edge.rope import softmax_scale, turns_per_token
from bmojo_edge.state import Leaf, MambaState, leaves, map_leaves, state_spec
from bmojo_edge.torch import Model
from bmojo_edge.torch.block import Block
from bmojo_edge.torch.layers import MixtureOfExperts
from bmojo_edge.torch.layout import Layout, Step, layout_of
from bmojo_edge.torch.mixers import Attention, BMojo, Mamba
from bmojo_edge.torch.ops import Rotary, rotate

EMPTY = 30_000.0  # `admitted` of an empty slot: more than any offset, exact in half precision
HIDDEN = -30_000.0  # the score of what may not be seen: finite, and exp of it is 0 in half precision too
State = dict[str, Tensor]  # leaves by dotted name


class StateLeaf(NamedTuple):
    """One array of the state: its shape without the batch, and the value a fresh one is filled with."""

    shape: tuple[int, ...]
    fill: float = 0.0
    wide: bool = False  # float32 in every export: a recurrence that half precision would spoil


def state_leaves(config: Config) -> dict[str, StateLeaf]:
    """Every array of an exported state by name, in the order of the graphs' inputs."""
    found: dict[str, StateLeaf] = {}
    for name, leaf in leaves(state_spec(config, 1).layers, "layers"):
        assert isinstance(leaf, Leaf)
        shape = leaf.shape[1:]
        if name.endswith("eidetic.positions"):
            found[name.replace("positions", "admitted")] = StateLeaf(shape, EMPTY)
        elif name.endswith("eidetic.scores"):
            found[name] = StateLeaf(shape, -1.0)
        else:
            found[name] = StateLeaf(shape, wide=name.rsplit(".", 1)[-1] in ("ssm", "H", "U"))
    return found


def position_cycle(config: Config) -> tuple[int, int]:
    """(base, period): from `base` on a position p may be told as base + (p - base) mod period: int32 never ends."""
    rings = [config.chunk_size]
    for i, kind in enumerate(config.layer_types):
        if kind == "bmojo":
            rings += [config.window, config.window + config.fading_of(i)]
        elif kind == "attention":
            rings.append(config.attention_window_of(i) or 1)
    period = math.lcm(*rings)
    longest = max(rings) + config.n_sinks
    return period * math.ceil(longest / period), period


class _Plan(NamedTuple):
    """Where the T tokens of a call stand."""

    position: Tensor  # (b, 1) int32, of the first
    place: Tensor  # (b, T) offset in the running chunk, in the scores' dtype
    ages: Tensor  # (T,) int32: 0 .. T - 1
    scatters: bool  # whether rings are written by a scatter
    at: Rotary | None  # (b, T, p / 2)


def _ring(ring: Tensor, new: Tensor, plan: _Plan) -> Tensor:
    """A ring (b, ..., n, p), slot = position mod n, after T new values (b, ..., T, p) are written."""
    n, size = ring.shape[-2], new.shape[-2]
    if size > n:  # later tokens would overwrite these
        new = new[..., size - n :, :]
    first = plan.position + (size - new.shape[-2])
    if plan.scatters:
        slots = (first + plan.ages[: new.shape[-2]]) % n  # (b, T)
        form = (-1, *(1,) * (ring.dim() - 3), new.shape[-2], 1)
        return ring.scatter(-2, slots.long().view(form).expand(*new.shape), new)
    slots = torch.arange(n, dtype=torch.int32)
    which = (slots + n - first % n) % n  # (b, n): the token of this call that a slot gets
    return _overwritten(ring, new, which, which < size)


def _overwritten(slots: Tensor, new: Tensor, which: Tensor, mine: Tensor) -> Tensor:
    """slots (b, ..., n, p) with new[which] (b, ..., T, p) where `mine`; which, mine (b, n)."""
    form = (-1, *(1,) * (slots.dim() - 3), slots.shape[-2], 1)
    if new.shape[-2] > 1:
        index = torch.where(mine, which, torch.zeros((), dtype=which.dtype)).long()
        new = new.gather(-2, index.view(form).expand(*slots.shape))
    return torch.where(mine.view(form), new, slots)


def _held(n: int, last: Tensor) -> Tensor:
    """Position each slot of a ring of n holds once `last` (b, 1) is written, last >= -1: (b, n), negative = none."""
    slots = torch.arange(n, dtype=torch.int32)
    return last - (last + n - slots) % n


def _hidden_where(visible: Tensor, like: Tensor) -> Tensor:
    """0 where visible, HIDDEN elsewhere."""
    return torch.where(visible, torch.zeros((), dtype=like.dtype), torch.full((), HIDDEN, dtype=like.dtype))


class _Read(NamedTuple):
    """One memory as attention reads it."""

    q: Tensor  # (b, h, T, p)
    k: Tensor  # (b, g, n, p)
    v: Tensor  # (b, g, n, p)
    mask: Tensor  # (b, 1, T, n)


def _attend(memories: list[_Read], scale: float) -> Tensor:
    """One softmax over all memories: (b, h, T, p)."""
    b, h, t, p = memories[0].q.shape
    g = memories[0].k.shape[1]
    scores = []
    for m in memories:
        products = m.q.reshape(b, g, h // g * t, p) @ m.k.transpose(-1, -2)
        scores.append(products.view(b, h, t, -1) * scale + m.mask)
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).split([m.k.shape[2] for m in memories], dim=-1)
    mixed = [(w.reshape(b, g, h // g * t, -1) @ m.v).view(b, h, t, p) for w, m in zip(weights, memories, strict=True)]
    return torch.stack(mixed).sum(0) if len(mixed) > 1 else mixed[0]


def _constant_angles(config: Config, distances: np.ndarray) -> Rotary | None:
    """Angles of fixed distances (n,): (1, n, p / 2)."""
    turns = turns_per_token(config)
    if turns is None:
        return None
    cos, sin = (torch.from_numpy(x)[None] for x in angles(turns, distances))
    return Rotary(cos, sin)


def angles(turns: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (..., p / 2), float32, of positions (...), which the host gives a graph (docs/model.md, 4)."""
    phase = positions.astype(np.uint64)[..., None] * turns
    turn = phase.view(np.int64).astype(np.float64) * (2 * np.pi / 2.0**64)
    return np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)


class Graph(nn.Module):
    """What the three graphs share. `inputs` names the tensors before the state, `names` the state itself.

    scatters: rings are written by a scatter, which runtimes may do in place, instead of a choice for every slot.
    """

    def __init__(self, model: Model, scatters: bool = False) -> None:
        super().__init__()
        check_exportable(model.config)
        self.model, self.config, self.scatters = model, model.config, scatters
        self.names = tuple(state_leaves(model.config))
        self.rotary = model.config.rope_theta is not None
        self.pinned = _constant_angles(model.config, np.array([model.config.window]))
        self.scale = softmax_scale(model.config)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names before the state's."""
        return ("tokens", "position", *(("cos", "sin") if self.rotary else ()))

    def examples(self, batch: int = 1) -> dict[str, Tensor]:
        """Inputs by name, all different tensors, as exporters want them."""
        size, p = self.size, self.config.d_head
        found: dict[str, Tensor] = {"position": torch.zeros(batch, dtype=torch.int32)}
        if "tokens" in self.inputs:
            found = {"tokens": torch.zeros(batch, size, dtype=torch.int32), **found}
        if self.rotary:
            found |= {"cos": torch.ones(batch, size, p // 2), "sin": torch.zeros(batch, size, p // 2)}
        return found | fresh_state(self.config, batch, self.names)

    size = 1  # tokens of a call

    def _arguments(self, arguments: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], State]:
        n = len(self.inputs)
        return dict(zip(self.inputs, arguments[:n], strict=True)), dict(zip(self.names, arguments[n:], strict=True))

    def plan(self, given: Mapping[str, Tensor]) -> _Plan:
        """Where a call's tokens stand, from its inputs by name."""
        position = given["position"].view(-1, 1)
        ages = torch.arange(self.size, dtype=torch.int32)
        place = (position % self.config.chunk_size + ages).to(torch.float32)
        return _Plan(position, place, ages, self.scatters, Rotary(given["cos"], given["sin"]) if self.rotary else None)


class Decode(Graph):
    """forward(tokens (b, T), position (b,)[, cos, sin (b, T, p / 2)], *state) -> (last logits (b, v), *state)."""

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        given, state = self._arguments(arguments)
        plan, h = self.plan(given), self.model.embed(given["tokens"])
        for i in range(len(self.config.layer_types)):
            h = self.layer(i, h, state, plan)
        return (self.logits(h), *(state[name] for name in self.names))

    def layer(self, i: int, h: Tensor, state: State, plan: _Plan) -> Tensor:
        """Layer i on h (b, T, d); its leaves in `state` are replaced."""
        block = self.model.blocks()[i]
        h = h + self._mix(block, i, h, state, plan).to(h.dtype)
        return _feed_forward(block, h)

    def logits(self, h: Tensor) -> Tensor:
        """Logits (b, v) of the last token of h (b, T, d)."""
        return self.model.head(self.model.norm(h[:, -1]).to(h.dtype))

    def _mix(self, block: Block, i: int, h: Tensor, state: State, plan: _Plan) -> Tensor:
        """A layer's mixer: (b, T, d); the layer's leaves in `state` are replaced."""
        u, prefix = block.norm(h), f"layers.{i}"
        if isinstance(block.mixer, BMojo):
            return self._bmojo(block.mixer, i, u, state, plan)
        if isinstance(block.mixer, Attention):
            return self._attention(block.mixer, i, u, state, plan)
        return self._ssm(block.mixer, u, prefix, state)

    def _ssm(self, mixer: Any, u: Tensor, prefix: str, state: State) -> Tensor:
        """A state-space mixer on u (b, T, d), whose leaves stand under `prefix`."""
        spec = _subtree(state_spec(self.config, 1).layers, prefix)
        names = [name for name, _ in leaves(spec, prefix)]
        values = iter(state[name] for name in names)
        held = map_leaves(lambda _: next(values), spec)
        if isinstance(mixer, Mamba):
            y, held = _mamba(mixer, u, held)
        elif self.size == 1:
            y, held = mixer.step(u[:, 0], held, _NO_STEP)
            y = y[:, None]
        else:
            y, held = mixer(u, held, self._layout(u))
        state.update(zip(names, (leaf for _, leaf in leaves(held)), strict=True))
        return y

    def _layout(self, u: Tensor) -> Layout:
        """Documents and padding do not occur in a graph: only that is read of it."""
        start = torch.zeros(u.shape[0], dtype=torch.int64)
        return layout_of(self.config, (u.shape[0], self.size), start, start)

    def _attention(self, mixer: Attention, i: int, u: Tensor, state: State, plan: _Plan) -> Tensor:
        x = mixer.project(u.to(mixer.o_proj.weight.dtype))
        q, k, prefix = rotate(x.q, plan.at), rotate(x.k, plan.at), f"layers.{i}"
        assert mixer.reach is not None
        o = _attend([self._window(prefix, q, k, x.v, mixer.reach, state, plan)], self.scale)
        return mixer.o_proj(_merge_heads(o))

    def _window(self, prefix: str, q: Tensor, k: Tensor, v: Tensor, reach: int, state: State, plan: _Plan) -> _Read:
        """The last `reach` tokens, the call's own included; their ring is written."""
        old_k, old_v = state[f"{prefix}.k"], state[f"{prefix}.v"]
        new_k, new_v = _ring(old_k, k, plan), _ring(old_v, v, plan)
        state[f"{prefix}.k"], state[f"{prefix}.v"] = new_k, new_v
        if self.size == 1:  # the ring holds the window exactly
            visible = _held(reach, plan.position) >= 0
            return _Read(q, new_k, new_v, _hidden_where(visible, q)[:, None, None])
        held = _held(reach, plan.position - 1)[:, None]  # (b, 1, n), before the call's tokens
        distance = plan.position[..., None] + plan.ages[:, None] - held
        before = torch.logical_and(held >= 0, distance < reach)
        own = (plan.ages[:, None] >= plan.ages).expand(q.shape[0], -1, -1)
        own = torch.logical_and(own, plan.ages[:, None] - plan.ages < reach)
        mask = _hidden_where(torch.cat([before, own], dim=-1), q)[:, None]
        return _Read(q, torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2), mask)

    def _fading(self, prefix: str, q: Tensor, k: Tensor, v: Tensor, state: State, plan: _Plan) -> _Read:
        """Tokens window .. window + n_fading - 1 back as the SSM saw them. None of the call's own is among them."""
        old = _Read(q, state[f"{prefix}.k"], state[f"{prefix}.v"], q)
        new_k, new_v = _ring(old.k, k, plan), _ring(old.v, v, plan)
        state[f"{prefix}.k"], state[f"{prefix}.v"] = new_k, new_v
        if self.size == 1:  # the slot just written is not to be seen, and nothing else reads the old ring
            old = _Read(q, new_k, new_v, q)
        n, w = old.k.shape[2], self.config.window
        held = _held(n, plan.position - 1)[:, None]
        distance = plan.position[..., None] + plan.ages[:, None] - held
        visible = torch.logical_and(held >= 0, torch.logical_and(distance >= w, distance < n))
        return _Read(q, old.k, old.v, _hidden_where(visible, q)[:, None])

    def _sinks(self, prefix: str, q: Tensor, k: Tensor, v: Tensor, state: State, plan: _Plan) -> _Read:
        """The first n_sinks tokens, unrotated."""
        n = self.config.n_sinks
        slots = torch.arange(n, dtype=torch.int32)
        which = slots - plan.position  # (b, n): the token of this call that a slot gets
        mine = torch.logical_and(which >= 0, which < self.size)
        for name, new in (("k", k), ("v", v)):
            state[f"{prefix}.{name}"] = _overwritten(state[f"{prefix}.{name}"], new, which, mine)
        age = plan.position[..., None] + plan.ages[:, None] - self.config.window
        mask = _hidden_where(slots <= age, q)[:, None]
        return _Read(q, state[f"{prefix}.k"], state[f"{prefix}.v"], mask)

    def _scores(self, heard: Tensor) -> Tensor:
        """Innovation scores (b, T) of the last T of `heard` (b, taps + T, d), without the twin's updates in place."""
        rule, size = self.config.innovation, self.size
        taps = rule.coefficients()
        now = heard[:, len(taps) :]
        miss = now
        for back, c in enumerate(taps, 1):
            miss = miss - c * heard[:, len(taps) - back : len(taps) - back + size]
        score = miss.square().sum(-1)
        return score if rule.error == "l2" else score / (now.square().sum(-1) + 1e-6)

    def _bmojo(self, mixer: BMojo, i: int, u: Tensor, state: State, plan: _Plan) -> Tensor:
        config, prefix = self.config, f"layers.{i}"
        y = None if mixer.ssm is None else self._ssm(mixer.ssm, u, f"{prefix}.ssm", state)
        if config.n_eidetic:
            signal = y if y is not None and mixer.reads_ssm else u
            past = state[f"{prefix}.history"]
            heard = torch.cat([past, signal], dim=1)
            scores = self._scores(heard)
            state[f"{prefix}.history"] = heard[:, self.size :]
            ring = state[f"{prefix}.window.scores"]
            state[f"{prefix}.window.scores"] = _ring(ring[..., None], scores[..., None], plan)[..., 0]
        x = mixer._project(u, y)
        q, k = rotate(x.q, plan.at), rotate(x.k, plan.at)
        memories = [self._window(f"{prefix}.window", q, k, x.v, config.window, state, plan)]
        if config.fading_of(i) and x.k_fading is not None and x.v_fading is not None:
            q_fading, k_fading = rotate(x.q_fading, plan.at), rotate(x.k_fading, plan.at)
            memories.append(self._fading(f"{prefix}.fading", q_fading, k_fading, x.v_fading, state, plan))
        pinned = rotate(x.q, self.pinned) if config.n_sinks or config.n_eidetic else x.q
        if config.n_sinks:
            memories.append(self._sinks(f"{prefix}.sinks", pinned, x.k, x.v, state, plan))
        if config.n_eidetic:
            admitted = state[f"{prefix}.eidetic.admitted"][:, None]
            mask = _hidden_where(admitted <= plan.place[..., None], q)[:, None]
            memories.append(_Read(pinned, state[f"{prefix}.eidetic.k"], state[f"{prefix}.eidetic.v"], mask))
        return mixer.o_proj(_merge_heads(_attend(memories, self.scale)))


class Prefill(Decode):
    """`Decode` for a whole chunk: tokens (b, chunk), position a multiple of `chunk`."""

    def __init__(self, model: Model, scatters: bool = False) -> None:
        super().__init__(model, scatters)
        self.size = model.config.chunk_size


class Commit(Graph):
    """forward(position (b,)[, cos, sin (b, 1, p / 2)], *state) -> (choice (b, e) a layer..., *eidetic leaves).

    Rows at a multiple of `chunk` choose anew among their eidetic slots and the `chunk` oldest tokens of the window;
    other rows keep their slots. A choice lists candidates in order, slots first, then tokens, -1 = empty. Reads
    and returns only the leaves in `names` and `changed`.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        config = model.config
        self.layers = tuple(i for i, kind in enumerate(config.layer_types) if kind == "bmojo" and config.n_eidetic)
        self.changed = tuple(
            f"layers.{i}.eidetic.{leaf}" for i in self.layers for leaf in ("k", "v", "scores", "admitted")
        )
        read = tuple(f"layers.{i}.window.{leaf}" for i in self.layers for leaf in ("k", "v", "scores"))
        self.names = read + self.changed
        self.back = _constant_angles(config, config.window - np.arange(config.chunk_size))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names before the state's."""
        return ("position", *(("cos", "sin") if self.rotary else ()))

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        given, state = self._arguments(arguments)
        plan = self.plan(given)
        choices = [self.choose(i, state, plan) for i in self.layers]
        return (*choices, *(state[name] for name in self.changed))

    def choose(self, i: int, state: State, plan: _Plan) -> Tensor:
        """Layer i's choice (b, e); its leaves in `state` are replaced."""
        config, window, slots = self.config, f"layers.{i}.window", f"layers.{i}.eidetic"
        size, e, w = config.chunk_size, config.n_eidetic, config.window
        due = plan.position % size == 0
        offsets = torch.arange(size, dtype=torch.int32)
        held = ((plan.position + offsets) % w).long()  # (b, C) slots of the window's oldest tokens
        position = plan.position + offsets - w
        k, v = (_gathered(state[f"{window}.{leaf}"], held) for leaf in ("k", "v"))
        k = rotate(rotate(k, plan.at, inverse=True), self.back)  # back by the position, forth by the distance to it
        scores = torch.where(
            position >= config.n_sinks, state[f"{window}.scores"].gather(1, held), torch.full((), -1.0)
        )
        old = state[f"{slots}.scores"]
        scores = torch.cat([old, scores], dim=1)  # (b, n), -1 = not to be kept
        member = _best(scores, e)
        place = _running_count(member) - 1
        pick = torch.logical_and(member[:, None], place[:, None] == torch.arange(e)[:, None])
        pick = pick.to(scores.dtype)  # (b, e, n)
        admitted = torch.cat([torch.zeros_like(old), offsets.to(scores.dtype).expand(old.shape[0], -1)], dim=1)
        filled = pick.sum(-1) > 0
        new = {
            "k": pick[:, None] @ torch.cat([state[f"{slots}.k"], k], dim=2),
            "v": pick[:, None] @ torch.cat([state[f"{slots}.v"], v], dim=2),
            "scores": torch.where(filled, (pick * scores[:, None]).sum(-1), torch.full((), -1.0)),
            "admitted": torch.where(filled, (pick * admitted[:, None]).sum(-1), torch.full((), EMPTY)),
        }
        for leaf, value in new.items():
            before = state[f"{slots}.{leaf}"]
            state[f"{slots}.{leaf}"] = torch.where(due.view(-1, *(1,) * (value.dim() - 1)), value, before)
        index = torch.where(filled, (pick * torch.arange(e + size, dtype=scores.dtype)).sum(-1), torch.full((), -1.0))
        same = torch.where(old >= 0, torch.arange(e, dtype=scores.dtype), torch.full((), -1.0))
        return torch.where(due, index, same).to(torch.int32)


def _best(scores: Tensor, e: int) -> Tensor:
    """Which of scores (b, n) are among the e largest of those that are not negative, ties to the earlier: (b, n)."""
    n = scores.shape[1]
    mine, other = scores[:, :, None], scores[:, None]
    earlier = torch.from_numpy(np.tril(np.ones((n, n), bool), -1))
    ahead = torch.logical_or(other > mine, torch.logical_and(other == mine, earlier))
    return torch.logical_and(ahead.to(scores.dtype).sum(-1) < e, scores >= 0)


def _running_count(member: Tensor) -> Tensor:
    """How many of member (b, n) are true up to and with each column, as int32: a product, which runtimes all have."""
    n = member.shape[1]
    upto = torch.from_numpy(np.triu(np.ones((n, n), np.float32)))
    return (member.to(torch.float32) @ upto).to(torch.int32)


def _gathered(ring: Tensor, slots: Tensor) -> Tensor:
    """Slots (b, n) of a ring (b, g, w, p)."""
    return ring.gather(2, slots[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3]))


def _merge_heads(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


def _mamba(mixer: Mamba, u: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
    """Mamba-1 on T tokens u (b, T, d): as `Mamba.forward`, its scan in log2(T) doublings instead of T steps."""
    x, z = mixer.in_proj(u).chunk(2, dim=-1)
    conv = torch.cat([state.conv, x], dim=1)[:, x.shape[1] :]
    x = mixer.conv(x, state.conv)
    dt, B, C = mixer._steps(x)
    A, D = mixer._transition(dt.dtype)
    dt = F.softplus(dt + mixer.dt_proj.bias)
    decay = torch.exp(dt[..., None] * A)  # (b, T, d, n)
    s = (dt * x)[..., None] * B[:, :, None]
    first, size = s[:, :1] + decay[:, :1] * state.ssm[:, None], int(u.shape[1])
    s = torch.cat([first, s[:, 1:]], dim=1) if size > 1 else first  # Core ML has no empty arrays
    reach = 1
    while reach < size:  # after a pass, s holds what `2 reach` tokens left
        s = torch.cat([s[:, :reach], s[:, reach:] + decay[:, reach:] * s[:, :-reach]], dim=1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], dim=1)
        reach *= 2
    y = (s * C[:, :, None]).sum(-1) + D * x
    return mixer._out(y * F.silu(z)), MambaState(conv, s[:, -1])


def _feed_forward(block: Block, h: Tensor) -> Tensor:
    """The layer's MLP; of a mixture every expert runs, weighted by its share or by 0: which ones is no fixed shape."""
    if block.mlp is None or block.mlp_norm is None:
        return h
    x = block.mlp_norm(h).to(h.dtype)
    if not isinstance(block.mlp, MixtureOfExperts):
        return h + block.mlp(x)
    mixture = block.mlp
    shares = F.linear(x, mixture.router.weight).softmax(dim=-1)  # (b, T, experts)
    flat = shares.flatten(0, 1)
    chosen = _best(flat, mixture.per_token).view(shares.shape)
    shares = torch.where(chosen, shares, torch.zeros(()))
    return h + torch.stack([shares[..., n, None] * mixture.experts(x, n) for n in range(mixture.n)]).sum(0)


def _subtree(tree: Any, prefix: str) -> Any:
    """The part of a layers tuple that `layers.3.ssm` names."""
    for part in prefix.split(".")[1:]:
        tree = tree[int(part)] if part.isdigit() else getattr(tree, part)
    return tree


_NONE = torch.zeros(1, dtype=torch.int64)
_NO_STEP = Step(_NONE, _NONE, None, None, None, None, 0, False)  # state-space mixers only ask which rows are active


def fresh_state(config: Config, batch: int, names: tuple[str, ...] | None = None) -> State:
    """The state before the first token, float32."""
    spec = state_leaves(config)
    return {name: torch.full((batch, *spec[name].shape), spec[name].fill) for name in (names or spec)}
