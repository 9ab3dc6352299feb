"""`gradwatch token`: who may do what, from a shell beside the database."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import click
from sqlalchemy import Engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_server.__main__ import load_settings
from gradwatch_server.database import migrate, open_database, reading, writing
from gradwatch_server.models import TokenRow
from gradwatch_server.tokens import Scope, TokenError, UnknownTokenError, issue, revoke, tokens

SCOPES = click.Choice([scope.value for scope in Scope])


@click.group()
def token() -> None:
    """Make, list and revoke tokens.

    A token lets its bearer send (ingest), read (read), or both and change, delete and make tokens
    (admin). From the first token on, every request to the collector needs one.

    \b
    For a training cluster:   gradwatch token create --scope ingest "training cluster"
    For a dashboard:          gradwatch token create --scope read dashboard
    For one team's project:   gradwatch token create --scope read --project vision "vision team"

    Works on the collector's database: GRADWATCH_DATABASE_URL, or the file in GRADWATCH_DATA_DIR.
    """


@token.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=SCOPES,
    multiple=True,
    required=True,
    help="What it is good for; may be repeated.",
)
@click.option("--project", help="The only project it is good for [all].")
def create(name: str, scopes: tuple[str, ...], project: str | None) -> None:
    """Make a token called NAME and print it, this once."""
    with _database() as engine, writing(engine) as session:
        try:
            text, _ = issue(session, name, scopes, project)
        except TokenError as error:
            raise click.ClickException(str(error)) from None
    click.echo(text)
    click.echo(
        "Keep it: it is not shown again. Agents, dashboards and clients read it from "
        "GRADWATCH_TOKEN.",
        err=True,
    )


@token.command("list")
def list_tokens() -> None:
    """List tokens, the newest first, without their secrets."""
    with _database() as engine, reading(engine) as session:
        rows = [
            ("KEY", "SCOPES", "PROJECT", "CREATED", "LAST USED", "STATE", "NAME"),
            *map(_line, tokens(session)),
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


@token.command("revoke")
@click.argument("key")
def revoke_token(key: str) -> None:
    """Make the token KEY worthless, for good. `gradwatch token list` shows keys."""
    with _database() as engine, writing(engine) as session:
        try:
            revoke(session, key)
        except UnknownTokenError as error:
            raise click.ClickException(f"{error}; see `gradwatch token list`") from None
    click.echo(f"{key} is revoked")


def _line(row: TokenRow) -> tuple[str, ...]:
    return (
        row.key,
        row.scopes.replace(" ", ","),
        row.project or "all",
        _day(row.created_at),
        _day(row.last_used_at),
        "good" if row.revoked_at is None else "revoked",
        row.name,
    )


def _day(at: float | None) -> str:
    return "never" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


@contextmanager
def _database() -> Generator[Engine]:
    """The collector's database, its tables up to date."""
    url = load_settings().database
    engine = open_database(url)
    try:
        migrate(engine)
        yield engine
    except SQLAlchemyError as error:
        shown = make_url(url).render_as_string(hide_password=True)
        raise click.ClickException(f"{shown} cannot be used: {type(error).__name__}") from None
    finally:
        engine.dispose()
