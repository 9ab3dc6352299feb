"""Thresholds of a file: for every run, for a project, for one run."""

import pytest
from synthetic_runs import dense, manifest, new_run, vanishing

from gradwatch.health import plateau
from gradwatch.health import vanishing as early
from gradwatch.health.judge import DEFAULTS
from gradwatch_server import judging
from gradwatch_server.rules import NO_RULES, RulesError, load_rules, read_rules

LAYERS = 10
RUN = "0123456789abcdef0123456789abcdef"
TEXT = f"""
[plateau]
steps = 400
losses = 70
[project.vision.plateau]
steps = 1000
[project."speech to text".vanishing]
ratio = 1e-9
[run.{RUN}.plateau]
steps = 5000
"""


@pytest.mark.parametrize(
    ("project", "run", "steps"),
    [("default", "f" * 32, 400), ("vision", "f" * 32, 1000), ("vision", RUN, 5000)],
)
def test_what_is_nearer_to_a_run_counts(project: str, run: str, steps: int) -> None:
    settings = read_rules(TEXT).settings(project, run)
    assert settings["plateau"] == plateau.Thresholds(steps=steps, losses=70)
    assert settings["vanishing"] == early.Thresholds()


def test_a_project_may_have_any_name() -> None:
    settings = read_rules(TEXT).settings("speech to text", RUN)
    assert settings["vanishing"] == early.Thresholds(ratio=1e-9)


def test_without_a_file_the_defaults_hold() -> None:
    assert load_rules("") is NO_RULES
    assert NO_RULES.settings("vision", RUN) is DEFAULTS


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[plateu]\nsteps = 3", "'plateu' is no kind of finding"),
        ("[project.vision.plateau]\nstep = 3", "project.vision: [plateau] has no 'step'"),
        ("[run.ab.plateau]\nsteps = 'x'", "run.ab: [plateau] steps must be a number, not 'x'"),
        ("project = 3", "project must hold tables"),
        ("[project]\nvision = 3", "project must hold tables"),
        ("[plateau", "Expected ']'"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path, text: str, told: str) -> None:
    path = tmp_path / "thresholds.toml"
    path.write_text(text)
    with pytest.raises(RulesError) as caught:
        load_rules(str(path))
    assert str(caught.value).startswith(f"GRADWATCH_THRESHOLDS={path}: ")
    assert told in str(caught.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(RulesError, match=r"GRADWATCH_THRESHOLDS=/no/such: .*No such file"):
        load_rules("/no/such")


def test_a_run_is_judged_by_its_projects_thresholds(collector) -> None:
    usual, lenient = new_run(), new_run(project="lenient")
    for run in (usual, lenient):
        collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    rules = read_rules("[project.lenient.vanishing]\nratio = 1e-30")
    judging.judge_due(collector.engine, (), rules)
    assert "vanishing" in collector.findings(usual)
    assert "vanishing" not in collector.findings(lenient)
