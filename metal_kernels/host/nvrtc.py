"""NVIDIA's run-time compiler, which needs no GPU: does the CUDA text of a kernel compile?"""

import ctypes
import ctypes.util
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from .cuda_source import OPTIONS
from .errors import CompileError
from .toolchain import INCLUDE


def unavailable_reason() -> str | None:
    """Why NVRTC cannot be used here, and what to do; None when it can."""
    return None if _library_path() else "NVRTC is not installed: pip install nvidia-cuda-nvrtc"


def compile_cuda(name: str, source: str, architecture: str = "sm_90") -> bytes:
    """The cubin of a CUDA text for a GPU architecture. Raises `CompileError` with NVRTC's log."""
    path = _library_path()
    if path is None:
        raise CompileError(f"{name}: {unavailable_reason()}")
    nvrtc = ctypes.CDLL(path)
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        options = [option.encode() for option in (*OPTIONS, f"-I{INCLUDE}", f"-arch={architecture}")]
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status:
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise CompileError(f"{name}: CUDA compilation\n{log.rstrip(bytes(1)).decode(errors='replace')[:6000]}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(get_size: Callable[..., int], get: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    get_size(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    get(program, content)
    return content.raw


@functools.cache
def _library_path() -> str | None:
    for folder in sys.path:
        found = sorted(Path(folder).glob("nvidia/*/lib/libnvrtc.so.*"))
        if found:
            return str(found[-1])
    return ctypes.util.find_library("nvrtc")
