# SPDX-License-Identifier: Apache-2.0
"""Connections within bounds: none waits for ever, and others find room.

uvicorn itself waits without end for the rest of a request's header, so that clients who
send half of one would hold all connections there can be.
"""

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
MOST = 1_000
# Files that are open for other ends, or soon may be.
RESERVED = 64


def most() -> int:
    """How many connections there may be: fewer than this process may open files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(MOST, files - RESERVED))


class Connections:
    """Those that no request is under way on, the longest idle first.

    Attributes:
      most: connections that are kept at once.
      seconds: in which a header has to come whole.
    """

    def __init__(self, limit: int, seconds: float):
        """Knows of none yet."""
        self.most = limit
        self.seconds = seconds
        # A dictionary keeps the order.
        self._idle: dict[Connection, None] = {}

    def idles(self, connection: "Connection") -> None:
        """No request is under way on it from now on."""
        self._idle.setdefault(connection)

    def works(self, connection: "Connection") -> None:
        """A request's header is there, or it is closed."""
        self._idle.pop(connection, None)

    def make_room(self) -> bool:
        """Closes the one that has been idle longest; whether there was one."""
        if not self._idle:
            return False
        next(iter(self._idle)).abort()
        return True


class Connection(H11Protocol):
    """A connection to the server; ``room`` is set in a class of each server's own."""

    room: Connections
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Takes a connection, for which another may have to go."""
        super().connection_made(transport)
        if len(self.connections) > self.room.most and not self.room.make_room():
            self.abort()
            return
        self.room.idles(self)
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        """Takes bytes; the first of a header start its time, the last end it."""
        if self._is_idle():
            self._start_clock()
        super().data_received(data)
        if not self._is_idle():
            self._leave()

    def on_response_complete(self) -> None:
        """Goes on to the next request, some of which may be here already."""
        super().on_response_complete()
        if self._is_idle() and not self.transport.is_closing():
            self.room.idles(self)
            if self.conn.trailing_data[0]:
                self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._leave()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Closes without a word."""
        self._leave()
        self.connections.discard(self)
        self.transport.abort()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_clock(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.room.seconds, self.abort)

    def _leave(self) -> None:
        self.room.works(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
