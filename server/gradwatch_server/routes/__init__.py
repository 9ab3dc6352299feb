"""The HTTP API, a module for each resource."""

from gradwatch_server.routes import (
    audits,
    channels,
    findings,
    queries,
    records,
    runs,
    service,
    tokens,
)

ROUTERS = tuple(
    module.router
    for module in (service, records, runs, queries, audits, findings, tokens, channels)
)
