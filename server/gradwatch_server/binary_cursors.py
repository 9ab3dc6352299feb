"""Cursors of psycopg that ask PostgreSQL for rows in its binary format.

A module of its own, since psycopg is loaded where PostgreSQL is used alone.
"""

from __future__ import annotations

from typing import Any

from psycopg import Cursor, ServerCursor
from psycopg.pq import Format


class BinaryCursor(Cursor[Any]):
    """What `connection.cursor(binary=True)` makes."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.format = Format.BINARY


class BinaryServerCursor(ServerCursor[Any]):
    """The same for a result that is fetched in parts."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.format = Format.BINARY
