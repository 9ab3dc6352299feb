"""Telling the person at the terminal something, once, without ever failing."""

from __future__ import annotations

import contextlib
import io
import os
import sys

_said: set[str] = set()


def told(error: BaseException) -> str:
    """An error in one line, even when it cannot describe itself."""
    return (described(error).splitlines() or [""])[0][:500]


def described(error: BaseException) -> str:
    """An error in as many lines as it has, even when it cannot describe itself."""
    with contextlib.suppress(Exception):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__


def say(message: str) -> None:
    """Print one line on standard error, the first time it is said."""
    if message in _said or sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        return  # print() would take standard output where there is no standard error
    _said.add(message)
    with contextlib.suppress(Exception):
        _print(f"gradwatch: {message}")


def _print(line: str) -> None:
    """On standard error, leaving nothing in its buffer: what a full disk did not take would be
    tried again when the interpreter ends, and change the script's exit status."""
    error: object = sys.stderr
    if type(error) is io.TextIOWrapper:  # not one that sends what it is given elsewhere too
        with contextlib.suppress(io.UnsupportedOperation):
            place = error.fileno()
            error.flush()
            os.write(place, f"{line}\n".encode(error.encoding, "backslashreplace"))
            return
    sys.stderr.write(f"{line}\n")  # scripts replace print()
    sys.stderr.flush()
