"""The C++ runtime (native/), compiled on first use and bound with ctypes: buffers, a dispatch, its findings.

It runs one dispatch at a time. It knows nothing of MLX, or of how a kernel was compiled.
"""

import ctypes
import functools
import os
import re
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .errors import Finding, KernelError
from .toolchain import HERE, RUNTIME_FLAGS, cached, compile_with

Order = Literal["forward", "reverse", "shuffled"]
ORDERS: tuple[Order, ...] = ("forward", "reverse", "shuffled")

lock = threading.Lock()  # held from `reset` to the last look at the results


@dataclass(frozen=True)
class Statistics:
    """What the last dispatch did: fibre switches, accesses checked, bytes of threadgroup memory declared."""

    findings: int
    switches: int
    accesses: int
    threadgroup_bytes: int


@functools.cache
def runtime_library() -> Path:
    sources = sorted(str(path) for path in (HERE / "native").glob("*.cpp"))
    return cached("runtime", lambda output: compile_with([*RUNTIME_FLAGS, *sources, "-o", str(output)]))


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    library.msl_reset.restype = ctypes.c_bool
    library.msl_buffer.restype = ctypes.c_void_p
    library.msl_buffer.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, *[ctypes.c_int] * 4]
    library.msl_unwritten.restype = ctypes.c_size_t
    library.msl_unwritten.argtypes = [ctypes.c_uint32, ctypes.POINTER(ctypes.c_size_t)]
    library.msl_findings.restype = ctypes.c_char_p
    library.msl_kernel_base.restype = ctypes.c_uint64
    library.msl_dispatch.restype = ctypes.c_int
    library.msl_dispatch.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint32),
        *[ctypes.c_int] * 4,
        ctypes.c_uint64,
        ctypes.c_uint32,
    ]
    return library


class Dispatch:
    """One run of one kernel: buffers are added in the order of the parameters, then `run` is called once."""

    def __init__(self, kernel_library: Path, check: bool) -> None:
        self.library = kernel_library
        self.check = check
        self.addresses: list[int] = []
        if not _runtime().msl_reset():
            raise KernelError("cannot reserve 16 GiB of address space for the kernel's buffers (see ulimit -v)")

    def _buffer(self, name: str, nbytes: int, offset: int, itemsize: int, read_only: bool, written: bool) -> int:
        address = _runtime().msl_buffer(name.encode(), nbytes, offset, itemsize, read_only, written, self.check)
        if not address:
            raise KernelError(f"no room for buffer '{name}' of {nbytes} bytes")
        return address

    def add_input(self, name: str, content: bytes, first: int, itemsize: int, offset: int = 0) -> None:
        """A read-only buffer; the kernel gets the address `first` bytes into it. `offset`: from the page boundary."""
        address = self._buffer(name, len(content), offset, itemsize, True, True)
        ctypes.memmove(address, content, len(content))
        self.addresses.append(address + first)

    def add_output(self, name: str, shape: Sequence[int], dtype: np.dtype, init_value: float | None) -> np.ndarray:
        """A buffer of NaN, or of `init_value`; the array returned is a view of it, valid until the next dispatch."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        address = self._buffer(name, nbytes, 0, dtype.itemsize, False, init_value is not None)
        self.addresses.append(address)
        view = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address)).view(dtype).reshape(shape)
        if init_value is not None:
            view[...] = init_value
        return view

    def run(
        self,
        grid: Sequence[int],
        threadgroup: Sequence[int],
        *,
        order: Order,
        seed: int,
        workers: int,
        timeout_s: int,
        allow_divergence: bool,
    ) -> list[Finding]:
        """Runs the grid. `timeout_s` 0 runs it in this process, where a crash of the kernel is a crash."""
        kernel = ctypes.CDLL(str(self.library))
        status = _runtime().msl_dispatch(
            ctypes.cast(kernel.msl_entry, ctypes.c_void_p),
            (ctypes.c_void_p * len(self.addresses))(*self.addresses),
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*threadgroup),
            workers,
            self.check,
            ORDERS.index(order),
            allow_divergence,
            seed,
            timeout_s,
        )
        findings = self._findings()
        if status and not findings:
            findings.append(Finding("crash", "?", _ended(status)))
        return findings

    def unwritten(self, buffer: int) -> tuple[int, int]:
        """How many granules (elements, or 4 bytes of longer ones) nobody has written, and the first one's byte."""
        first = ctypes.c_size_t(0)
        count = _runtime().msl_unwritten(buffer, ctypes.byref(first))
        return count, first.value

    def statistics(self) -> Statistics:
        numbers = (ctypes.c_uint64 * 4)()
        _runtime().msl_statistics(numbers)
        return Statistics(*numbers)

    def _findings(self) -> list[Finding]:
        records = [line.split("\x1f") for line in _runtime().msl_findings().decode(errors="replace").splitlines()]
        places = _places(self.library, {int(pc, 16) for record in records for pc in record[1:3]})
        return [
            Finding(kind, places[int(pc, 16)], message.replace("{other}", places[int(other, 16)]))
            for kind, pc, other, message in records
        ]


def _ended(status: int) -> str:
    if status == -1:
        return "the child process that ran the kernel cannot be started or waited for"
    code = os.waitstatus_to_exitcode(status)
    return f"the kernel ended with signal {-code}" if code < 0 else f"the kernel ended with status {code}"


def _places(library: Path, pcs: set[int]) -> dict[int, str]:
    """Return addresses as "kernel.metal:12", or "kernel.metal:3 (from kernel.metal:12)" where 3 was inlined in 12."""
    base = _runtime().msl_kernel_base()
    wanted = sorted(pc for pc in pcs if pc)
    places = dict.fromkeys(pcs, "?")
    if not wanted:
        return places
    offsets = [hex(max(pc - base - 1, 0)) for pc in wanted]  # the call, not the instruction after it
    done = subprocess.run(["addr2line", "-a", "-i", "-e", str(library), *offsets], capture_output=True, text=True)
    frames: list[list[str]] = []
    for line in done.stdout.splitlines():
        if line.startswith("0x"):
            frames.append([])
        elif frames:
            frames[-1].append(re.sub(r" \(discriminator \d+\)$", "", line).rsplit("/", 1)[-1])
    for pc, stack in zip(wanted, frames, strict=False):
        inside = [frame for frame in stack if frame.startswith("kernel.metal:")]
        if len(inside) > 1 and inside[0] != inside[-1]:
            places[pc] = f"{inside[0]} (from {inside[-1]})"
        elif inside or stack:
            places[pc] = (inside or stack)[0]
    return places
