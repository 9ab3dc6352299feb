"""The pictures of one optimizer's layers, with what chooses among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from gradwatch.wire.api import FindingView, LayersView, OptimizerView
from gradwatch.wire.statistics import BY_NAME
from gradwatch_dashboard.collector import ask
from gradwatch_dashboard.flow import flow_figure
from gradwatch_dashboard.formats import literal
from gradwatch_dashboard.heatmap import heatmap_figure
from gradwatch_dashboard.layer_health import rows, scores, summary
from gradwatch_dashboard.plot import plot
from gradwatch_dashboard.scalars import scalars_figure
from gradwatch_dashboard.selection import flow_rows, heatmap_rows, layers_rows

COLUMNS = 400
NOTHING_SELECTED = "No layer's name holds these words."


def charts(run: str, optimizer: OptimizerView, findings: Sequence[FindingView]) -> None:
    """Draw the heatmap, the gradient flow and the curves."""
    heading, statistic_place, layers_place = st.columns([3, 1.4, 1.6], vertical_alignment="bottom")
    heading.markdown("#### Layers over steps")
    statistic = statistic_place.selectbox(
        "Statistic", list(BY_NAME), key="statistic", format_func=_label, bind="query-params"
    )
    words = layers_place.text_input(
        "Layers", key="layers", placeholder="all, or part of a name", bind="query-params"
    )
    told = ask(lambda client: client.layers(run, optimizer.name))
    ill = scores(told) if told is not None else {}
    edged = " A coloured edge marks what an open finding names." if ill else ""
    st.caption(f"{BY_NAME[statistic].help}; the input's layer is at the top.{edged}")
    _heatmap(run, optimizer.name, statistic, words, findings, ill)
    if told is not None:
        _layers(layers_rows(told, words))
    left, right = st.columns(2, gap="large")
    with left:
        _flow(run, optimizer.name, words)
    with right:
        _scalars(run, optimizer.name, findings)


def _label(statistic: str) -> str:
    return BY_NAME[statistic].label


def _heatmap(
    run: str,
    optimizer: str,
    statistic: str,
    words: str,
    findings: Sequence[FindingView],
    ill: Mapping[str, float],
) -> None:
    heatmap = ask(
        lambda client: client.heatmap(run, optimizer, statistic, columns=COLUMNS),
        absent="No frame holds this statistic yet.",
    )
    if heatmap is None:
        return
    shown = heatmap_rows(heatmap, words)
    if not shown.layers:
        st.caption(NOTHING_SELECTED)
        return
    figure = heatmap_figure(shown, findings, ill)
    plot(
        figure,
        key="heatmap",
        alt=f"Heatmap of the {_label(statistic)} of each layer over steps",
    )


def _layers(told: LayersView) -> None:
    """Each layer's health, for who wants to know which one is ill."""
    if not told.layers:
        return
    with st.expander(summary(told), key="layer_health"):
        at = "" if told.step is None else f" The gradient norm is that of step {told.step:,}."
        st.caption(f"Health is {literal(told.definition)}.{at}")
        st.dataframe(
            rows(told),
            hide_index=True,
            column_config={
                "layer": st.column_config.TextColumn("Layer", width="medium"),
                "health": st.column_config.ProgressColumn(
                    "Health", min_value=0, max_value=100, format="%.0f", width="small"
                ),
                "findings": st.column_config.TextColumn("Open findings", width="large"),
                "norm": st.column_config.NumberColumn("Gradient norm", format="%.2e"),
            },
        )


def _flow(run: str, optimizer: str, words: str) -> None:
    flow = ask(
        lambda client: client.flow(run, optimizer),
        absent="The gradient flow appears with the first detailed frame.",
    )
    if flow is None:
        return
    st.markdown(f"#### Gradient flow at step {flow.step:,}")
    shown = flow_rows(flow, words)
    if not shown.layers:
        st.caption(NOTHING_SELECTED)
        return
    plot(
        flow_figure(shown),
        key="flow",
        alt="Mean, standard deviation and maximum of each layer's gradient as bars",
    )


def _scalars(run: str, optimizer: str, findings: Sequence[FindingView]) -> None:
    scalars = ask(lambda client: client.scalars(run, optimizer), absent="No scalar was logged yet.")
    if scalars is None:
        return
    st.markdown("#### Curves")
    if not scalars.series_bytes:
        st.caption("Nothing was logged: `monitor.log(loss=loss)` draws the loss here.")
        return
    plot(
        scalars_figure(scalars, findings),
        key="scalars",
        alt="Loss and other scalars over steps",
    )
