"""Answers in the form that the client asks for, and not at all when it has the newest."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol, runtime_checkable

import msgspec
from fastapi import Request
from fastapi.responses import Response

from gradwatch.client import MSGPACK

ARROW = "application/vnd.apache.arrow.stream"
JSON = "application/json"
# What clients must ask again for, though proxies and browsers may keep it to compare.
PRIVATE = "private, no-cache"


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


def answer(request: Request, value: Any, tag: str = "", status: int = 200) -> Response:
    """msgpack or Arrow for those who ask for it, JSON for everyone else.

    tag: changes whenever the answer does; without one it is taken from the answer itself.
    """
    body, media_type = _encoded(request.headers.get("Accept", ""), value)
    if request.method != "GET":
        return Response(body, status, {"Cache-Control": "no-store"}, media_type)
    found = tag or _tag_of(body)
    headers = {"ETag": f'"{found}"', "Cache-Control": PRIVATE, "Vary": "Accept, Authorization"}
    if not tag and known(request, found):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=media_type, headers=headers)


def unchanged(request: Request, *facts: object) -> tuple[str, Response | None]:
    """A tag of facts and of what is asked for, and the answer to a client that has it already."""
    asked = (request.url.path, request.url.query, request.headers.get("Accept", ""), *facts)
    tag = _tag_of(repr(asked).encode())
    if not known(request, tag):
        return tag, None
    return tag, Response(status_code=304, headers={"ETag": f'"{tag}"', "Cache-Control": PRIVATE})


def known(request: Request, tag: str) -> bool:
    """Whether the client says that it has this already."""
    given = request.headers.get("If-None-Match", "")
    return any(item.strip().removeprefix("W/").strip('"') == tag for item in given.split(","))


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
