"""`python -m gradwatch_dashboard`: serve the dashboard of one collector."""

from __future__ import annotations

import os
import sys

import click

from gradwatch_dashboard.launch import DEFAULT_URL, command


@click.command()
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The collector.")
@click.option("--port", default=8471, show_default=True, help="Port to serve on, loopback only.")
def main(url: str, port: int) -> None:
    """Serve the dashboard of one collector. Its token is taken from GRADWATCH_TOKEN."""
    os.execv(sys.executable, command(url, port))


if __name__ == "__main__":
    main()
