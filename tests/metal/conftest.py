"""Tests of the Metal kernels: their text runs on the host harness, see tests/metal_host."""

from tests.metal_host.conftest import harness

__all__ = ["harness"]
