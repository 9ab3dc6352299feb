"""`python -m gradwatch_server`: one collector process."""

from __future__ import annotations

import ipaddress

import click
import uvicorn

from gradwatch_server import logs
from gradwatch_server.app import create_app
from gradwatch_server.database import migrate, open_database
from gradwatch_server.notifier import ChannelError, check_channel
from gradwatch_server.rules import load_rules
from gradwatch_server.settings import Settings
from gradwatch_server.tokens import any_token

DEFAULT_PORT = 8470


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=DEFAULT_PORT, show_default=True, help="Port to listen on.")
def main(host: str, port: int) -> None:
    """Start one collector process.

    Its settings are environment variables: GRADWATCH_DATABASE_URL, GRADWATCH_BROKER_URL,
    GRADWATCH_NOTIFY, GRADWATCH_SERVER_TOKEN and others, listed in docs/settings.md.
    """
    settings = load_settings()
    guarded = not is_loopback(host)
    if guarded and not settings.server_token and not has_token(settings):
        raise click.ClickException(
            f"refusing to listen on {host} without a token: anyone there could read and write. "
            "Make one with `gradwatch token create --scope admin NAME` and set GRADWATCH_TOKEN to "
            "it for agents and dashboard (or set GRADWATCH_SERVER_TOKEN to a long random text, "
            "and GRADWATCH_TOKEN to the same), or listen on 127.0.0.1"
        )
    check_channels(settings.channels)
    logs.configure(settings.log_format, settings.log_level.upper())
    uvicorn.run(
        create_app(settings, guarded=guarded),
        host=host,
        port=port,
        # Its records go where ours go.
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=10,
    )


def load_settings() -> Settings:
    """The settings of this process, or a message that names the variable that is wrong."""
    try:
        settings = Settings.load()
        load_rules(settings.thresholds)  # workers need them: better told here than in their logs
        return settings
    except ValueError as error:
        raise click.ClickException(str(error)) from None


def check_channels(urls: list[str]) -> None:
    """Refuse to start with a channel that no alert could be sent to."""
    for url in urls:
        try:
            check_channel(url)
        except ChannelError as error:
            raise click.ClickException(str(error)) from None


def has_token(settings: Settings) -> bool:
    """Whether a token is in the database that is still good."""
    engine = open_database(settings.database)
    try:
        migrate(engine)
        return any_token(engine)
    finally:
        engine.dispose()


def is_loopback(host: str) -> bool:
    """Whether nobody on another machine can reach this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    main()
