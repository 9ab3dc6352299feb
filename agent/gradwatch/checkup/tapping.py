"""Seeing the calls of custom autograd functions.

`apply` is often bound to a name long before anybody observes, so their `forward` is what is
replaced for a while, in the classes that exist and in those that the script defines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch.autograd import Function

Noted = Callable[[Any, tuple[Any, ...]], None]


class FunctionTap:
    """Calls `noted(class, arguments)` at each call of a Function that is not torch's own.

    around: runs the body of `forward`, so that what it computes can be left unobserved.
    """

    def __init__(self, noted: Noted, around: Callable[[Callable[[], Any]], Any]) -> None:
        self._noted = noted
        self._around = around
        self._replaced: list[tuple[type, str, Any]] = []

    def open(self) -> None:
        for kind in list(_subclasses(Function)):
            self._tap(kind)
        tap = self

        def tap_new(cls: type) -> None:
            tap._tap(cls)

        setattr(Function, "__init_subclass__", classmethod(tap_new))  # noqa: B010

    def close(self) -> None:
        del Function.__init_subclass__
        for kind, name, original in reversed(self._replaced):
            setattr(kind, name, original)
        self._replaced.clear()

    def _tap(self, kind: type) -> None:
        if kind.__module__.partition(".")[0] == "torch":
            return
        forward = vars(kind).get("forward")
        if isinstance(forward, staticmethod):
            self._replace(kind, "forward", self._unobserved(kind, forward.__func__))
        context = vars(kind).get("setup_context")
        if isinstance(context, staticmethod):
            self._replace(kind, "setup_context", self._with_context(context.__func__))

    def _replace(self, kind: type, name: str, function: Any) -> None:
        self._replaced.append((kind, name, vars(kind)[name]))
        setattr(kind, name, staticmethod(function))

    def _unobserved(self, kind: Any, forward: Any) -> Any:
        @functools.wraps(forward)
        def tapped(*arguments: Any, **keywords: Any) -> Any:
            # A context stands first unless there is a setup_context, which then is told.
            if kind.setup_context is Function.setup_context:
                self._noted(type(arguments[0])._forward_cls, arguments[1:])
            return self._around(lambda: forward(*arguments, **keywords))

        return tapped

    def _with_context(self, setup_context: Any) -> Any:
        @functools.wraps(setup_context)
        def tapped(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            self._noted(type(ctx)._forward_cls, inputs)
            return setup_context(ctx, inputs, output)

        return tapped


def _subclasses(kind: type) -> Iterator[type]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)
