"""The processes that a watched script starts: they are watched as it is.

What is forked has the hooks of its parent. What multiprocessing starts anew, as
`torch.multiprocessing.spawn` does, has nothing, so that it gets them with the process object.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from multiprocessing import util
from multiprocessing.process import BaseProcess
from typing import Any

# Run in the new process once its main module is imported, and what it is to call. What trains has
# imported torch by then. Whatever fails here may not fail there.
_BEGIN = """
import sys
if "torch" in sys.modules:
    try:
        from gradwatch.heirs import inherit
        inherit()
    except Exception as error:
        print(f"gradwatch: cannot watch this process: {error!r}", file=sys.stderr)
"""

_started = 0
_handing_on = False


class _Legacy:
    """Begins to watch where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (_BEGIN, {})


def hand_on() -> None:
    """Have every process that is started from here on watched, with the settings in the
    environment."""
    global _handing_on
    if _handing_on:
        return
    _handing_on = True
    start: Any = BaseProcess.start

    @functools.wraps(start)
    def started(self: Any) -> Any:
        global _started
        with contextlib.suppress(Exception):  # of a class of the script's own
            if not _loads_data(self):
                self._gradwatch = _Legacy()
                _started += 1
        return start(self)

    BaseProcess.start = started


def _loads_data(process: Any) -> bool:
    """Whether this is a worker of a DataLoader, which has no time to lose and does not train."""
    target = getattr(process, "_target", None)
    return getattr(target, "__module__", "").startswith("torch.utils.data.")


def heirs() -> int:
    """How many processes were started since."""
    return _started


def inherit() -> None:
    """Watch this process, as its parent is watched."""
    from gradwatch.run_script import watch_every_optimizer
    from gradwatch.settings import Settings

    watch_every_optimizer(Settings.load({}))
    hand_on()


def at_the_end(job: object, finish: Any) -> None:
    """Call `finish(job)` when a process of multiprocessing's ends, which runs no exit handlers if
    it was forked."""
    if multiprocessing.parent_process() is not None:
        util.Finalize(None, finish, args=(job,), exitpriority=100)
