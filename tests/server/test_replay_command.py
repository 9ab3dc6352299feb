"""`gradwatch replay` of a run that a collector keeps."""

from click.testing import CliRunner
from synthetic_runs import OPTIMIZER, dense, manifest, new_run, vanishing

from gradwatch.replay_command import NAMES, replay

LAYERS = 10


def recorded(collector):
    run = new_run()
    collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    collector.judge()
    return run


def test_a_run_is_named_by_the_beginning_of_its_id_and_judged_as_it_was(collector):
    run = recorded(collector)
    told = CliRunner().invoke(replay, [run.id[:12], "--url", collector.url])
    assert told.exit_code == 0, told.output
    assert "vanishing, critical from step 0" in told.output
    assert "Nothing differs. Findings: 1." in told.output
    (finding,) = collector.findings(run).values()
    assert f"Layers of {OPTIMIZER}: {len(finding.layers)} of {LAYERS} below 100:" in told.output
    assert f"   25  {', '.join(finding.layers[:NAMES])}" in told.output


def test_other_thresholds_are_compared_with_the_defaults(collector, tmp_path):
    run = recorded(collector)
    stricter = tmp_path / "thresholds.toml"
    stricter.write_text("[vanishing]\nratio = 1e-30\n")
    told = CliRunner().invoke(
        replay, [run.id, "--url", collector.url, "--thresholds", str(stricter)]
    )
    assert told.exit_code == 0, told.output
    assert f"- {OPTIMIZER}: vanishing" in told.output
    assert "Health at the end: 100 of 100 (was 25)." in told.output


def test_a_run_that_the_collector_does_not_have_is_named(collector):
    told = CliRunner().invoke(replay, ["0" * 31, "--url", collector.url])
    assert told.exit_code == 1
    assert "no run's id begins with" in told.output
