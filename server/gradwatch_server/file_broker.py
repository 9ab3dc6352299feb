"""A Celery broker of plain files, for one machine and one worker, without any server.

kombu's own `filesystem` transport writes a message in place, so that a reader may see half of it
and fail. Here a message is written under another name and then moved, which is atomic. Messages
are wake-ups (see docs/broker.md): one that is lost with a killed worker costs one tick, so taking
one deletes it, and nothing is recovered at a start.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from pathlib import Path
from queue import Empty
from typing import Any
from urllib.parse import quote

from kombu.transport import TRANSPORT_ALIASES, virtual

log = logging.getLogger(__name__)

SCHEME = "gradwatch-files"
POLL_S = 0.1


def forget_messages(folder: Path) -> None:
    """Remove all messages, whole and half, while nobody uses the broker."""
    shutil.rmtree(folder, ignore_errors=True)


class Channel(virtual.Channel):
    """Queues as folders, messages as files whose names sort by time."""

    def _folder(self, queue: str) -> Path:
        root = Path(self.connection.client.transport_options["folder"])
        folder = root / quote(queue, safe="")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _messages(self, queue: str) -> list[Path]:
        return sorted(self._folder(queue).glob("*.json"))

    def _put(self, queue: str, message: Any, **_: Any) -> None:
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex}"
        folder = self._folder(queue)
        temporary = folder / f"{name}.part"
        temporary.write_text(json.dumps(message))
        os.replace(temporary, folder / f"{name}.json")

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        for path in self._messages(queue):
            try:
                text = path.read_text()
                # Whoever removes the file has the message; nothing is left to clean up.
                path.unlink()
            except FileNotFoundError:
                continue
            try:
                return json.loads(text)
            except ValueError:
                # A power cut can leave a file without its content; a tick makes up for it.
                log.warning("the message %s cannot be read", path.name)
        raise Empty

    def _size(self, queue: str) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return len(self._messages(queue))

    def _purge(self, queue: str) -> int:
        messages = self._messages(queue)
        for path in messages:
            path.unlink(missing_ok=True)
        return len(messages)


class Transport(virtual.Transport):
    """Registers under the scheme of SCHEME."""

    Channel = Channel
    driver_type = SCHEME
    driver_name = SCHEME
    default_port = 0
    polling_interval = POLL_S
    implements = virtual.Transport.implements.extend(asynchronous=False)

    def driver_version(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return "1"


TRANSPORT_ALIASES[SCHEME] = f"{__name__}:Transport"
