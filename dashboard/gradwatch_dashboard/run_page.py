"""The page of one run: its verdict, its findings, and the pictures behind them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import streamlit as st

from gradwatch.wire.api import FindingView, OptimizerView, RunView
from gradwatch_dashboard.cards import finding_card, flattened, run_header, table
from gradwatch_dashboard.charts import charts
from gradwatch_dashboard.collector import ask
from gradwatch_dashboard.formats import code, count, literal

RUN = "run"  # the query parameter that names a run
# A picture of many layers is megabytes, so it is sent less often.
REFRESH_S = ((60, 2.0), (200, 5.0), (1_000_000, 10.0))
ENDED_REFRESH_S = 30.0
RUNNING = ("running", "silent")
OPEN_CARDS = 4


def show(runs_page: st.Page) -> None:
    """Draw the page of the run that the address names."""
    st.page_link(runs_page, label="All runs", icon=":material/arrow_back:")
    run_id = st.query_params.get(RUN)
    if not run_id:
        st.title("Run")
        st.info("The address names no run. Choose one from the list of all runs.")
        return
    run = ask(lambda client: client.run(run_id))
    if run is None:
        # Nothing is known of the run yet, so the whole page is tried again.
        st.fragment(_retry, run_every=3.0)()
        return
    st.title(literal(run.info.name))
    st.fragment(_live, run_every=refresh_s(run))(run_id, run.status in RUNNING)


def refresh_s(run: RunView) -> float:
    """Seconds between two refreshes: fewer for few layers, many once the run has ended."""
    if run.status not in RUNNING:
        return ENDED_REFRESH_S
    layers = max((optimizer.layers for optimizer in run.optimizers), default=0)
    return next(seconds for limit, seconds in REFRESH_S if layers <= limit)


def _retry() -> None:
    # The first run of a fragment is part of the page's own run, which has just failed.
    if st.session_state.pop("run_retried", False):
        st.rerun()
    st.session_state["run_retried"] = True


def _live(run_id: str, was_running: bool) -> None:
    run = ask(lambda client: client.run(run_id))
    if run is None:
        return
    if (run.status in RUNNING) != was_running:
        st.rerun()  # the whole page, for another pace of refreshing
    # Each part has a place of its own: a new card must not move, and so redraw, the pictures.
    head, findings, choice, pictures = (st.container() for _ in range(4))
    with head:
        st.html(run_header(run, time.time()))
        if run.reason:
            st.error(f"**The run failed.** {code(run.reason)}", icon=":material/error:")
        _details(run)
    with findings:
        _findings(run)
    with choice:
        optimizer = _optimizer(run.optimizers)
    with pictures:
        if optimizer is None:
            st.info("No step was recorded yet. The pictures appear with the first frames.")
            return
        shown = [item for item in run.findings if item.optimizer in ("", optimizer.name)]
        charts(run.info.id, optimizer, shown)


def _details(run: RunView) -> None:
    told = flattened(run.info.config)
    told |= {f"dropped: {reason}": f"{count(n, 'frame')}" for reason, n in run.dropped.items()}
    if run.info.tags:
        told["tags"] = flattened({"tags": ", ".join(run.info.tags)})["tags"]
    told["run"] = run.info.id
    with st.expander("Configuration", key="configuration"):
        st.html(table(told))


def _findings(run: RunView) -> None:
    still_open = [finding for finding in run.findings if finding.state == "open"]
    resolved = [finding for finding in run.findings if finding.state != "open"]
    if not still_open:
        told = {
            "waiting": "Nothing was judged yet: the first findings need a few steps.",
        }.get(run.verdict, "No open problem.")
        st.markdown(f"#### Findings\n{told}")
    else:
        st.markdown("#### Findings")
    _cards(still_open[:OPEN_CARDS])
    if len(still_open) > OPEN_CARDS:
        more = count(len(still_open) - OPEN_CARDS, "more open finding")
        with st.expander(more, key="more_findings"):
            _cards(still_open[OPEN_CARDS:])
    if resolved:
        with st.expander(count(len(resolved), "resolved finding"), key="resolved_findings"):
            _cards(resolved)


def _cards(findings: Sequence[FindingView]) -> None:
    for finding in findings:
        st.html(finding_card(finding))


def _optimizer(optimizers: Sequence[OptimizerView]) -> OptimizerView | None:
    """The optimizer to look at: the only one, or the one chosen."""
    if len(optimizers) < 2:
        return optimizers[0] if optimizers else None
    by_name = {optimizer.name: optimizer for optimizer in optimizers}
    chosen = st.segmented_control(
        "Optimizer", list(by_name), key="optimizer", default=optimizers[0].name, required=True
    )
    return by_name.get(chosen or "", optimizers[0])
