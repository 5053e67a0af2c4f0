"""Confines the process that calls it, for good: files, processes, signals, network, memory, time.

Linux alone knows Landlock (files) and seccomp (system calls); neither needs privileges. Elsewhere only the limits of
resources hold.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

FILE_SIZE = 16 << 20  # bytes of each file that is written
OPEN_FILES = 64

# System calls by number on (x86-64, aarch64); None where a machine does not have it.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157),
    "setpgid": (109, 154), "unshare": (272, 97), "setns": (308, 268), "prctl": (157, 167),
    # signals and the memory of other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "process_madvise": (440, 440), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # limits and priorities, also of other processes
    "setrlimit": (160, 164), "prlimit64": (302, 261), "setpriority": (141, 140), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    # network, and what outlives the process
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "io_uring_setup": (425, 425), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218),
    # the kernel
    "mount": (165, 40), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
# Allowed where (argument & mask) == value: threads of this process, and pairs of stream sockets (asyncio needs one).
_CONDITIONS = {"clone": ((56, 220), 0, 0x10000, 0x10000), "socketpair": ((53, 199), 1, 0xF, 1)}
_CLONE3 = 435  # refused as unknown: the C library then takes `clone`
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_NO_NEW_PRIVILEGES, _SECCOMP, _DEATH_SIGNAL, _DUMPABLE = 38, 22, 1, 4  # of prctl
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ, _READ_WRITE = 0b1100, 0x7FFE  # without execution: bit 0


def limit_resources(seconds: int, memory_mb: int) -> None:
    """Limits processor time, address space, file sizes and open files of this process.

    Args:
        seconds: of processor time; then the process is killed.
        memory_mb: of address space; then it gets MemoryError.
    """
    for kind, amount in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # a system without that limit, or with a lower one
            resource.setrlimit(kind, (amount, amount))


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def confine(folder: Path) -> list[str]:
    """Confines this process to computing and to `folder`; returns what could not be confined.

    The process may still read Python's own files. It starts no processes, sends no signals, opens no connections and reads no
    other process, also where it runs as root.

    Args:
        folder: the folder that it may write.
    """
    failed = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_DUMPABLE, 0, 0, 0, 0)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        libc.capset(
            ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0)), bytes(24)
        )  # root without capabilities
        if not _restrict_files(libc, folder):
            failed.append("files")
        if not _filter_calls(libc):
            failed.append("system calls")
    else:
        failed = ["files", "system calls"]
    if "system calls" in failed:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    return failed


def _python_folders() -> Iterable[str]:
    """Returns the folders that imports need: Python's, and the system's libraries."""
    own = (sys.prefix, sys.base_prefix)
    under = lambda path: any(Path(path).is_relative_to(prefix) for prefix in own)
    yield from (path for path in sys.path if path and under(path))
    yield from (str(Path(prefix) / name) for prefix in own for name in ("lib", "lib64", "bin"))
    yield from ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom")


def _restrict_files(libc: ctypes.CDLL, folder: Path) -> bool:
    """Allows Landlock's file accesses in some folders alone; returns whether the kernel can."""
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = {1: 0x1FFF, 2: 0x3FFF}.get(version, 0x7FFF)
    rules = libc.syscall(_LANDLOCK_CREATE, struct.pack("Q", handled), ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    rights_of = dict.fromkeys(_python_folders(), _READ) | {os.devnull: _READ_WRITE, str(folder): _READ_WRITE}
    for path, rights in rights_of.items():
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            rights &= 0x4006  # a file has no entries: write, read, truncate
        libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights & handled, opened), 0)
        os.close(opened)
    restricted = libc.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return restricted


def _filter_calls(libc: ctypes.CDLL) -> bool:
    """Denies system calls by a seccomp filter; returns whether the kernel can."""
    if platform.machine() not in _MACHINES:
        return False
    column, architecture = _MACHINES[platform.machine()]
    load, equal, at_least, mask, done = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, kill, denied, unknown = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM, ENOSYS
    # Each instruction: code, jump if true, jump if false, constant. Loads: 4 the architecture, 0 the number.
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (done, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (done, 0, 0, denied)]  # the x32 calls of x86-64
    program += [(equal, 0, 1, _CLONE3), (done, 0, 0, unknown)]
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            program += [(equal, 0, 1, number), (done, 0, 0, denied)]
    for numbers, argument, bits, value in _CONDITIONS.values():
        program += [(equal, 0, 5, numbers[column]), (load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]
        program += [(equal, 0, 1, value), (done, 0, 0, allow), (done, 0, 0, denied)]
    program.append((done, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    whole = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(_SECCOMP, 2, ctypes.create_string_buffer(whole), 0, 0) == 0)
