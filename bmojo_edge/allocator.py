"""What the C library's allocator is told, so that memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import functools

MMAP_THRESHOLD, BYTES = -3, 2**18  # M_MMAP_THRESHOLD of glibc's malloc.h; 256 KiB


@functools.cache
def return_large_buffers() -> None:
    """Have glibc map each buffer of 256 KiB and more by itself; other C libraries are left as they are.

    Left alone glibc raises this limit with use, and buffers of a long text leave holes that add up to some per cent.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, BYTES)
