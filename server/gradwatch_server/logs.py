"""Logs: one line a record, for people or as JSON, with the request or task that it belongs to.

Never a query string, a header or a body: these may hold secrets.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

# What this process is at: {"request_id": ...} or {"task_id": ...}.
AT: ContextVar[Mapping[str, str]] = ContextVar("at", default=MappingProxyType({}))
TEXT, JSON = "text", "json"
# What a record carries beside these was given as `extra`, and is shown.
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# These tell of every request and message of their own at INFO.
QUIET = ("apprise", "httpx", "kombu", "alembic", "uvicorn.access")


def facts_of(record: logging.LogRecord) -> dict[str, object]:
    """What a record says beyond its message: its request or task, and its `extra`."""
    extra = {name: value for name, value in vars(record).items() if name not in STANDARD}
    return {**AT.get(), **extra}


class JsonLines(logging.Formatter):
    """Each record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **facts_of(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Each record as a line to read; a traceback follows it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        facts = " ".join(f"{name}={value}" for name, value in facts_of(record).items())
        return f"{super().formatMessage(record)}{f'  [{facts}]' if facts else ''}"


FORMATTERS: dict[str, type[logging.Formatter]] = {TEXT: TextLines, JSON: JsonLines}


def configure(style: str, level: int | str) -> None:
    """Send every record of this process to standard error. style: TEXT or JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[style]())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
