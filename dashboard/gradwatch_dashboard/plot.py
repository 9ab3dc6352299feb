"""Plotly figures that keep a reader's zoom while their data grows.

Streamlit's own chart is another element for every other figure: each refresh would draw it anew,
with a flicker and without the zoom. This one hands each figure to the plot that stands already.
"""

from __future__ import annotations

from pathlib import Path

import plotly
import plotly.graph_objects as go
from streamlit.components.v1 import declare_component
from streamlit.components.v2 import component

# Serves plotly's own script, so that pages need no Internet.
declare_component("plotlyjs", path=Path(plotly.__file__).with_name("package_data"))
LIBRARY = f"component/{__name__}.plotlyjs/plotly.min.js"

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": '"Source Sans", "Source Sans Pro", sans-serif', "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": ["#3182bd"],
        "xaxis": {"automargin": True, "gridcolor": "rgba(128,128,128,0.25)"},
        "yaxis": {"automargin": True, "gridcolor": "rgba(128,128,128,0.25)"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#8a919c", "activecolor": "#31688e"},
        "hoverlabel": {"font": {"size": 13}},
    }
)

SCRIPT = """
const CONFIG = {displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"]};

function library() {
  window.gradwatchPlotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("LIBRARY", document.baseURI);
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => { window.gradwatchPlotly = undefined; reject(script.src); };
    document.head.append(script);
  });
  return window.gradwatchPlotly;
}

export default function ({data, parentElement}) {
  const place = parentElement.querySelector(".gw-plot");
  const figure = JSON.parse(data.figure);
  place.setAttribute("aria-label", data.alt);
  place.style.height = `${figure.layout.height}px`;
  library().then(
    (Plotly) => {
      Plotly.react(place, figure.data, figure.layout, CONFIG);
      if (!place.observer) {
        place.observer = new ResizeObserver(() => place.isConnected && Plotly.Plots.resize(place));
        place.observer.observe(place);
      }
    },
    (source) => { place.textContent = `The plot's script could not be loaded: ${source}`; },
  );
  return () => setTimeout(() => {
    // Called before each update too: only a plot that left the page is taken down.
    if (!place.isConnected && place.observer) {
      place.observer.disconnect();
      window.Plotly.purge(place);
    }
  });
}
""".replace("LIBRARY", LIBRARY)

_mount = component(
    "gradwatch_plot",
    html='<div class="gw-plot" role="figure"></div>',
    js=SCRIPT,
    # plotly's styles are the page's, and cannot be seen from within a shadow root.
    isolate_styles=False,
)


def plot(figure: go.Figure, *, key: str, alt: str) -> None:
    """Show a figure of fixed height. `key` tells which plot it updates, `alt` what it shows."""
    figure.update_layout(template=TEMPLATE, autosize=True)
    _mount(key=key, data={"figure": figure.to_json(), "alt": alt})
