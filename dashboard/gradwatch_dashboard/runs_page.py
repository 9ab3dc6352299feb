"""The list of runs: newest first, each with its verdict, and a link to its page."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import streamlit as st

from gradwatch.client import Client
from gradwatch.wire.api import RunView
from gradwatch_dashboard.cards import pill, run_facts, run_summary
from gradwatch_dashboard.collector import ask
from gradwatch_dashboard.formats import count, elide, literal
from gradwatch_dashboard.run_page import RUN
from gradwatch_dashboard.verdicts import VERDICTS, look

REFRESH_S = 3.0
NAME_WIDTH = 30
PROJECT_WIDTH = 20

ADD_THE_AGENT = """
**In a training script**, one line after the optimizer is made:
```python
import gradwatch

gradwatch.watch(model, optimizer)
```
**Or without touching the script:**
```shell
gradwatch run train.py
```
When training runs on another machine, set `GRADWATCH_URL` there to this collector's address.
The run appears here by itself with its first steps. To see some at once: `gradwatch demo`.
"""


class Listed(NamedTuple):
    """Runs, newest first, and whether the collector has older ones."""

    runs: list[RunView]
    more: bool


def show(run_page: st.Page) -> None:
    """Draw the page; its list refreshes itself and follows the filters."""
    st.title("Runs")
    st.fragment(_live, run_every=REFRESH_S)(run_page)


def fetch(client: Client, pages: int) -> Listed:
    """The first `pages` pages of the collector's list."""
    runs: list[RunView] = []
    after: str | None = None
    for _ in range(pages):
        page = client.runs(after=after)
        runs += page.runs
        after = page.next
        if after is None:
            break
    return Listed(runs, after is not None)


def matches(run: RunView, text: str, project: str | None) -> bool:
    """Whether a run is of the project and each word of `text` is somewhere in its words."""
    if project is not None and run.info.project != project:
        return False
    titles = [finding.title for finding in run.findings]
    words = (run.info.project, run.info.name, run.info.id, run.status, run.verdict)
    held = " ".join([*words, run.info.host, *run.info.tags, *titles]).lower()
    return all(word in held for word in text.lower().split())


def tally(runs: Sequence[RunView]) -> str:
    """`6 runs: 2 critical, 1 warning, 3 healthy`."""
    counts = Counter(run.verdict for run in runs)
    order = ("critical", "warning", "info", "healthy", "waiting")
    told = ", ".join(f"{counts[name]} {name}" for name in order if counts[name])
    return f"{count(len(runs), 'run')}: {told}" if told else count(len(runs), "run")


def _live(run_page: st.Page) -> None:
    pages: int = st.session_state.setdefault("runs_pages", 1)
    listed = ask(lambda client: fetch(client, pages))
    if listed is None:
        return
    if not listed.runs:
        st.subheader("No runs yet")
        st.markdown(ADD_THE_AGENT)
        return
    text, project = _filters(sorted({run.info.project for run in listed.runs}))
    shown = [run for run in listed.runs if matches(run, text, project)]
    st.caption(tally(shown) if shown else "No run matches: clear the filters to see all.")
    now = time.time()
    for run in shown:
        _row(run, run_page, now)
    if listed.more:
        st.button("Show older runs", key="runs_more", on_click=_show_more)


def _show_more() -> None:
    st.session_state["runs_pages"] += 1


def _filters(projects: Sequence[str]) -> tuple[str, str | None]:
    left, right = st.columns([3, 1])
    text = left.text_input(
        "Search runs",
        key="search",
        placeholder="Search name, project, tag, host or finding",
        label_visibility="collapsed",
        icon=":material/search:",
        bind="query-params",
    )
    project = right.selectbox(
        "Project",
        projects,
        key="project",
        index=None,
        placeholder="All projects",
        label_visibility="collapsed",
    )
    return text, project


def _row(run: RunView, run_page: st.Page, now: float) -> None:
    with st.container(border=True, key=f"row_{run.info.id}"):
        verdict, name, facts, summary = st.columns(
            [1.1, 2.9, 4.5, 4.2], vertical_alignment="center", gap="small"
        )
        verdict.html(pill(look(VERDICTS, run.verdict)))
        name.page_link(
            run_page,
            label=f"**{literal(elide(run.info.name, NAME_WIDTH))}** "
            f":gray[{literal(elide(run.info.project, PROJECT_WIDTH))}]",
            query_params={RUN: run.info.id},
            help=None if len(run.info.name) <= NAME_WIDTH else literal(run.info.name),
        )
        facts.html(run_facts(run, now))
        summary.html(run_summary(run))
