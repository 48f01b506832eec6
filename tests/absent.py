"""What to do where something a test needs is not installed: skip on a developer's machine, fail in CI."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def absent(what: str, reason: str, *, expected: bool = True) -> NoReturn:
    """Skip `what` for `reason`; in CI fail, if setup is `expected` to install it there."""
    if expected and os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI must run {what}: {reason}")
    pytest.skip(reason, allow_module_level=True)
