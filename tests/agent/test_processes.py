"""Whole training scripts in processes of their own: under `gradwatch run`, failing, and killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradwatch.wire.frame import Drops, Frame, Manifest, Record, RunEnd

from .scripted_collector import Collector

Kept = Callable[[], list[Record]]
Result = subprocess.CompletedProcess[str]

TRAIN = """
    import sys
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())

        def forward(self, inputs):
            return self.head(self.body(inputs))

    def main(steps):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        {watch}
        for step in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(3, 4)).pow(2).mean()
            loss.backward()
            optimizer.step()
            print(repr(loss.item()))
        print(sys.argv, __name__, sys.modules["__main__"].__dict__ is globals())

    if __name__ == "__main__":
        main(int(sys.argv[1]))
"""
WATCH = "import gradwatch; gradwatch.watch(model, optimizer)"


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    def write(source: str, name: str = "train.py", **parts: str) -> Path:
        path = tmp_path / "job" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        source = textwrap.dedent(source)
        for key, value in parts.items():
            source = source.replace(f"{{{key}}}", value)
        path.write_text(source)
        return path

    return write


def python(*arguments: Any, environ: dict[str, str] | None = None, **options: Any) -> Result:
    """Run Python to its end."""
    settings = {"OMP_NUM_THREADS": "1", "GRADWATCH_OVERHEAD_BUDGET": "0", **(environ or {})}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def values(records: list[Record]) -> dict[int, dict[tuple[str, str], float]]:
    """Of each frame, by its step: the number of each statistic and layer."""
    manifests = {
        (record.rank, record.version): record for record in records if isinstance(record, Manifest)
    }
    found: dict[int, dict[tuple[str, str], float]] = {}
    for frame in (record for record in records if isinstance(record, Frame)):
        layers = manifests[frame.rank, frame.manifest].layers
        found[frame.step] = {
            (statistic, layer.name): value
            for statistic, row in zip(frame.columns, frame.matrix().tolist(), strict=True)
            for layer, value in zip(layers, row, strict=True)
        }
    return found


def steps(records: list[Record]) -> list[int]:
    return [record.step for record in records if isinstance(record, Frame)]


def losses(output: str) -> list[float]:
    return [float(line) for line in output.splitlines()[:-1]]


def ends(records: list[Record]) -> list[RunEnd]:
    return [record for record in records if isinstance(record, RunEnd)]


def test_gradwatch_run_sees_what_the_one_line_sees_and_changes_nothing(
    script: Callable[..., Path], kept: Kept, spool: Path
) -> None:
    plain = script(TRAIN, "plain.py", watch="pass")
    lined = script(TRAIN, "lined.py", watch=WATCH)
    by_line = python(lined, 6)
    from_line = kept()
    assert len(list(spool.iterdir())) == 1
    for path in spool.glob("*/*"):
        path.unlink()
    by_run = python("-m", "gradwatch", "run", plain, 6)
    from_run = kept()
    assert by_run.returncode == by_line.returncode == 0, by_run.stderr
    # Two processes may choose other matrix kernels, which differ in a float32's last bits.
    assert losses(by_run.stdout) == pytest.approx(losses(by_line.stdout), rel=1e-5)
    assert f"[{str(plain)!r}, '6'] __main__ True" in by_run.stdout
    assert steps(from_run) == steps(from_line) == [1, 2, 3, 4, 5, 6]
    for step, numbers in values(from_line).items():
        if step == 2:
            # Activations were sampled before the layers were put into the order of their execution.
            numbers = {key: numbers[key] for key in numbers if key[0] != "saturated_fraction"}
        assert values(from_run)[step] == pytest.approx(numbers, rel=1e-5, nan_ok=True)
    last = [
        [record for record in records if isinstance(record, Manifest)][-1]
        for records in (from_run, from_line)
    ]
    assert last[0].layers == last[1].layers
    assert min(last[0].layers, key=lambda layer: layer.depth).name == "body.0.weight"
    assert [end.status for end in ends(from_run)] == ["finished"]


def test_a_script_that_watches_itself_is_one_run_under_gradwatch_run(
    script: Callable[..., Path], kept: Kept, spool: Path
) -> None:
    result = python("-m", "gradwatch", "run", script(TRAIN, watch=WATCH), 4)
    assert result.returncode == 0, result.stderr
    assert len(list(spool.iterdir())) == 1
    assert steps(kept()) == [1, 2, 3, 4]
    assert len(ends(kept())) == 1


def test_a_package_runs_as_python_dash_m_runs_it(
    script: Callable[..., Path], kept: Kept, collector: Collector
) -> None:
    main = script(TRAIN, "pack/__main__.py", watch="from pack import part")
    script("import os", "pack/part.py")
    script("", "pack/__init__.py")
    folder = main.parent.parent
    result = python(
        *("-m", "gradwatch", "run", "--url", collector.url, "-m", "pack", 3), cwd=folder
    )
    assert result.returncode == 0, result.stderr
    assert f"[{str(main)!r}, '3'] __main__ True" in result.stdout
    assert collector.steps == [1, 2, 3]
    assert [run.name for run in collector.runs.values()] == ["pack"]


ENDINGS: dict[str, tuple[str, int]] = {
    "the end of the script": ("pass", 0),
    "sys.exit(3)": ("import sys; sys.exit(3)", 3),
    "an exception": ("raise ValueError('bad label')", 1),
    "the end of its input": ("input()", 1),
    "a broken pipe": ("raise BrokenPipeError(32, 'broken')", 1),
    "Ctrl-C": ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_under_gradwatch_run_a_script_ends_as_under_python(
    how: str, script: Callable[..., Path]
) -> None:
    code, status = ENDINGS[how]
    path = script(f"import sys\nsys.path.pop(0)\n{code}\n", "short.py")
    quick = {"GRADWATCH_DISABLED": "1"}
    alone = python(path, environ=quick, stdin=subprocess.DEVNULL)
    watched = python("-m", "gradwatch", "run", path, environ=quick, stdin=subprocess.DEVNULL)
    assert alone.returncode == watched.returncode == status
    assert watched.stdout == alone.stdout
    assert watched.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


def test_under_gradwatch_run_a_script_is_the_main_module_as_under_python(
    script: Callable[..., Path],
) -> None:
    path = script(
        """
        import atexit, inspect, os, pickle, sys

        class Batch: pass

        def late():
            kind = pickle.loads(pickle.dumps(Batch())).__class__
            os.write(1, f"{kind} {sys.modules['__main__'].late is late}\\n".encode())

        print(__file__, __name__, __package__, __spec__, __annotations__, sys.argv)
        print(inspect.getsource(late)[:9])
        atexit.register(late)
        """,
        "in a folder/main.py",
    )
    quick = {"GRADWATCH_DISABLED": "1"}
    folder, name = path.parent.parent, "in a folder/main.py"
    alone = python(name, environ=quick, cwd=folder)
    watched = python("-m", "gradwatch", "run", name, environ=quick, cwd=folder)
    assert str(path) in alone.stdout
    assert watched.stdout == alone.stdout, watched.stderr


@pytest.mark.parametrize("stderr", ["closed", "full"])
def test_a_standard_error_that_takes_nothing_changes_nothing(
    stderr: str, script: Callable[..., Path], kept: Kept
) -> None:
    path = script(TRAIN, watch=WATCH)
    where = {"closed": "2>&-", "full": "2>/dev/full"}[stderr]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GRADWATCH_OVERHEAD_BUDGET": "0"}
    done = subprocess.run(
        ["sh", "-c", f'"$@" {where}', "sh", sys.executable, str(path), "3"],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 4
    assert steps(kept()) == [1, 2, 3]


def test_optimizers_that_come_and_go_are_watched_as_the_budget_has_it(
    script: Callable[..., Path], kept: Kept
) -> None:
    path = script(
        """
        import torch
        model = torch.nn.Linear(3, 2)
        for task in range(20):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for step in range(2):
                model(torch.ones(1, 3)).sum().backward()
                optimizer.step()
        """
    )
    result = python("-m", "gradwatch", "run", path, environ={"GRADWATCH_OVERHEAD_BUDGET": "0.01"})
    assert result.returncode == 0
    names = {record.optimizer for record in kept() if isinstance(record, Frame)}
    assert 4 <= len(names) <= 6, "the next may be watched after half a minute or so"
    counts = Counter[str]()
    for record in kept():
        counts.update(record.counts if isinstance(record, Drops) else {})
    assert counts["short_lived_optimizer"] == 2 * (20 - len(names))
    assert "optimizers come and go" in result.stderr


def test_options_after_the_script_are_the_scripts_own(script: Callable[..., Path]) -> None:
    path = script("import sys; print(sys.argv[1:])", "show.py")
    arguments = ("--name", "x", "-m", "--help", "--", "--url=y")
    result = python("-m", "gradwatch", "run", path, *arguments)
    assert result.stdout.strip() == str(list(arguments)), result.stderr


def test_a_script_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = python("-m", "gradwatch", "run", "missing.py", cwd=tmp_path)
    assert result.returncode == 1
    assert "there is no script 'missing.py' here" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_setting_that_cannot_be_used_is_told_in_one_line(script: Callable[..., Path]) -> None:
    result = python("-m", "gradwatch", "run", "--norm-every", "0", script("pass"))
    assert result.returncode == 2
    assert "norm_every must be 1 or more" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_script_that_steps_no_optimizer_is_told_so(script: Callable[..., Path]) -> None:
    result = python("-m", "gradwatch", "run", script("print('done')"))
    assert result.returncode == 0
    assert result.stdout == "done\n"
    assert "nothing was recorded: no torch optimizer took a step" in result.stderr


@pytest.mark.parametrize("how", ["one line", "gradwatch run"])
def test_an_exception_that_nobody_caught_marks_the_run_as_failed(
    how: str, script: Callable[..., Path], collector: Collector
) -> None:
    source = TRAIN + "\n        raise RuntimeError('out of patience')\n"
    path = script(source, watch=WATCH if how == "one line" else "pass")
    before = () if how == "one line" else ("-m", "gradwatch", "run")
    result = python(*before, path, 2, environ={"GRADWATCH_URL": collector.url})
    assert result.returncode == 1
    assert "RuntimeError: out of patience" in result.stderr
    (end,) = collector.ends
    assert (end.status, end.reason) == ("failed", "RuntimeError: out of patience")
    assert collector.steps == [1, 2]


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [("0", "finished", ""), ("7", "failed", "exit status 7")],
)
def test_the_status_that_a_script_exits_with_is_that_of_its_run(
    code: str, status: str, reason: str, script: Callable[..., Path], collector: Collector
) -> None:
    path = script(TRAIN + f"\n        raise SystemExit({code})\n", watch="pass")
    result = python(*("-m", "gradwatch", "run", path, 2), environ={"GRADWATCH_URL": collector.url})
    assert result.returncode == int(code)
    assert "Exception ignored" not in result.stderr
    (end,) = collector.ends
    assert (end.status, end.reason) == (status, reason)


def test_a_killed_job_loses_at_most_its_last_second(
    script: Callable[..., Path], kept: Kept, spool: Path
) -> None:
    path = script(
        """
        import sys, time
        import torch
        import gradwatch

        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        monitor = gradwatch.watch(model, optimizer)
        started = time.monotonic()
        while True:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            print(f"{time.monotonic() - started:.3f}", flush=True)
            time.sleep(0.02)
        """
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GRADWATCH_OVERHEAD_BUDGET": "0"}
    with subprocess.Popen(
        [sys.executable, path], env=environ, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        when: list[float] = []
        for line in job.stdout:
            when.append(float(line))
            if when[-1] > 3.0:
                break
        job.send_signal(signal.SIGKILL)
        when += [float(line) for line in job.stdout]
    steps = [record.step for record in kept() if isinstance(record, Frame)]
    assert steps == list(range(1, len(steps) + 1))
    # A second for the flush, the rest for two busy cores.
    assert when[-1] - when[steps[-1] - 1] < 1.0 + 1.0
    assert not [path for path in spool.glob("*/*") if path.suffix == ".part"]


def test_a_killed_jobs_spool_is_sent_by_sync(
    script: Callable[..., Path], collector: Collector, spool: Path
) -> None:
    source = TRAIN.replace("print(sys.argv", "optimizer.step = None; print(sys.argv")
    path = script(source, watch=WATCH)
    path.write_text(
        path.read_text() + "    import os, time; time.sleep(2.5); os.kill(os.getpid(), 9)\n"
    )
    assert python(path, 5).returncode == -signal.SIGKILL
    result = python("-m", "gradwatch", "sync", "--url", collector.url)
    assert result.returncode == 0, result.stderr
    assert collector.steps[:4] == [1, 2, 3, 4]
    assert list(spool.iterdir()) == []


@pytest.mark.slow
def test_ranks_under_torchrun_are_one_run(
    script: Callable[..., Path], collector: Collector
) -> None:
    path = script(
        """
        import torch
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel

        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
        torch.distributed.destroy_process_group()
        """
    )
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    result = python(*launcher, "-m", "gradwatch", "run", "--url", collector.url, path)
    assert result.returncode == 0, result.stderr
    (run,) = collector.runs.values()
    assert run.world_size == 2
    for rank in (0, 1):
        assert [frame.step for frame in collector.frames if frame.rank == rank] == [1, 2, 3, 4]
    assert {record.rank for record in collector.ends} == {0, 1}
    for manifest in collector.manifests:
        assert sorted(layer.name for layer in manifest.layers) == [
            *("0.bias", "0.weight", "1.bias", "1.weight"),
        ]


@pytest.mark.slow
def test_spawned_ranks_without_a_launcher_are_one_run(
    script: Callable[..., Path], collector: Collector
) -> None:
    path = script(
        """
        import sys
        import torch
        from torch import nn

        def work(rank, store):
            import gradwatch
            torch.set_num_threads(1)
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=2
            )
            model = nn.Linear(2, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            with gradwatch.watch(model, optimizer):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()

        if __name__ == "__main__":
            torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
        """
    )
    store = path.parent / "store"
    result = python(path, store, environ={"GRADWATCH_URL": collector.url})
    assert result.returncode == 0, result.stderr
    assert len(collector.runs) == 1
    assert sorted(frame.rank for frame in collector.frames) == [0, 1]


WITHOUT = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {names}:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Missing())
"""
SERVER = {"fastapi", "sqlalchemy", "celery", "alembic", "streamlit", "uvicorn", "apprise"}


def test_without_torch_the_import_works_and_watching_says_what_to_install(
    script: Callable[..., Path],
) -> None:
    path = script(WITHOUT + "\n    import gradwatch\n    gradwatch.watch\n", names="{'torch'}")
    result = python(path)
    assert result.returncode == 1
    assert "gradwatch.watch needs PyTorch" in result.stderr
    assert "pip install 'gradwatch[torch]'" in result.stderr


def test_the_command_line_lists_its_commands_with_nothing_but_the_base_installed(
    script: Callable[..., Path],
) -> None:
    tail = "\n    from gradwatch.cli import main\n    main(['--help'])\n"
    result = python(script(WITHOUT + tail, names=str({"torch", *SERVER})))
    assert result.returncode == 0, result.stderr
    for command in ("up", "run", "sync", "demo"):
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "extra"), [("run", "torch"), ("up", "server,dashboard"), ("demo", "all")]
)
def test_a_command_whose_extra_is_missing_says_what_to_install(
    command: str, extra: str, script: Callable[..., Path]
) -> None:
    tail = f"\n    from gradwatch.cli import main\n    main([{command!r}, '--help'])\n"
    result = python(script(WITHOUT + tail, names=str({"torch", *SERVER})))
    assert result.returncode == 1
    assert f"pip install 'gradwatch[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr
