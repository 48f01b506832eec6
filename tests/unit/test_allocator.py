"""Large buffers go back to the system."""

import subprocess
import sys

PROGRAM = """
import ctypes
from bmojo_edge.allocator import return_large_buffers

class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena ordblks smblks hblks hblkhd a b c d e".split()]

c = ctypes.CDLL(None)
if hasattr(c, "mallinfo2"):
    c.mallinfo2.restype, c.malloc.restype, c.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
    if {called}:
        return_large_buffers()
    c.free(c.malloc(2**22))  # after which glibc would serve the next one from its heap
    before = c.mallinfo2().hblks
    kept = c.malloc(2**20)
    print(c.mallinfo2().hblks - before)
else:
    return_large_buffers()
    print(int({called}))
"""


def mapped(called: bool) -> int:
    program = PROGRAM.replace("{called}", str(called))
    return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def test_each_is_mapped_by_itself() -> None:
    assert mapped(called=True) == 1
    assert mapped(called=False) == 0
