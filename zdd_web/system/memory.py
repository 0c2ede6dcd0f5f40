"""Shared memory that its maker writes and that other processes can only read.

Theory of operation
-------------------
A memfd is mapped writable once, by its maker, and sealed at once. From then on its size is fixed, so no process can
have a reader end by SIGBUS, and F_SEAL_FUTURE_WRITE keeps everybody else from mapping or writing it, whatever
descriptor they hold and however they reopen it. The mapping that is there already stays writable.

A child inherits that mapping over fork. `make_read_only()` maps the same pages again at the same addresses, so every
view of the memory stays valid. `mprotect` alone could be taken back by the process itself; a read-only mapping of a
sealed memfd cannot: the kernel clears VM_MAYWRITE for it (mm/shmem.c, shmem_mmap). Pages that the child shall go on
writing are left out: once they are gone there is no way to get them back.

Kernels before 5.1 do not know F_SEAL_FUTURE_WRITE. There the pages are read-only as well, for code that does not try.
"""

from __future__ import annotations

import ctypes
import mmap
import os

F_ADD_SEALS = 1033
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10

_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


def create(name: str, size: int) -> tuple[int, mmap.mmap]:
    """Make a sealed memfd of `size` bytes; return its descriptor and the only writable mapping. Raises OSError."""
    import fcntl  # which Windows does not have; nor does it have memfds

    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size)
        size_seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL
        try:
            fcntl.fcntl(fd, F_ADD_SEALS, size_seals | F_SEAL_FUTURE_WRITE)
        except OSError:  # a kernel before 5.1
            fcntl.fcntl(fd, F_ADD_SEALS, size_seals)
    except BaseException:
        os.close(fd)
        raise
    return fd, mapping


def address_of(mapping: mmap.mmap) -> int:
    """Return where a writable mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def make_read_only(address: int, offset: int, length: int, fd: int) -> None:
    """Replace `length` bytes at `offset` of the mapping that begins at `address` by a read-only one, for good.

    `fd` is the memfd; all three numbers are multiples of the page size. Raises OSError.
    """
    if not length:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if libc.mmap(address + offset, length, mmap.PROT_READ, flags, fd, offset) == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"shared memory cannot be made read-only: {os.strerror(error)}")
