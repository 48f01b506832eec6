"""Metal source runs on x86-64 Linux with clang 19. Elsewhere these tests are skipped; in CI there they fail instead."""

import os
import platform
import sys

import pytest

from metal_kernels.host import unavailable_reason


@pytest.fixture(scope="session")
def harness() -> None:
    """The harness works here."""
    reason = unavailable_reason()
    if reason is None:
        return
    could_be_installed = sys.platform == "linux" and platform.machine() == "x86_64"
    if os.environ.get("CI", "").lower() in ("1", "true") and could_be_installed:
        pytest.fail(f"CI must run the Metal kernels: {reason}")
    pytest.skip(reason)
