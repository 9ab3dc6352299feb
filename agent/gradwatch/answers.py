"""Answers that have come by a deadline, or not at all.

urllib3's timeout is for each read alone, so a server that sends a byte now and then would hold the
agent's thread for ever, and all that waits in its queue.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection


class Pools(urllib3.PoolManager):
    """A pool manager whose read timeout is that of a whole answer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}


class _Timed(io.RawIOBase):
    """What a socket receives within its timeout from now on."""

    def __init__(self, received: io.RawIOBase, sock: socket.socket, timeout_s: float) -> None:
        self._received = received
        self._sock = sock
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the answer takes too long")
        self._sock.settimeout(left_s)
        try:
            return self._received.readinto(buffer)
        finally:
            self._sock.settimeout(self._timeout_s)

    def close(self) -> None:
        self._received.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **keywords: Any) -> None:
        super().__init__(sock, *args, **keywords)
        timeout_s = sock.gettimeout()
        if timeout_s is not None:
            self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock, timeout_s))


class _Connection(HTTPConnection):
    response_class = _Answer


class _SecureConnection(HTTPSConnection):
    response_class = _Answer


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection  # pyright: ignore[reportAssignmentType]


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection  # pyright: ignore[reportAssignmentType]
