"""The pages without a browser: what they say in each state of the collector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st
from fake_collector import PAGE, FakeCollector
from fake_runs import FakeRun, run_id, typical_runs
from streamlit.testing.v1 import AppTest

import gradwatch_dashboard
from gradwatch_dashboard.run_page import ENDED_REFRESH_S, refresh_s
from gradwatch_dashboard.runs_page import matches, tally

APP = str(Path(gradwatch_dashboard.__file__).with_name("app.py"))
NO_COLLECTOR = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    with FakeCollector(typical_runs()) as served:
        yield served


@pytest.fixture
def opened(collector: FakeCollector, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    return app(collector.url, monkeypatch)


def app(url: str, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setenv("GRADWATCH_URL", url)
    monkeypatch.delenv("GRADWATCH_TOKEN", raising=False)
    st.cache_resource.clear()
    return AppTest.from_file(APP, default_timeout=20)


def text(page: AppTest) -> str:
    """All that the page says."""
    assert not page.exception
    said = [element.body for element in page.get("html")]  # type: ignore[attr-defined]
    parts = (page.title, page.subheader, page.markdown, page.caption, page.error, page.warning)
    said += [element.value for part in (*parts, page.info) for element in part]
    return "\n".join(said)


def test_the_list_shows_each_runs_verdict_in_words_newest_first(opened: AppTest) -> None:
    said = text(opened.run())
    assert "6 runs: 2 critical, 1 warning, 2 healthy, 1 waiting" in said
    pills = [html for html in said.split("\n") if 'class="gw-pill"' in html]
    words = [pill.split("&ensp;")[1].split("<")[0] for pill in pills]
    assert words == ["Waiting", "Healthy", "Critical", "Critical", "Warning", "Healthy"]
    assert "The first layer's gradient is 8.6e-09" in said.replace("&#x27;", "'")


def test_the_list_follows_the_filters(opened: AppTest) -> None:
    opened.run()
    opened.text_input(key="search").set_value("critical nan").run()
    assert "No run matches" in text(opened)
    opened.text_input(key="search").set_value("vanishing").run()
    assert "1 run: 1 critical" in text(opened)
    opened.text_input(key="search").set_value("")
    opened.selectbox(key="project").set_value("language").run()
    assert "1 run: 1 healthy" in text(opened)


def test_an_empty_list_teaches_how_to_add_the_agent(
    collector: FakeCollector, opened: AppTest
) -> None:
    collector.runs.clear()
    said = text(opened.run())
    assert "gradwatch.watch(model, optimizer)" in said
    assert "gradwatch run train.py" in said


def test_older_runs_are_shown_on_request(collector: FakeCollector, opened: AppTest) -> None:
    collector.runs[:] = [FakeRun(f"run-{index}") for index in range(PAGE + 5)]
    assert f"{PAGE} runs" in text(opened.run())
    opened.button(key="runs_more").click().run()
    assert f"{PAGE + 5} runs" in text(opened)
    assert not [button for button in opened.button if button.key == "runs_more"]


def test_a_collector_that_does_not_answer_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = text(app(NO_COLLECTOR, monkeypatch).run())
    assert "does not answer" in said
    assert NO_COLLECTOR in said
    assert "gradwatch up" in said


def test_a_wrong_token_is_told_apart_from_a_dead_collector(
    collector: FakeCollector, opened: AppTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector.token = "secret"
    assert "GRADWATCH_TOKEN" in text(opened.run())
    monkeypatch.setenv("GRADWATCH_TOKEN", "secret")
    assert "6 runs" in text(opened.run())


def test_a_link_that_names_a_run_opens_it(opened: AppTest) -> None:
    opened.query_params["run"] = run_id("rnn-log-of-zero")
    said = text(opened.run())
    assert opened.title[0].value == r"rnn\-log\-of\-zero"
    assert "64 NaN gradients in layers.4.bias at step 310" in said
    assert "ValueError: loss is nan" in said
    assert "Gradient flow at step 400" in said
    assert len(opened.get("bidi_component")) == 3


def test_the_layers_that_do_worst_stand_first_in_their_table_with_what_health_means(
    opened: AppTest,
) -> None:
    opened.query_params["run"] = run_id("sigmoid-10-layers")
    said = text(opened.run())
    assert "A coloured edge marks what an open finding names." in said
    assert "less 5% (info), 35% (warning), 75% (critical)" in said.replace("\\", "")
    assert "Health of each layer: 3 of 10 layers below 100" in [
        each.label for each in opened.expander
    ]
    table = opened.dataframe[0].value
    ill = ["layers.0.weight", "layers.0.bias", "layers.1.weight"]
    assert table["layer"].tolist()[:3] == ill
    assert table["health"].tolist() == [25.0] * 3 + [100.0] * 7
    assert table["findings"].tolist()[:4] == ["Vanishing gradients"] * 3 + [""]
    opened.text_input(key="layers").set_value("bias").run()
    assert opened.dataframe[0].value["layer"].tolist()[0] == "layers.0.bias"


def test_a_healthy_run_has_no_coloured_edges(opened: AppTest) -> None:
    opened.query_params["run"] = run_id("cnn-baseline")
    assert "coloured edge" not in text(opened.run())
    assert "Health of each layer: 10 layers at 100" in [each.label for each in opened.expander]


def test_a_link_to_an_unknown_run_says_so(opened: AppTest) -> None:
    opened.query_params["run"] = "0" * 32
    assert "no run 00000000" in text(opened.run())


def test_a_run_without_frames_waits_without_pictures(opened: AppTest) -> None:
    opened.query_params["run"] = run_id("just-started")
    said = text(opened.run())
    assert "No step was recorded yet" in said
    assert not opened.get("bidi_component")


def test_only_the_layers_asked_for_are_drawn(opened: AppTest) -> None:
    opened.query_params["run"] = run_id("sigmoid-10-layers")
    opened.run()
    opened.text_input(key="layers").set_value("no such layer").run()
    assert "No layer's name holds these words" in text(opened)
    assert len(opened.get("bidi_component")) == 1  # the curves


def test_the_optimizer_is_chosen_only_where_there_are_several(opened: AppTest) -> None:
    opened.query_params["run"] = run_id("cnn-baseline")
    opened.run()
    assert len(opened.get("button_group")) == 1
    opened.query_params["run"] = run_id("sigmoid-10-layers")
    opened.run()
    assert not opened.get("button_group")


def test_a_run_with_many_layers_refreshes_less_often_and_an_ended_one_seldom() -> None:
    small, large, ended = (
        FakeRun("a", status="running").view(),
        FakeRun("b", status="running", depth=300).view(),
        FakeRun("c", status="failed").view(),
    )
    assert refresh_s(small) < refresh_s(large) < refresh_s(ended) == ENDED_REFRESH_S
    assert refresh_s(FakeRun("d", status="running", steps_n=0).view()) == refresh_s(small)


def test_every_word_of_a_search_must_match() -> None:
    run = typical_runs()[2].view()
    assert matches(run, "SIGMOID demo", None)
    assert matches(run, "", "demo")
    assert not matches(run, "sigmoid relu", None)
    assert not matches(run, "", "language")


def test_a_tally_names_only_verdicts_that_occur() -> None:
    assert tally([FakeRun("a").view()]) == "1 run: 1 healthy"
    assert tally([]) == "0 runs"
