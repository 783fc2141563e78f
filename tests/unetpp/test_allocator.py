import subprocess
import sys

import pytest

SEEN = """
import ctypes
import numpy as np
from unetpp import allocator

class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Counts
{told}
learned = np.ones(24 << 20, np.uint8)
del learned  # freed once: from now on glibc, left alone, keeps arrays up to this size
before = mallinfo().hblkhd
array = np.ones(8 << 20, np.uint8)
print((mallinfo().hblkhd - before) >> 20)
"""


@pytest.mark.parametrize(
    ("told", "mapped_mib"),
    [("", 0), ("allocator.return_large_arrays()", 8), ("allocator.keep_freed_memory()", 0)],
    ids=["left alone", "return_large_arrays", "keep_freed_memory"],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tells glibc, which is Linux's")
def test_large_arrays_have_pages_of_their_own_where_they_are_to_be_returned(told: str, mapped_mib: int) -> None:
    done = subprocess.run([sys.executable, "-c", SEEN.format(told=told)], capture_output=True, text=True, check=True)

    assert int(done.stdout) == mapped_mib
