"""SO_REUSEPORT: several sockets on one port, of one master or of two that know nothing of each other.

Theory of operation
-------------------
The kernel keeps the listening sockets of one address in an array, a *group*, and chooses one of them for each new
connection: by a hash, or by the classic BPF program that any member may attach, which returns an index. What waits in a
member's queue, and the handshakes that began with it, are reset when it closes. So a master that leaves a group which
others stay in

1. attaches a program that chooses among the others only: it gets nothing new (`steer_to_range`);
2. waits until the handshakes that were under way are over (`handshakes`), and its workers have accepted all;
3. closes, with a program in force that names one of the others before and after each close (`closing_indices`).

None of this needs a privilege. The facts it stands on, all measured: the index is the order of listen(); a close moves
the *last* member into the hole; an index past the end has the kernel hash over all members; a program belongs to the
group and outlives the process that attached it, so a master that joins detaches any leftover
program, and a master that is leaving re-attaches its own on every tick.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")

SO_ATTACH_REUSEPORT_CBPF = 51
SO_DETACH_REUSEPORT_BPF = 68

#: An "address" that loads a random number instead of the packet (SKF_AD_OFF + SKF_AD_RANDOM).
_RANDOM = 0xFFFF_F000 + 56

_LOAD, _MODULO, _ADD, _RETURN, _RETURN_ACCUMULATOR = 0x20, 0x94, 0x04, 0x06, 0x16

LISTEN, SYN_RECV = "0A", "03"


def steer_to_range(member: socket.socket, first: int, count: int) -> None:
    """Have the kernel choose by chance among `count` members of the group, from index `first` on. Raises OSError."""
    _attach(member, (_LOAD, _RANDOM), (_MODULO, count), (_ADD, first), (_RETURN_ACCUMULATOR, 0))


def steer_to_one(member: socket.socket, index: int) -> None:
    """Have the kernel choose the member with that index; past the end, it hashes as without a program."""
    _attach(member, (_RETURN, index))


def _attach(member: socket.socket, *instructions: tuple[int, int]) -> None:
    # Only ever to a socket that listens: a program on one that is only bound keeps it from joining its group.
    code = b"".join(struct.pack("HBBI", operation, 0, 0, operand) for operation, operand in instructions)
    program = ctypes.create_string_buffer(code, len(code))
    value = struct.pack("HxxxxxxQ", len(instructions), ctypes.addressof(program))
    member.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, value)


def let_the_kernel_choose(member: socket.socket) -> bool:
    """Detach a program that was left behind; tell whether there was one."""
    try:
        member.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
    except OSError:
        return False  # ENOENT
    return True


def turned(order: Sequence[_T], earlier: int) -> list[_T]:
    """Return how a group stands when the `earlier` members before it have closed, from the last of them to the first.

    >>> turned(["b0", "b1", "b2"], earlier=2)
    ['b1', 'b2', 'b0']
    """
    at = -earlier % len(order)
    return [*order[at:], *order[:at]]


def closing_indices(leaving: int, staying: int) -> list[int]:
    """Return the index to steer to before each close, when the first `leaving` members close from last to first.

    Each names a staying member before and after its close, and the last one is past the end once all are closed: the
    kernel hashes again. Where several leave and one stays there are no such indices: between two closes a connection
    may meet a leaving member; no master of ours has but one.

    >>> closing_indices(2, 3)
    [2, 3]
    """
    return [left if left > 1 else staying for left in range(leaving, 0, -1)]


class Entry(NamedTuple):
    """A line of /proc/net/tcp or tcp6: addresses in the kernel's hexadecimal, and the socket's owner."""

    local: str
    peer: str
    state: str
    uid: int
    inode: int

    @property
    def port(self) -> int:
        """The local port."""
        return int(self.local.rpartition(":")[2], 16)


def parse(lines: Iterable[str]) -> Iterator[Entry]:
    """Read the lines of /proc/net/tcp; the first is a heading.

    >>> line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1"
    >>> [(entry.port, entry.state, entry.uid, entry.inode) for entry in parse([line])]
    [(8080, '0A', 1000, 4711)]
    """
    for line in lines:
        words = line.split()
        if len(words) > 9 and words[0].endswith(":"):
            yield Entry(words[1], words[2], words[3], int(words[7]), int(words[9]))


def entries(port: int, state: str) -> list[Entry]:
    """Return this network namespace's TCP sockets with a local port in a state. Raises OSError without /proc."""
    found = []
    needle = f":{port:04X} "
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()
        except FileNotFoundError:
            continue  # no IPv6 in this kernel
        found += [entry for entry in parse(line for line in lines if needle in line) if entry.port == port]
    return [entry for entry in found if entry.state == state]


def overlap(one: str, other: str) -> bool:
    """Tell whether connections to one local address may go to the other, which is another group.

    >>> overlap("00000000:1F90", "0100007F:1F90"), overlap("0200007F:1F90", "0100007F:1F90")
    (True, False)
    """
    hosts = [each.rpartition(":")[0] for each in (one, other)]
    # IPv4 does not see what is bound to one address of IPv6 alone; [::] takes IPv4 as well.
    wild = [not host.strip("0") for host in hosts]
    if wild[0] and wild[1]:
        return hosts[0] != hosts[1]
    if wild[0] or wild[1]:
        return len(hosts[0]) == len(hosts[1]) or len(hosts[wild.index(True)]) > len(hosts[wild.index(False)])
    return False


def handshakes(port: int) -> frozenset[str]:
    """Return the peers whose connection to a port is being made."""
    return frozenset(entry.peer for entry in entries(port, SYN_RECV))


def local_address(bound: socket.socket) -> str:
    """Return a socket's own address as /proc/net/tcp spells it.

    >>> with socket.socket() as example:
    ...     example.bind(("127.0.0.1", 0))
    ...     local_address(example).startswith("0100007F:")
    True
    """
    host, port = bound.getsockname()[:2]
    packed = socket.inet_pton(bound.family, host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def inode(listener: socket.socket) -> int:
    """Return what the kernel calls a socket, in /proc/net/tcp and in /proc/<pid>/fd."""
    return os.fstat(listener.fileno()).st_ino


def listens(bound: socket.socket) -> bool:
    """Tell whether a socket is a listener.

    >>> with socket.create_server(("127.0.0.1", 0)) as example:
    ...     listens(example)
    True
    """
    return bool(bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def migrates() -> bool:
    """Tell whether this kernel hands the queue of a closing member to the others: `net.ipv4.tcp_migrate_req`."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_migrate_req").read_text().strip() == "1"
    except OSError:
        return False
