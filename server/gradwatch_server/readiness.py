"""Whether this collector can do its work now: its database answers, and soon enough."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

from sqlalchemy import Engine, text

DEADLINE_S = 3.0


class Readiness:
    """Asks the database, in one thread however many ask and however long it hangs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asking: Future[None] | None = None

    async def check(self) -> str:
        """Why the database cannot be used; empty when it can."""
        if self._asking is None or self._asking.done():
            self._asking = Future()
            # A daemon: a database that never answers must not keep this process from ending.
            threading.Thread(target=self._ask, args=(self._asking,), daemon=True).start()
        answer = asyncio.shield(asyncio.wrap_future(self._asking))
        try:
            await asyncio.wait_for(answer, DEADLINE_S)
        except TimeoutError:
            return f"the database has not answered for {DEADLINE_S:g} s"
        except Exception as error:
            return f"the database cannot be reached: {type(error).__name__}"
        return ""

    def _ask(self, asking: Future[None]) -> None:
        try:
            with self._engine.connect() as connection:
                connection.execute(text("SELECT 1"))
        except Exception as error:
            asking.set_exception(error)
        else:
            asking.set_result(None)
