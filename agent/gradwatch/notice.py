"""Telling the person at the terminal something, once, without ever failing."""

from __future__ import annotations

import contextlib
import sys

_said: set[str] = set()


def told(error: BaseException) -> str:
    """An error in one line, even when it cannot describe itself."""
    with contextlib.suppress(Exception):
        return f"{type(error).__name__}: {error}".splitlines()[0][:500]
    return type(error).__name__


def say(message: str) -> None:
    """Print one line on standard error, the first time it is said."""
    if message in _said:
        return
    _said.add(message)
    with contextlib.suppress(Exception):
        print(f"gradwatch: {message}", file=sys.stderr, flush=True)
