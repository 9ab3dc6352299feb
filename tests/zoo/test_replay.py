"""`gradwatch replay` and `gradwatch explain`, as a person at a terminal uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradwatch.explain import explain
from gradwatch.health.kinds import KINDS
from gradwatch.replay_command import replay

from .fixtures import Key, train

JOB = Key("F20 head replaced", 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose optimizer does not hold the head."""
    folder = tmp_path_factory.mktemp("replay")
    train(JOB, folder)
    return JOB.path(folder)


def replayed(run: Path, *options: str) -> Result:
    return CliRunner().invoke(replay, [str(run), *options])


def test_a_run_on_disk_is_judged_again(run: Path) -> None:
    result = replayed(run)
    assert result.exit_code == 0, result.output
    assert "never_updated, critical from step 1" in result.output
    assert "the optimizer does not hold them" in result.output
    assert "Health at the end: 25 of 100." in result.output


def test_other_thresholds_show_what_differs(run: Path, tmp_path: Path) -> None:
    thresholds = tmp_path / "thresholds.toml"
    thresholds.write_text("[never_updated]\nsteps = 100000\n")
    result = replayed(run, "--thresholds", str(thresholds))
    assert result.exit_code == 0, result.output
    assert "never_updated, critical from step 1" in result.output
    assert any(
        line.startswith("- ") and "never_updated" in line for line in result.output.splitlines()
    )
    assert "differ (+ new, - gone, ~ changed)" in result.output
    assert "(was 25)" in result.output


def test_the_same_thresholds_show_that_nothing_differs(run: Path, tmp_path: Path) -> None:
    thresholds = tmp_path / "thresholds.toml"
    thresholds.write_text("[never_updated]\nsteps = 10\n")
    assert "Nothing differs." in replayed(run, "--thresholds", str(thresholds)).output


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[exploded]\n", "'exploded' is no kind of finding; known are vanishing"),
        ("[exploding]\ngrwth = 1\n", "[exploding] has no 'grwth'; known are front"),
        ("[exploding]\ngrowth = 'much'\n", "[exploding] growth must be a number, not 'much'"),
        ("[exploding]\nframes = 2.5\n", "frames must be a whole number of frames, not 2.5"),
        ("exploding = 3\n", "exploding must be a table, as [exploding], not 3"),
        ("[exploding\n", "Expected"),
    ],
)
def test_a_mistake_in_a_file_of_thresholds_is_told(
    run: Path, tmp_path: Path, text: str, complaint: str
) -> None:
    thresholds = tmp_path / "thresholds.toml"
    thresholds.write_text(text)
    result = replayed(run, "--thresholds", str(thresholds))
    assert result.exit_code == 1
    assert complaint in result.output


def test_a_folder_without_frames_and_a_run_without_a_collector_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADWATCH_URL", raising=False)
    assert "holds no frames" in replayed(tmp_path).output
    assert "name the collector: --url" in CliRunner().invoke(replay, ["0123abcd"]).output
    assert "neither a folder nor a run's id" in CliRunner().invoke(replay, ["runs/no"]).output


def test_every_kind_is_explained_and_all_are_listed() -> None:
    listed = CliRunner().invoke(explain, []).output
    for kind in KINDS.values():
        assert f"{kind.name} " in listed
        text = " ".join(CliRunner().invoke(explain, [kind.name]).output.split())
        page = f"docs/findings/{kind.name}.md"
        for part in (kind.title, kind.meaning, kind.explanation, kind.action, kind.source, page):
            assert part in text
    assert "Thresholds" in CliRunner().invoke(explain, ["Loss-Spike"]).output


def test_a_kind_that_does_not_exist_is_told_with_those_that_do() -> None:
    result = CliRunner().invoke(explain, ["gremlins"])
    assert result.exit_code == 2
    assert "'gremlins' is no kind of finding; known are vanishing" in result.output
