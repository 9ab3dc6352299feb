"""`python -m gradwatch_dashboard --url URL --port PORT`: serve the dashboard of one collector."""

from __future__ import annotations

import argparse
import os
import sys

from gradwatch_dashboard.launch import LOOPBACK, collector_url, command


def main() -> None:
    """Become Streamlit's process, so that whoever started this one can stop it."""
    parser = argparse.ArgumentParser(prog="gradwatch_dashboard", description=__doc__)
    known = collector_url([], os.environ)
    parser.add_argument("--url", default=known, help="the collector's address [%(default)s]")
    parser.add_argument("--port", type=int, default=8471, help="[%(default)s]")
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="address to listen on; beyond loopback whoever reaches it sees all runs, so put a "
        "proxy that asks who they are in front [%(default)s]",
    )
    given = parser.parse_args()
    argv = command(given.url, given.port, given.host)
    sys.stdout.flush()
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main()
