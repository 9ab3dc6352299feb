"""Answers in the form that the client asks for, and not at all when it has the newest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import msgspec
from fastapi import Request
from fastapi.responses import Response

from gradwatch.client import MSGPACK

ARROW = "application/vnd.apache.arrow.stream"
JSON = "application/json"
# What clients must ask again for, though proxies and browsers may keep it to compare.
PRIVATE = "private, no-cache"
# Answers of which it is remembered what they were made of.
MAX_TOLD = 10_000


@runtime_checkable
class Plain(Protocol):
    """Arrays that travel as bytes in msgpack, and as lists in JSON."""

    def plain(self) -> Any: ...


@runtime_checkable
class Tabular(Protocol):
    """Arrays that can be read as the columns of one table."""

    def arrow(self) -> dict[str, Any]: ...


class NoArrowError(RuntimeError):
    """Arrow was asked for, and this collector cannot write it."""


def answer(request: Request, value: Any, status: int = 200) -> Response:
    """msgpack or Arrow for those who ask for it, JSON for everyone else, under a tag of what it
    says; 304 for a client that has it already."""
    body, media_type = _encoded(request.headers.get("Accept", ""), value)
    if request.method != "GET":
        return Response(body, status, {"Cache-Control": "no-store"}, media_type)
    tag = _tag_of(body)
    headers = _tagged(tag)
    if known(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=media_type, headers=headers)


class Told:
    """Tags of answers by the facts that they were made of: who polls while those stand is answered
    without asking again. Safe in threads."""

    def __init__(self) -> None:
        self._tags: dict[str, str] = {}

    def answer(self, request: Request, facts: object, find: Callable[[], Any]) -> Response:
        """What `find` finds, or 304 for a client that has it.

        facts: change whenever the answer may; where it did not, its tag stays as well.
        """
        asked = (request.url.path, request.url.query, request.headers.get("Accept", ""), facts)
        key = _tag_of(repr(asked).encode())
        tag = self._tags.get(key)
        if tag is not None and known(request, tag):
            return Response(status_code=304, headers=_tagged(tag))
        found = answer(request, find())
        if len(self._tags) >= MAX_TOLD:
            self._tags.clear()
        self._tags[key] = found.headers["ETag"].strip('"')
        return found


def known(request: Request, tag: str) -> bool:
    """Whether the client says that it has this already."""
    given = request.headers.get("If-None-Match", "")
    return any(item.strip().removeprefix("W/").strip('"') == tag for item in given.split(","))


def _tagged(tag: str) -> dict[str, str]:
    return {"ETag": f'"{tag}"', "Cache-Control": PRIVATE, "Vary": "Accept, Authorization"}


def _tag_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _encoded(accept: str, value: Any) -> tuple[bytes, str]:
    if MSGPACK in accept:
        return msgspec.msgpack.encode(value), MSGPACK
    if ARROW in accept and isinstance(value, Tabular):
        return _arrow(value.arrow()), ARROW
    return msgspec.json.encode(value.plain() if isinstance(value, Plain) else value), JSON


def _arrow(columns: dict[str, Any]) -> bytes:
    try:
        import pyarrow as pa
    except ModuleNotFoundError:
        raise NoArrowError(
            "this collector cannot write Arrow: pip install 'gradwatch[arrow]' there"
        ) from None
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
