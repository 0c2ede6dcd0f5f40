"""Websocket clients that keep their connections until the server closes them, and account for every message.

Runs in an environment with `websockets`. A client of `echo` and of `chat` sends a number and waits for it to come back;
what was not answered when the connection was closed is sent again on the next one, as any client has to. A client of
`feed` only listens, and notices a gap.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

#: How the server ends the connections of each kind. Anything else is a loss.
CLOSES = {"echo": 1012, "feed": 1012, "chat": 1001}

#: Seconds without an answer after which a message is lost, and between two messages.
TIMEOUT, PACE = 10.0, 0.02


@dataclass
class Tally:
    """What the clients of one kind have seen."""

    messages: int = 0
    #: Not answered when the server closed the connection; answered on the next one.
    sent_again: int = 0
    #: Why something was lost, each with how often: no answer in time, another's answer, a gap, another close.
    lost: Counter[str] = field(default_factory=Counter)
    #: Codes of the server's close frames; 1006 is a connection that ended without one.
    closes: Counter[int] = field(default_factory=Counter)

    def to_json(self) -> dict[str, object]:
        """Return the same as plain values."""
        return {"messages": self.messages, "sent_again": self.sent_again, "lost": dict(self.lost),
                "closes": dict(self.closes)}  # fmt: skip


class Sockets:
    """Clients in a thread of their own; also a context manager. `clients` is how many there are of each kind."""

    def __init__(self, port: int, clients: Mapping[str, int]) -> None:
        self.tallies = {kind: Tally() for kind in clients}
        self._url = f"ws://127.0.0.1:{port}"
        self._clients = clients
        self._is_last = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="sockets")

    def __enter__(self) -> Sockets:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.dismiss()
        self._thread.join()

    def dismiss(self) -> None:
        """Have no client connect again once the server has closed its connection."""
        self._is_last = True

    async def _run(self) -> None:
        await asyncio.gather(*(self._drive(kind) for kind, count in self._clients.items() for _ in range(count)))

    async def _drive(self, kind: str) -> None:
        tally = self.tallies[kind]
        talk = self._listen if kind == "feed" else self._ask
        unanswered: list[str] = []
        while True:
            try:
                # No pings of ours: their absence would close a connection for another reason.
                async with connect(f"{self._url}/{kind}", ping_interval=None, open_timeout=TIMEOUT) as socket:
                    code = await talk(socket, tally, unanswered)
            except (OSError, WebSocketException) as error:
                tally.lost[f"no connection: {type(error).__name__}"] += 1
                await asyncio.sleep(0.1)
                code = None
            if code is not None:
                tally.closes[code] += 1
                if code != CLOSES[kind]:
                    tally.lost[f"closed with {code}"] += 1
            if self._is_last:
                if unanswered and kind == "chat":
                    tally.lost["not answered at the last close"] += 1
                return

    async def _ask(self, socket: ClientConnection, tally: Tally, unanswered: list[str]) -> int:
        """Send one message after the other until the server closes; return its code."""
        try:
            while True:
                if unanswered:
                    tally.sent_again += 1
                else:
                    unanswered.append(str(tally.messages))
                    tally.messages += 1
                await socket.send(unanswered[0])
                reply = await asyncio.wait_for(socket.recv(), TIMEOUT)
                ends = reply == "bye"
                if ends:
                    # It still answers what it has got.
                    reply = await asyncio.wait_for(socket.recv(), TIMEOUT)
                if reply != unanswered.pop():
                    tally.lost["another reply"] += 1
                if ends:
                    await socket.send("bye")
                    await asyncio.wait_for(socket.recv(), TIMEOUT)
                await asyncio.sleep(PACE)
        except asyncio.TimeoutError:
            tally.lost["no answer in time"] += 1
            unanswered.clear()
            return 0
        except ConnectionClosed as error:
            return error.rcvd.code if error.rcvd else 1006

    async def _listen(self, socket: ClientConnection, tally: Tally, unanswered: list[str]) -> int:
        """Take numbers until the server closes; return its code."""
        expected = 0
        try:
            while True:
                number = int(await asyncio.wait_for(socket.recv(), TIMEOUT))
                if number != expected:
                    tally.lost["a gap"] += 1
                expected = number + 1
                tally.messages += 1
        except asyncio.TimeoutError:
            tally.lost["nothing in time"] += 1
            return 0
        except ConnectionClosed as error:
            return error.rcvd.code if error.rcvd else 1006
