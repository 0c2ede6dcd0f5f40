"""What a worker accepts from in `reuseport` mode: the queues of a port as if they were one listener.

Theory of operation
-------------------
A worker with one queue of its own leaves clients waiting in it while others idle, so each accepts from all. The master
holds the sockets, and one epoll instance that watches those which listen. Workers inherit both. An epoll descriptor is
itself readable when something that it watches is: a worker class waits for it by whatever means it has (select, epoll,
libev, asyncio) as for a socket. What the master adds to it or removes is so for all workers at once, with no message to
them and no change to what they wait for.

An older worker has the descriptor of a queue that was opened later: all sockets that there may ever be are bound before
the first fork, and only those listen that are wanted. To close a queue the master shuts it down
(gunicorn/sockets/listener.py), which ends it for every process that has a copy; the socket stays bound, and may listen
again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from zdd_web.listeners.accept_queue import queue
from zdd_web.listeners.reuseport.arrivals import Arrivals
from zdd_web.system import clock

#: Accepted by another worker, or shut down a moment ago.
_NOBODY = (errno.EAGAIN, errno.EINVAL)


def new_epoll(size: int) -> select.epoll:
    """Return an epoll instance, also where a configuration file has had gevent take the class out of its module."""
    monkey = sys.modules.get("gevent.monkey")
    kind = select.epoll if monkey is None else monkey.get_original("select", "epoll")
    made: select.epoll = kind(size)
    return made


class Queues:
    """Looks like one of gunicorn's listeners, and like the socket in it."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        epoll: select.epoll,
        arrivals: Arrivals,
        accepted: Sequence[Callable[[], None]],
        name: str,
    ) -> None:
        """Take them over in a worker: sockets, what watches those that listen, and what counts each one's accepts."""
        self._epoll, self._arrivals, self._name = epoll, arrivals, name
        self._members, self._accepted = list(sockets), list(accepted)
        self._indices = {each.fileno(): index for index, each in enumerate(sockets)}
        self._address = sockets[0].getsockname()
        self.family = self.FAMILY = sockets[0].family
        self.type, self.proto = sockets[0].type, sockets[0].proto
        for each in sockets:
            # gunicorn makes them inheritable, for a successor:
            # test_constructor_of_a_socket_listens_and_makes_it_inheritable.
            each.set_inheritable(False)

    @property
    def sock(self) -> Queues:
        """The socket in gunicorn's listener."""
        return self

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept the connection that has waited longest. Raises OSError, BlockingIOError when none waits."""
        ready = [self._indices[fd] for fd, _ in self._epoll.poll(0, len(self._members))]
        if len(ready) > 1:
            self._look(ready)
            ready = self._arrivals.in_order(ready)
        for index in ready:
            try:
                client, peer = self._members[index].accept()
            except OSError as error:
                if error.errno in _NOBODY:
                    continue
                raise
            self._arrivals.taken(index)
            self._accepted[index]()
            return client, peer
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _look(self, ready: list[int]) -> None:
        now = clock.now_ns()
        if self._arrivals.is_due(now):
            for index in ready:
                self._arrivals.note(index, queue(self._members[index])[0], now)

    def fileno(self) -> int:
        """Return a descriptor that is readable when a connection waits; -1 once closed."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def getsockname(self) -> Any:
        """Return the address, closed or not."""
        return self._address

    def setblocking(self, flag: bool) -> None:
        """Do nothing: the sockets are the other workers' too."""

    def close(self) -> None:
        """Close this process's copies."""
        self._epoll.close()
        for member in self._members:
            with contextlib.suppress(OSError):
                member.close()

    def __str__(self) -> str:
        return self._name
