"""The dashboard's entry: `streamlit run app.py`."""

from __future__ import annotations

import streamlit as st

from gradwatch_dashboard import run_page, runs_page
from gradwatch_dashboard.cards import STYLE

# Inline, because a named icon is fetched from a font server: pages must work without Internet.
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16" fill="none">'
    '<rect width="16" height="16" rx="3" fill="#31688e"/>'
    '<path d="M2 5 L6 8.5 L9.5 10.5 L14 12" stroke="#fde725" stroke-width="2"/></svg>'
)

st.set_page_config(page_title="gradwatch", page_icon=ICON, layout="wide")
st.html(STYLE)

run = st.Page(lambda: run_page.show(runs), title="Run", url_path="run", visibility="hidden")
runs = st.Page(lambda: runs_page.show(run), title="Runs", url_path="runs", default=True)
chosen = st.navigation([runs, run], position="hidden")
# An alert's link names the run alone, whatever page it lands on.
if chosen == runs and run_page.RUN in st.query_params:
    st.switch_page(run, query_params={run_page.RUN: st.query_params[run_page.RUN]})
chosen.run()
