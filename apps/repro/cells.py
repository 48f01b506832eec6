"""What the comparison runs: cells, each one model on one task with one recipe, and stages of them by importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from apps.repro.models import MODELS, config_of, matching_state, memory_bytes
from apps.repro.tasks import TASKS

RATES = (1e-3, 3e-3, 1e-2)
POSITIONS = {"bmojo": (False, True), "bmojo-f": (False, True), "hybrid": (False, True)}  # rotary or none
WINDOW, EIDETIC, STATE = 32, 128, 16
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model on one task with one recipe: what a row of the results is about."""

    model: str
    pairs: int
    lr: float
    seed: int = 0
    task: str = "mqar"
    seq_len: int = 256
    d_model: int = 64
    window: int = WINDOW
    n_eidetic: int = EIDETIC
    d_state: int = STATE
    expand: int = 2
    rotary: bool = False  # positions in B'MOJO and the hybrid; Transformers always have them, Mamba never
    ssm_lr: float = 1.0
    train: int = 20_000  # examples of an epoch
    epochs: int = 32  # at most
    fresh: bool = True  # an epoch's examples were in none before it
    batch: int = 128
    options: tuple[tuple[str, Any], ...] = field(default=())  # B'MOJO's own fields

    def sizes(self) -> dict[str, Any]:
        """The keyword arguments of `config_of` that do not name the state."""
        vocab = TASKS[self.task].vocab_size
        found = {"d_model": self.d_model, "window": self.window, "n_eidetic": self.n_eidetic}
        return {"vocab_size": vocab, **found, **{name: _table(value) for name, value in self.options}}

    def key(self) -> Row:
        """The fields that make a row this cell's."""
        found = {**asdict(self), "options": {name: _table(value) for name, value in self.options}}
        return {**found, "n_eidetic": self.n_eidetic if self.model == "bmojo" else 0}


def _table(value: Any) -> Any:
    """A value of `options`; tables are tuples of pairs there, to be hashable."""
    return dict(value) if isinstance(value, tuple) else value


def _best_row(rows: Iterable[Row], like: Cell, all_positions: bool) -> Row | None:
    """Of seed 0 of a cell, the row with the best learning rate and positions; None until all have been tried.

    all_positions: whether both with and without must have been.
    """
    free = ("lr", "rotary", "seed", "train", "epochs", "batch", "fresh")
    fields = {name: value for name, value in like.key().items() if name not in free}
    tried = [row for row in rows if row["seed"] == 0 and all(row[name] == fields[name] for name in fields)]
    positions = POSITIONS.get(like.model, (False,)) if all_positions else {row["rotary"] for row in tried}
    if not tried or not {(row["lr"], row["rotary"]) for row in tried}.issuperset(product(RATES, positions)):
        return None
    return max(tried, key=lambda row: (row["accuracy"], -row["steps"]))


def _arguments(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in cell.__dataclass_fields__}


def changed(cells: Iterable[Cell], **changes: Any) -> list[Cell]:
    """Cells with other values in some fields."""
    return [Cell(**{**_arguments(cell), **changes}) for cell in cells]


def _models(pairs: int, d_model: int, **more: Any) -> list[Cell]:
    """Every model at one difficulty, with and without positions."""
    cells = [Cell(model, pairs, RATES[0], d_model=d_model, **more) for model in reversed(MODELS)]
    return [
        other for cell in cells for at in POSITIONS.get(cell.model, (False,)) for other in changed([cell], rotary=at)
    ]


def _enlarged(rows: Iterable[Row], pairs: int, d_model: int, **more: Any) -> list[Cell]:
    """SSM and hybrids with B'MOJO's memory, with the positions that were best at the usual size."""
    cells = [Cell(model, pairs, RATES[0], d_model=d_model, **more) for model in ("mamba", "bmojo-f", "hybrid")]
    return [_equal_memory(cell) for cell in _placed(rows, cells)]


def _placed(rows: Iterable[Row], cells: Iterable[Cell]) -> list[Cell]:
    """Cells, each with the positions that its model did better with over 16, 32 and 64 pairs at width 64.

    Nothing of a model before all of that has been run.
    """
    rows, found = list(rows), []
    for cell in dict.fromkeys(changed(cells, rotary=False)):
        worth = {}
        for at in POSITIONS.get(cell.model, ()):
            of = [row for row in rows if row["rotary"] == at]
            best = [_best_row(of, Cell(cell.model, pairs, 0), all_positions=False) for pairs in (16, 32, 64)]
            if all(best):
                worth[at] = sum(row["accuracy"] for row in best if row)
        if len(worth) == len(POSITIONS.get(cell.model, ())):
            found += changed([cell], rotary=bool(worth) and max(worth, key=worth.__getitem__))
    return found


def _equal_memory(cell: Cell) -> Cell:
    whole = config_of("bmojo", d_state=STATE, **cell.sizes())
    budget = memory_bytes(whole, cell.seq_len)["total"]
    (found,) = changed([cell], **matching_state(cell.model, budget, cell.seq_len, **cell.sizes()))
    return found


def _rates(cells: Iterable[Cell]) -> list[Cell]:
    return [other for cell in cells for lr in RATES for other in changed([cell], lr=lr)]


def _tried(rows: Iterable[Row], cells: Iterable[Cell], all_positions: bool = True) -> list[Cell]:
    """The best of each model that has been tried with all learning rates and, or with some, positions."""
    rows = list(rows)
    best = [(cell, _best_row(rows, cell, all_positions)) for cell in cells]
    found = [other for cell, row in best if row for other in changed([cell], lr=row["lr"], rotary=row["rotary"])]
    return list(dict.fromkeys(found))  # one, however many positions it was asked for


def _seeds(cells: Iterable[Cell]) -> list[Cell]:
    return [other for seed in (1, 2) for other in changed(cells, seed=seed)]


def stage_recall(rows: Iterable[Row]) -> list[Cell]:
    """64 pairs, width 64: every model, learning rate, with and without positions."""
    return _rates(_models(64, 64))


def stage_easy(rows: Iterable[Row]) -> list[Cell]:
    """16 and 32 pairs, width 64."""
    return [cell for pairs in (16, 32) for cell in _rates(_models(pairs, 64))]


def stage_seeds(rows: Iterable[Row]) -> list[Cell]:
    """Two more seeds at the best learning rate, 64 pairs."""
    return _seeds(_tried(rows, _models(64, 64)))


def stage_memory(rows: Iterable[Row]) -> list[Cell]:
    """SSM, hybrid and B'MOJO-F with as much memory as B'MOJO."""
    return [cell for pairs in (32, 64, 16) for cell in _rates(_enlarged(rows, pairs, 64))]


def stage_choices(rows: Iterable[Row]) -> list[Cell]:
    """What the choices of B'MOJO are worth: innovation signal, error, taps, fading length, chunk, SSM learning rate."""
    best = _tried(rows, [Cell("bmojo", 64, RATES[0])])
    innovations: list[dict[str, Any]] = [{"signal": "input"}, {"error": "l2"}, *({"taps": n} for n in (1, 2, 8))]
    changes: list[dict[str, Any]] = [{"options": (("chunk", 16),)}]  # first: small chunks are slow
    changes += [{"options": (("innovation", tuple(sorted(x.items()))),)} for x in innovations]
    changes += [{"options": (("n_fading", n),)} for n in (1, 16, 64)]
    changes += [{"options": (("chunk", 8),)}, *({"ssm_lr": ratio} for ratio in (0.2, 5.0))]
    return [other for change in changes for other in changed(best, **change)]


def stage_easy_seeds(rows: Iterable[Row]) -> list[Cell]:
    """Two more seeds at the best learning rate, 32 and 16 pairs."""
    models = [Cell(model, pairs, RATES[0]) for pairs in (32, 16) for model in ("bmojo", "bmojo-f", "hybrid", "mamba")]
    return _seeds(_tried(rows, models))


def stage_wide(rows: Iterable[Row]) -> list[Cell]:
    """64 pairs, width 128."""
    return _rates(_placed(rows, _models(64, 128)))


def stage_slots(rows: Iterable[Row]) -> list[Cell]:
    """Recall against the number of eidetic slots, 64 and 32 pairs, the two lower learning rates."""
    best = [cell for pairs in (64, 32) for cell in _tried(rows, [Cell("bmojo", pairs, RATES[0])])]
    return [other for n in (64, 32, 96, 16, 192) for lr in RATES[:2] for other in changed(best, n_eidetic=n, lr=lr)]


def stage_longer(rows: Iterable[Row]) -> list[Cell]:
    """64 pairs, four times as many steps: those that stay at chance, and B'MOJO's worst seed."""
    best = _tried(rows, [Cell(model, 64, RATES[0]) for model in ("bmojo", "bmojo-f", "hybrid", "mamba")])
    return [
        other
        for cell in best
        for other in changed([cell], epochs=4 * cell.epochs, seed=1 if cell.model == "bmojo" else 0)
    ]


def stage_long(rows: Iterable[Row]) -> list[Cell]:
    """Beyond the paper: 512 tokens."""
    return _rates(_placed(rows, _models(64, 64, seq_len=512)))


def stage_reach(rows: Iterable[Row]) -> list[Cell]:
    """How far back B'MOJO-F answers by its fading length; small enough for a CPU: 64 tokens, window 8."""
    like = Cell("bmojo-f", 4, RATES[1], seq_len=64, window=8, rotary=True)
    return [other for n in (8, 4, 16) for other in changed([like], options=(("n_fading", n),))]


def stage_wide_seeds(rows: Iterable[Row]) -> list[Cell]:
    """Two more seeds at width 128."""
    return _seeds(_tried(rows, _placed(rows, _models(64, 128)), all_positions=False))


def stage_wide_easy(rows: Iterable[Row]) -> list[Cell]:
    """16 and 32 pairs, width 128."""
    return [cell for pairs in (16, 32) for cell in _rates(_placed(rows, _models(pairs, 128)))]


def stage_wide_memory(rows: Iterable[Row]) -> list[Cell]:
    """As much memory as B'MOJO at width 128."""
    return [cell for pairs in (64, 32, 16) for cell in _rates(_enlarged(rows, pairs, 128))]


def stage_others(rows: Iterable[Row]) -> list[Cell]:
    """Selective copying, induction heads, noisy and fuzzy recall."""
    pairs = {"selective_copying": 16, "induction_heads": 1, "noisy_recall": 32, "fuzzy_recall": 16}
    return [cell for task, n in pairs.items() for cell in _rates(_placed(rows, _models(n, 64, task=task)))]


STAGES: dict[str, Callable[[Iterable[Row]], list[Cell]]] = {
    "recall": stage_recall,
    "easy": stage_easy,
    "seeds": stage_seeds,
    "memory": stage_memory,
    "choices": stage_choices,
    "easy-seeds": stage_easy_seeds,
    "wide": stage_wide,
    "slots": stage_slots,
    "longer": stage_longer,
    "long": stage_long,
    "wide-seeds": stage_wide_seeds,
    "wide-easy": stage_wide_easy,
    "wide-memory": stage_wide_memory,
    "others": stage_others,
    "reach": stage_reach,
}
