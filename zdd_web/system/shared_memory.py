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

#: The same on Linux, macOS and the BSDs; Python's mmap module does not have it.
_MAP_FIXED = 0x10


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
    if length:
        try:
            _map_again(address + offset, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
        except OSError as error:
            raise OSError(error.errno, f"shared memory cannot be made read-only: {error.strerror}") from None


def write_to_a_copy(memory: memoryview, start: int, size: int) -> None:
    """Have what this process writes to a range of shared memory go to private pages from now on. Raises OSError.

    The addresses stay, because closures that run on every request hold the memory itself.

    >>> with mmap.mmap(-1, mmap.PAGESIZE) as shared:
    ...     view = memoryview(shared)
    ...     write_to_a_copy(view, 0, 8)
    ...     view[0] = 7  # no other process sees it
    ...     view.release()
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + start
    first = address - address % mmap.PAGESIZE
    length = -(-(address + size - first) // mmap.PAGESIZE) * mmap.PAGESIZE
    content = ctypes.string_at(first, length)
    _map_again(first, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    ctypes.memmove(first, content, length)


def _map_again(address: int, length: int, protection: int, flags: int, fd: int, offset: int) -> None:
    """Put other pages in the place of those at an address; all of it is a multiple of the page size."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    if libc.mmap(address, length, protection, flags | _MAP_FIXED, fd, offset) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
