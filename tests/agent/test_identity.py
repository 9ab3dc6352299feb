"""Ranks of one launch find the same run without a word to each other; launches never share one."""

from __future__ import annotations

import pytest

from gradwatch.identity import Identity, identify

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}


def test_a_process_alone_is_rank_0_of_a_run_of_its_own() -> None:
    first, second = identify("", {}), identify("", {})
    assert first.rank == second.rank == 0
    assert first.world_size == 1
    assert first.run != second.run


def test_ranks_of_one_launch_share_a_run() -> None:
    ranks = [identify("", TORCHRUN | {"RANK": str(rank)}) for rank in range(2)]
    assert ranks[0].run == ranks[1].run
    assert [identity.rank for identity in ranks] == [0, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"MASTER_PORT": "29501"},
        {"TORCHELASTIC_RUN_ID": "other"},
        {"TORCHELASTIC_RESTART_COUNT": "1"},
        {"SLURM_JOB_ID": "12"},
    ],
    ids=str,
)
def test_another_launch_is_another_run(change: dict[str, str]) -> None:
    assert identify("", TORCHRUN | change).run != identify("", TORCHRUN).run


@pytest.mark.parametrize("how", ["torchrun", "by hand on this machine"])
def test_a_launch_on_the_same_port_by_another_launcher_is_another_run(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = dict(TORCHRUN)
    if how != "torchrun":
        del environ["LOCAL_WORLD_SIZE"]
    ours = identify("", environ).run
    assert identify("", environ).run == ours
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert identify("", environ).run != ours


def test_ranks_on_several_machines_do_not_depend_on_their_parents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environ = TORCHRUN | {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node0", "SLURM_JOB_ID": "7"}
    ours = identify("", environ).run
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert identify("", environ).run == ours


def test_a_given_run_is_taken_for_the_first_and_followed_by_others() -> None:
    given = "ab" * 16
    assert identify(given, TORCHRUN) == Identity(given, 1, 2)
    later = identify(given, TORCHRUN, earlier_runs=1).run
    assert later != given
    assert later == identify(given, TORCHRUN | {"RANK": "0"}, earlier_runs=1).run
    assert later != identify(given, TORCHRUN, earlier_runs=2).run


@pytest.mark.parametrize(
    ("environ", "rank", "world_size"),
    [
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 3, 4),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "8"}, 2, 8),
        ({"RANK": "x", "WORLD_SIZE": ""}, 0, 1),
        ({"RANK": "0", "WORLD_SIZE": "0"}, 0, 1),
    ],
)
def test_rank_and_world_size_come_from_the_launcher(
    environ: dict[str, str], rank: int, world_size: int
) -> None:
    found = identify("", environ)
    assert (found.rank, found.world_size) == (rank, world_size)
    assert len(found.run) == 32
