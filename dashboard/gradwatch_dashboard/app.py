"""The dashboard's entry: `streamlit run app.py`."""

from __future__ import annotations

import streamlit as st

from gradwatch_dashboard import run_page, runs_page
from gradwatch_dashboard.cards import STYLE

st.set_page_config(page_title="gradwatch", page_icon=":material/ecg_heart:", layout="wide")
st.html(STYLE)

run = st.Page(lambda: run_page.show(runs), title="Run", url_path="run", visibility="hidden")
runs = st.Page(lambda: runs_page.show(run), title="Runs", url_path="runs", default=True)
chosen = st.navigation([runs, run], position="hidden")
# An alert's link names the run alone, whatever page it lands on.
if chosen == runs and run_page.RUN in st.query_params:
    st.switch_page(run, query_params={run_page.RUN: st.query_params[run_page.RUN]})
chosen.run()
