"""The dashboard as somebody sees it: the real Streamlit server and a real browser."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from fake_collector import FakeCollector
from fake_runs import FakeRun, run_id, typical_runs
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
WAIT_MS = 20_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"no Chromium at {CHROMIUM}"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def collector() -> Iterator[FakeCollector]:
    with FakeCollector(typical_runs()) as served:
        yield served


@pytest.fixture(scope="module")
def dashboard(collector: FakeCollector) -> Iterator[str]:
    """The address of a dashboard of `collector`, started as `gradwatch up` starts it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "gradwatch_dashboard", "--url", collector.url]
    process = subprocess.Popen([*argv, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, "Streamlit did not start"
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "Streamlit does not answer"
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One tab for all tests: opening the dashboard anew costs seconds each time."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield launched.new_page(viewport={"width": 1400, "height": 1000})
        launched.close()


@pytest.fixture
def page(tab: Page, dashboard: str, collector: FakeCollector) -> Iterator[Page]:
    """The list of runs; a test fails when its page asks anyone but the dashboard."""
    opened = tab
    opened.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    strangers: list[str] = []

    def note(request: Any) -> None:
        if not re.match(r"(http|ws)://127\.0\.0\.1[:/]|data:|blob:", request.url):
            strangers.append(request.url)

    opened.on("request", note)
    runs = list(collector.runs)
    back = opened.get_by_role("link", name="All runs")
    if back.count():
        back.click()
    else:
        opened.goto(dashboard)
    expect(opened.get_by_role("heading", name="Runs")).to_be_visible()
    yield opened
    collector.runs[:] = runs
    opened.remove_listener("request", note)
    assert not strangers


def plot(page: Page, key: str) -> Any:
    """The chart with this key, once it is drawn."""
    chart = page.locator(f".st-key-{key} .js-plotly-plot")
    expect(chart).to_have_count(1)
    expect(chart.locator(".xaxislayer-above").first).to_be_attached()
    return chart


def open_run(page: Page, name: str) -> None:
    page.get_by_role("link", name=name).click()
    expect(page.get_by_role("heading", name=name)).to_be_visible()


def asked_of(collector: FakeCollector, what: str) -> int:
    return sum(path.endswith(what) for path in collector.asked)


def wait_for_refreshes(collector: FakeCollector, what: str, times: int) -> None:
    goal = asked_of(collector, what) + times
    deadline = time.monotonic() + 20
    while asked_of(collector, what) < goal:
        assert time.monotonic() < deadline, "the page does not refresh itself"
        time.sleep(0.1)


def test_from_the_list_to_the_finding_in_one_click(page: Page) -> None:
    expect(page.get_by_text("6 runs: 2 critical, 1 warning")).to_be_visible()
    open_run(page, "sigmoid-10-layers")
    for text in ("Vanishing gradients", "Why it happens", "What to try", "a sigmoid's derivative"):
        expect(page.locator(".gw-card").get_by_text(text).first).to_be_visible()
    heatmap = plot(page, "heatmap")
    expect(heatmap.locator(".heatmaplayer image")).to_have_count(1)
    expect(heatmap.get_by_text("Vanishing gradients, step 12")).to_be_visible()
    # Neighbours that are ill share one edge: the layers 0.weight, 0.bias and 1.weight.
    expect(heatmap.locator(".shapelayer path[style*='rgb(196, 35, 26)']")).to_have_count(1)
    page.get_by_text("Health of each layer: 3 of 10 layers below 100").click()
    table = page.locator(".st-key-layer_health [data-testid='stDataFrame']")
    expect(table).to_be_visible()
    expect(plot(page, "flow").locator(".bars path")).to_have_count(30)
    expect(plot(page, "scalars").locator(".scatterlayer .js-line")).to_have_count(3)
    assert f"run={run_id('sigmoid-10-layers')}" in page.url
    page.reload()
    expect(page.get_by_role("heading", name="sigmoid-10-layers")).to_be_visible()
    page.get_by_role("link", name="All runs").click()
    expect(page.get_by_text("6 runs")).to_be_visible()


def test_non_finite_cells_are_marked_and_named_in_the_legend(page: Page) -> None:
    open_run(page, "rnn-log-of-zero")
    heatmap = plot(page, "heatmap")
    expect(heatmap.locator(".legend").get_by_text("NaN or Inf")).to_be_visible()
    assert heatmap.locator(".scatterlayer .points path").count() >= 10
    expect(plot(page, "flow").get_by_text("64 NaN or Inf elements").first).to_be_visible()


def test_zoom_and_choices_outlive_refreshes(page: Page, collector: FakeCollector) -> None:
    open_run(page, "cnn-baseline")
    page.get_by_role("combobox", name="Statistic").click()
    page.get_by_role("option", name="weight norm").click()
    expect(plot(page, "heatmap").locator(".cbtitle, .colorbar")).to_contain_text(["weight norm"])
    heatmap = plot(page, "heatmap")
    heatmap.scroll_into_view_if_needed()
    box = heatmap.locator(".nsewdrag").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
    page.mouse.up()

    def shown() -> list[float]:
        return heatmap.evaluate("plot => plot._fullLayout.xaxis.range")

    page.wait_for_timeout(300)
    zoomed = shown()
    assert zoomed[0] == pytest.approx(100, abs=5)
    assert zoomed[1] == pytest.approx(200, abs=5)
    running = next(run for run in collector.runs if run.name == "cnn-baseline")
    running.steps_n = 440
    try:
        expect(page.get_by_text("Gradient flow at step 440")).to_be_visible()
        wait_for_refreshes(collector, "heatmap", 1)
        assert shown() == pytest.approx(zoomed)
        expect(heatmap.locator(".colorbar")).to_contain_text("weight norm")
    finally:
        running.steps_n = 400


def test_an_ended_run_is_no_longer_asked_for(page: Page, collector: FakeCollector) -> None:
    run = FakeRun("short", status="running")
    collector.runs.insert(0, run)
    open_run(page, "short")
    plot(page, "scalars")
    wait_for_refreshes(collector, "heatmap", 1)
    run.status = "finished"
    expect(page.get_by_text("Finished")).to_be_visible()
    page.wait_for_timeout(1000)
    before = asked_of(collector, "heatmap")
    page.wait_for_timeout(2600)
    assert asked_of(collector, "heatmap") == before


def test_the_first_run_appears_by_itself(page: Page, collector: FakeCollector) -> None:
    collector.runs.clear()
    expect(page.get_by_text("gradwatch run train.py")).to_be_visible()
    collector.runs.append(FakeRun("the-first"))
    expect(page.get_by_role("link", name="the-first")).to_be_visible()
    expect(page.get_by_text("gradwatch run train.py")).to_have_count(0)


def test_pages_recover_by_themselves_when_the_collector_comes_back(
    page: Page, dashboard: str, collector: FakeCollector
) -> None:
    open_run(page, "cnn-baseline")
    plot(page, "heatmap")
    with collector.away():
        expect(page.get_by_text("does not answer").first).to_be_visible()
    expect(page.get_by_text("does not answer")).to_have_count(0)
    plot(page, "heatmap")
    with collector.away():
        page.goto(f"{dashboard}/run?run={run_id('sigmoid-10-layers')}")
        expect(page.get_by_text("does not answer").first).to_be_visible()
    expect(page.get_by_role("heading", name="sigmoid-10-layers")).to_be_visible()


def test_300_layers_are_drawn_in_seconds_and_hovering_tells_their_whole_names(page: Page) -> None:
    start = time.monotonic()
    open_run(page, "transformer-300-layers")
    heatmap = plot(page, "heatmap")
    expect(heatmap.locator(".heatmaplayer image")).to_have_count(1)
    expect(plot(page, "flow").locator(".bars path")).to_have_count(900)
    assert time.monotonic() - start < 25  # 3 s on two idle cores
    heatmap.scroll_into_view_if_needed()
    box = heatmap.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = heatmap.locator(".hoverlayer .hovertext")
    expect(label).to_contain_text("transformer.module.encoder.layers.feed_forward.projection.")
    assert re.search(r"step [\d,]+gradient norm 0\.\d+", label.text_content() or "")
