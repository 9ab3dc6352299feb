import time
from html import escape, unescape

from fake_runs import FakeRun, finding, typical_runs

from gradwatch.health.kinds import KINDS
from gradwatch.health.score import DEFINITION
from gradwatch_dashboard.cards import (
    finding_card,
    flattened,
    named,
    run_facts,
    run_header,
    run_summary,
    top_finding,
)


def test_a_card_tells_what_where_since_when_why_and_what_to_try() -> None:
    card = finding_card(
        finding(
            "vanishing",
            "r",
            layers=["enc.0.weight"],
            summary="The first layer gets nothing.",
            evidence={"ratio": 8.6e-9, "loss": None},
        )
    )
    card = unescape(card)
    kind = KINDS["vanishing"]
    for told in (
        *(kind.title, kind.explanation, kind.action, "Critical", "Open", "steps 12 to 400"),
        *("enc.0.weight", "The first layer gets nothing.", "ratio", "10⁻⁹", "not finite"),
    ):
        assert told in card


def test_what_a_job_names_itself_is_escaped() -> None:
    bad = "<script>alert(1)</script>"
    card = finding_card(
        finding(
            "vanishing",
            "r",
            layers=[bad],
            summary=bad,
            evidence={bad: bad},
            title=bad,
            severity=bad,
        )
    )
    run = FakeRun(bad, project=bad, findings=[finding("vanishing", "r", summary=bad)]).view()
    html = card + run_header(run, 0) + run_facts(run, 0) + run_summary(run)
    html += str(flattened({"x": bad}))
    assert "<script" not in html.lower()
    assert "&lt;script&gt;" in html


def test_many_layers_are_counted_after_the_first() -> None:
    text = named([f"layer{index}" for index in range(300)])
    assert "layer3" in text
    assert "layer4<" not in text
    assert text.endswith("and 296 more layers")


def test_the_worst_open_finding_stands_for_a_run() -> None:
    run = FakeRun("r")
    run.findings = [
        finding("exploding", run.id, id=1, severity="warning", first_step=1),
        finding("vanishing", run.id, id=2, severity="critical", first_step=50),
        finding("dead_units", run.id, id=3, severity="critical", first_step=20),
        finding("non_finite", run.id, id=4, severity="critical", first_step=2, state="resolved"),
    ]
    top = top_finding(run.view())
    assert top is not None
    assert top.id == 3
    assert "+2 other findings" in run_summary(run.view())
    assert top_finding(FakeRun("healthy").view()) is None


def test_a_run_that_sent_nothing_yet_shows_no_numbers() -> None:
    waiting = next(run for run in typical_runs() if run.verdict == "waiting").view()
    assert "Waiting" in run_header(waiting, time.time())
    assert "\N{EN DASH}" in run_facts(waiting, time.time())


def test_the_health_of_a_run_is_shown_with_its_definition() -> None:
    html = run_header(FakeRun("sick", verdict="critical").view(), 0)
    assert "25 of 100" in html
    assert escape(DEFINITION) in html


def test_a_nested_configuration_becomes_dotted_names() -> None:
    config = {"model": {"depth": 10, "act": "relu"}, "lr": 1e-5, "amp": True, "empty": {}}
    assert flattened(config) == {
        "model.depth": "10",
        "model.act": "relu",
        "lr": "1 \N{MULTIPLICATION SIGN} 10⁻⁵",
        "amp": "yes",
        "empty": "{}",
    }
