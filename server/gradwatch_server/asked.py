"""What queries of one optimizer have in common: where it is looked up, and when it has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from gradwatch_server.access import Reading, RunKey, Step, reachable_run
from gradwatch_server.answers import answer
from gradwatch_server.context import Context, Shared
from gradwatch_server.database import reading
from gradwatch_server.models import Optimizer
from gradwatch_server.queries import MAX_COLUMNS, Span, find_optimizer
from gradwatch_server.tokens import Grant


@dataclass(frozen=True)
class AskedOptimizer:
    """An optimizer that a request names, not looked up yet."""

    request: Request
    shared: Context
    grant: Grant
    run: str
    name: str

    def answer(self, find: Callable[[Session, Optimizer], Any]) -> Response:
        """What `find` finds of it; not at all for a client that has the newest.

        Raises NotFoundError, as `find` may.
        """
        with reading(self.shared.engine) as session:
            run = reachable_run(session, self.grant, self.run)
            optimizer = find_optimizer(session, self.run, self.name)
            # When a run was introduced tells it from one of its id that was deleted.
            facts = (run.created_at, run.changed, optimizer.id, optimizer.thinned)
            return self.shared.told.answer(self.request, facts, lambda: find(session, optimizer))

    def answer_anew(self, find: Callable[[Session, Optimizer], Any]) -> Response:
        """What `find` finds of it and of its findings, which people change too.

        Raises NotFoundError, as `find` may.
        """
        with reading(self.shared.engine) as session:
            reachable_run(session, self.grant, self.run)
            found = find(session, find_optimizer(session, self.run, self.name))
        return answer(self.request, found)


async def _asked(
    request: Request,
    shared: Shared,
    grant: Reading,
    run: RunKey,
    optimizer: Annotated[str, Query(max_length=200, description="as the run's view lists it")],
) -> AskedOptimizer:
    return AskedOptimizer(request, shared, grant, run, optimizer)


Asked = Annotated[AskedOptimizer, Depends(_asked)]


def span_of(by_default: int) -> Any:
    """A dependency: the steps that a request asks for, and in how many columns."""

    async def asked(
        first: Step = None,
        last: Step = None,
        columns: Annotated[
            int, Query(ge=1, le=MAX_COLUMNS, description="at most so many groups of steps")
        ] = by_default,
    ) -> Span:
        return Span(first, last, columns)

    return Depends(asked)
