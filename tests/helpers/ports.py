"""A port for a service that cannot bind port 0: one whose port is known before it starts, or that others join."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

#: How many ports below the ephemeral range are drawn from, and the lowest that any user may bind.
RANGE, UNPRIVILEGED = 15_000, 1024


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that no process has, and that the kernel gives to none: to no client, and for no bind of port 0.

    It is not reserved: another test may draw the same, once in thousands of times.

    A port out of the ephemeral range, found by a bind of port 0 and closed again, goes to another test's service or
    client a moment later; with thousands of connections a second it did.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(max(UNPRIVILEGED, first - RANGE), first)
    for port in random.SystemRandom().sample(ports, min(200, len(ports))):
        with socket.socket(family) as probe:
            # As a server does: a connection in TIME_WAIT is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((host, port))
                return port
    raise RuntimeError(f"none of 200 ports below {first} is free on {host}")
