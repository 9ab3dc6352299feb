"""kombu's Redis transport, for workers that outlive their Redis.

A worker whose Redis goes away in the midst of a task gets a new channel, but still acknowledges
and puts back that task's message on the old one. kombu 5.7 then looks for the address in a
connection that is gone and fails with an AttributeError, which ends the worker. Here the old
channel says that its connection is lost, which the worker expects.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis
from redis.exceptions import ConnectionError as RedisConnectionError

SCHEMES = ("redis", "rediss")


class Channel(redis.Channel):
    """A channel that knows when it is closed."""

    def _connparams(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.connection, "client", None) is None:
            raise RedisConnectionError("the connection of this channel is closed")
        return super()._connparams(*args, **kwargs)


class Transport(redis.Transport):
    """Takes the place of kombu's own for the schemes of SCHEMES."""

    Channel = Channel


def install() -> None:
    """Let Celery find this transport under the usual schemes."""
    for scheme in SCHEMES:
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
