"""The collector that the pages ask, and what they say when it does not answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import streamlit as st

from gradwatch.client import Client, CollectorError
from gradwatch_dashboard.formats import code
from gradwatch_dashboard.launch import collector_url

TIMEOUT_S = 5.0

T = TypeVar("T")


@st.cache_resource(max_entries=1)
def connect(url: str, token: str | None) -> Client:
    """One pool of connections for all sessions."""
    return Client(url, token, timeout_s=TIMEOUT_S)


def collector() -> Client:
    """The client of the collector that this process was started for."""
    return connect(collector_url(sys.argv, os.environ), os.environ.get("GRADWATCH_TOKEN"))


def ask(question: Callable[[Client], T], absent: str = "") -> T | None:
    """The collector's answer; None after a message on the page when there is none.

    `absent` is the message for what does not exist yet; without one that is told as an error.
    """
    client = collector()
    try:
        return question(client)
    except CollectorError as error:
        if absent and error.status == 404:
            st.caption(absent)
        else:
            explain(client.url, error)
        return None


def explain(url: str, error: CollectorError) -> None:
    """Say on the page what went wrong and what to do."""
    if error.status == 0:
        st.error(
            f"**The collector at {code(url)} does not answer.**\n\n"
            "Start it with `gradwatch up`, or set `GRADWATCH_URL` to where it runs. "
            "This page tries again by itself.",
            icon=":material/cloud_off:",
        )
    elif error.status in (401, 403):
        st.error(
            f"**The collector at {code(url)} refused this dashboard's token.**\n\n"
            "Start the dashboard with `GRADWATCH_TOKEN` set to a token that may read.",
            icon=":material/lock:",
        )
    elif error.status == 404:
        st.warning(f"**Not found.** {code(str(error))}", icon=":material/search_off:")
    else:
        st.error(
            f"**The collector at {code(url)} could not answer.** {code(str(error))}",
            icon=":material/error:",
        )
