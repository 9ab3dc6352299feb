"""Exceptions of the script's own that come up in the middle of our code.

Python calls the handler of a signal between any two instructions of the main thread. What it
raises, as a time limit's handler does, is meant for the script wherever it comes up.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from types import CodeType
from typing import Any


def is_scripts_own(error: BaseException) -> bool:
    """Whether the handler of a signal raised it."""
    handlers = set(_handlers())
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _handlers() -> Iterator[CodeType]:
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        if not callable(handler):
            continue
        for each in (handler, getattr(handler, "__func__", None), type(handler).__call__):
            code = getattr(each, "__code__", None)
            if isinstance(code, CodeType):
                yield code
