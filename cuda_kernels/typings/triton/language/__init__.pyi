"""Triton kernels have no useful types: everything is Any, whether Triton is installed or not."""

from typing import Any

def __getattr__(name: str) -> Any: ...
