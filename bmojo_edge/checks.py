"""Checks of single fields, and the error that names the field. It knows nothing of what the fields mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NoReturn, TypeVar

_T = TypeVar("_T")


class ConfigError(ValueError):
    """A field of a configuration is missing, unknown or out of range; the message names it."""


def fail(field: str, message: str) -> NoReturn:
    """Raise ConfigError for `field`."""
    raise ConfigError(f"{field}: {message}")


def check_int(field: str, value: object, minimum: int) -> None:
    """An integer of at least `minimum`; booleans are not integers here."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(field, f"must be an integer, got {value!r}")
    if value < minimum:
        fail(field, f"must be at least {minimum}, got {value}")


def check_number(field: str, value: object, above: float) -> None:
    """A finite number greater than `above`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        fail(field, f"must be a finite number, got {value!r}")
    if value <= above:
        fail(field, f"must be greater than {above}, got {value}")


def check_bool(field: str, value: object) -> None:
    """True or False, nothing that merely counts as one."""
    if not isinstance(value, bool):
        fail(field, f"must be true or false, got {value!r}")


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """One of `choices`."""
    if value not in choices:
        fail(field, f"must be one of {', '.join(choices)}, got {value!r}")


def table(cls: type[_T], field: str, value: object) -> _T:
    """A nested table from its dataclass or its mapping; unknown keys are refused by name."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        fail(field, f"must be a table, got {value!r}")
    names = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in value:
        if key not in names:
            fail(f"{field}.{key}", f"is not a known field; known are {', '.join(sorted(names))}")
    return cls(**value)
