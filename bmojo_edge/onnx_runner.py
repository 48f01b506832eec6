"""Runs an ONNX export: the constant-size state through onnxruntime, on any execution provider it has.

`OnnxModel` has the face of `engine.LM`, so `be.stream`, `be.generate` and `Session` take it. A state is that of
state.py, a value whose arrays live on the provider's device (onnx_state.py) once a step has read them; a caller may
give NumPy's. A step runs when its logits or its state are looked at: by then a caller who goes on has let go of the
state before, whose rings are then written where they are. Needs onnxruntime, NumPy and a tokenizer, neither PyTorch
nor MLX. The folder's format: docs/export.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors.numpy import load_file

from bmojo_edge import tokenizer
from bmojo_edge.config import Config, ConfigError
from bmojo_edge.onnx_state import Buffers, Leaf, Logits, Step
from bmojo_edge.state import BMojoState, State, leaves, map_leaves, state_spec
from bmojo_edge.tensors import CheckpointError, read_json
from bmojo_edge.tokenizer import Tokenizer

FORMAT, VERSION = "bmojo-edge onnx", 1
MANIFEST, SELF_TEST = "manifest.json", "self_test.safetensors"
ON_HOST = ("eidetic.positions", "eidetic.scores")  # of a state; everything else stays on the device


class SelfTest(NamedTuple):
    """How an export did on the tokens recorded with it."""

    error: float  # RMS of the difference over RMS of the recorded logits
    agree: float  # share of positions with the same likeliest token


class OnnxModel:
    """An exported model. NumPy takes its logits and the arrays of its states; a call leaves its state as it was."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], config: Config, sessions: Mapping[str, Any]) -> None:
        self.folder, self.manifest, self.config = folder, manifest, config
        self.tokenizer: Tokenizer | None = None
        self.fingerprint: str = manifest["weights"]
        self._sessions = dict(sessions)
        self._graphs = manifest["graphs"]
        self._base, self._period = manifest["position"]["base"], manifest["position"]["period"]
        self._fill = {x["name"]: x["fill"] for x in manifest["state"]}
        self._names = [name for name, _ in leaves(state_spec(config).layers, "layers")]
        self._buffers = Buffers(_device(next(iter(sessions.values()))))
        turns = manifest["turns"]
        self._turns = None if turns is None else np.array([int(turn) for turn in turns], np.uint64)

    @classmethod
    def load(cls, path: str | Path, providers: Sequence[str] | None = None, threads: int = 0) -> Self:
        """Open an export folder.

        providers: execution providers of onnxruntime, best first, None = those it prefers here; threads: of one
        operation, 0 = as many as there are cores. Raises CheckpointError naming the file and what is wrong with it.
        """
        folder = Path(path)
        if importlib.util.find_spec("onnxruntime") is None:
            raise CheckpointError("onnxruntime is not installed: pip install 'bmojo-edge[onnx]'")
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder / MANIFEST}: file is missing, so this is no ONNX export")
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            found = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
            raise CheckpointError(f"{folder / MANIFEST}: is {found}, this program reads {FORMAT!r} version {VERSION}")
        try:
            config = Config.from_json(manifest["config"])
            model = cls(folder, manifest, config, _open(folder, manifest["graphs"], providers, threads))
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / MANIFEST}: {error}") from None
        if any((folder / name).is_file() for name in tokenizer.FILES):
            model.tokenizer = Tokenizer.load(folder)
        return model

    # --- the face of engine.LM ----------------------------------------------------------------------------------------

    def init_state(self, batch: int = 1, offset: int = 0) -> State:
        """A fresh state; rotation counts from `offset`."""
        state = map_leaves(lambda leaf: np.full(leaf.shape, leaf.fill, leaf.dtype), state_spec(self.config, batch))
        return state._replace(offset=state.offset + offset)

    def prefill(self, tokens: Any, state: State, lengths: Any = None) -> tuple[np.ndarray, State]:
        """Logits (b, v) of each row's last real token of tokens (b, t), right-padded to lengths (b,), and the state.

        Whole chunks where all rows stand at the beginning of one, single tokens elsewhere.
        """
        tokens = np.asarray(tokens, np.int32)
        b, t = tokens.shape
        lengths = np.full(b, t) if lengths is None else np.asarray(lengths, np.int64)
        if lengths.shape != (b,) or (lengths < 0).any() or (lengths > t).any():
            raise ValueError(f"lengths: must be {b} numbers from 0 to {t}, got {lengths.tolist()}")
        last, chunk, at = np.zeros((b, self.config.vocab_size), np.float32), self.config.chunk_size, 0
        while at < t:
            whole = at + chunk <= lengths.min() and not (state.position % chunk).any()
            size = chunk if whole else 1
            active = lengths > at
            if not active.any():
                break
            logits, state = self._move(tokens[:, at : at + size], state, None if active.all() else active)
            last = np.where(active[:, None], logits, last)
            at += size
        return last, state

    def decode_one_token(self, token: Any, state: State, active: Any = None) -> tuple[Logits | np.ndarray, State]:
        """Logits (b, v) after one token (b,) of each row, and the state; rows not `active` keep theirs, logits 0."""
        tokens = np.asarray(token, np.int32)[:, None]
        return self._move(tokens, state, None if active is None else np.asarray(active, bool))

    # --- graphs -------------------------------------------------------------------------------------------------------

    def _move(self, tokens: np.ndarray, state: State, active: np.ndarray | None) -> tuple[Logits | np.ndarray, State]:
        """Logits and state after tokens (b, 1) or (b, chunk) of the `active` rows, None = all."""
        old, size = state, tokens.shape[1]
        if "commit" in self._graphs and not (state.position % self.config.chunk_size).all():
            state = self._commit(state)
        step, layers = self._step("decode" if size == 1 else "prefill", {"tokens": tokens}, state, size)
        logits = Logits(step)
        if active is None:
            return logits, State(layers, old.position + size, old.offset)
        layers = map_leaves(lambda new, before: _chosen(active, new, before), layers, old.layers)
        return np.where(active[:, None], logits, 0), State(layers, old.position + size * active, old.offset)

    def _commit(self, state: State) -> State:
        """The state with its eidetic slots chosen anew in rows that stand at the beginning of a chunk."""
        step, layers = self._step("commit", {}, state, 1)
        said, chosen = step.said(), []
        leaving = state.position[:, None] - self.config.window + np.arange(self.config.chunk_size)
        for i, layer in enumerate(layers):
            if f"choice.{i}" in said:
                choice = said[f"choice.{i}"]  # (b, e) candidates: slots, then the window's oldest tokens; -1 = empty
                among = np.concatenate([layer.eidetic.positions, leaving], axis=1)
                positions = np.where(choice < 0, -1, np.take_along_axis(among, np.maximum(choice, 0), axis=1))
                scores = np.where(choice < 0, 0, said[f"new.layers.{i}.eidetic.scores"])
                layer = layer._replace(eidetic=layer.eidetic._replace(positions=positions, scores=scores))
            chosen.append(layer)
        return state._replace(layers=tuple(chosen))

    def _step(self, graph: str, given: dict[str, np.ndarray], state: State, size: int) -> tuple[Step, tuple[Any, ...]]:
        """A call of a graph with `size` tokens, to be run when it is looked at, and the layers' states after it."""
        found = dict(zip(self._names, (leaf for _, leaf in leaves(state.layers)), strict=True))
        held = {
            name: leaf if isinstance(leaf, Leaf) else self._buffers.filled(leaf)
            for name, leaf in found.items()
            if not name.endswith(ON_HOST)
        }
        given = given | self._place(state, size) | self._slots(state)
        step = Step(self._sessions[graph], self._graphs[graph], given, held, self._buffers)
        values = iter((found | held | step.leaves()).values())
        return step, map_leaves(lambda _: next(values), state.layers)

    def _place(self, state: State, size: int) -> dict[str, np.ndarray]:
        """Position as the graphs take it, and the angles of `size` tokens from it."""
        position = state.position
        wrapped = np.where(position < self._base, position, self._base + (position - self._base) % self._period)
        given = {"position": wrapped.astype(np.int32)}
        if self._turns is not None:
            at = (position + state.offset)[:, None] + np.arange(size)
            turn = (at.astype(np.uint64)[..., None] * self._turns).view(np.int64) * (2 * np.pi / 2.0**64)
            given |= {"cos": np.cos(turn).astype(np.float32), "sin": np.sin(turn).astype(np.float32)}
        return given

    def _slots(self, state: State) -> dict[str, np.ndarray]:
        """Eidetic slots as the graphs take them: no positions, but from which place of the running chunk on to see."""
        given, begin = dict[str, np.ndarray](), state.position - state.position % self.config.chunk_size
        for i, layer in enumerate(state.layers):
            if not isinstance(layer, BMojoState) or not layer.eidetic:
                continue
            slots, name = layer.eidetic, f"layers.{i}.eidetic"
            place = np.maximum(slots.positions + self.config.window - begin[:, None], 0)
            for leaf, value in (("admitted", place), ("scores", slots.scores)):
                fill = self._fill[f"{name}.{leaf}"]
                given[f"{name}.{leaf}"] = np.where(slots.positions < 0, fill, value).astype(np.float32)
        return given


def _chosen(active: np.ndarray, new: Any, old: Any) -> Any:
    """A leaf with the rows of `new` where active and of `old` elsewhere."""
    if new is old:
        return old
    a, b = np.asarray(new), np.asarray(old)
    return np.where(active.reshape(-1, *(1,) * (a.ndim - 1)), a, b)


def _device(session: Any) -> str:
    """Where the first provider keeps its arrays, as onnxruntime names it."""
    return {"CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}.get(session.get_providers()[0], "cpu")


def _open(folder: Path, graphs: Mapping[str, Any], providers: Sequence[str] | None, threads: int) -> dict[str, Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    known = ort.get_available_providers()
    for name in providers or ():
        if name not in known:
            raise CheckpointError(f"provider {name!r}: this onnxruntime has {', '.join(known)}")
    sessions = {}
    for name, graph in graphs.items():
        path = folder / graph["file"]
        if not path.is_file():
            raise CheckpointError(f"{path}: file is missing")
        try:
            sessions[name] = ort.InferenceSession(str(path), options, providers=list(providers or known))
        except Exception as error:  # onnxruntime raises classes of its own
            raise CheckpointError(f"{path}: onnxruntime cannot open it ({str(error)[:300]})") from None
    return sessions


def self_test(model: OnnxModel) -> SelfTest:
    """Run the recorded tokens, in chunks and one by one, and compare with the recorded logits."""
    path = model.folder / SELF_TEST
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing")
    found = load_file(path)
    tokens, wanted = found["tokens"][None], found["logits"].astype(np.float64)
    state, got = model.init_state(), []
    at = 0
    for position in found["positions"]:
        logits, state = model.prefill(tokens[:, at : position + 1], state)
        got.append(logits[0].astype(np.float64))
        at = position + 1
    difference = np.stack(got) - wanted
    error = float(np.sqrt(np.mean(difference**2) / np.mean(wanted**2)))
    return SelfTest(error, float((np.stack(got).argmax(-1) == wanted.argmax(-1)).mean()))
