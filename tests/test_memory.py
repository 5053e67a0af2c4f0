"""Freed memory is kept: using it again costs no page faults. Each case is a process, since the setting is the process's."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys, threading
from rlaif_jax.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def use():
    place = libc.malloc(100 << 20)
    libc.memset(place, 1, 100 << 20)
    libc.free(place)

def faults():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
faults()
thread = threading.Thread(target=faults)
thread.start()
thread.join()
print(*found)
"""


def page_faults(case: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, case], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_that_was_freed_is_used_again_in_every_thread():
    assert max(page_faults("kept")) < 100
    assert min(page_faults("default")) > 1000, "otherwise the setting is not needed"
