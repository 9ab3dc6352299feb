"""The demo as a stranger runs it: a wheel in a fresh environment, then a look at the dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service import ROOT, Service, wait_until

DEMO_DEADLINE_S = 280.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


def fresh_environment(folder: Path, wheel: Path, *extras: str) -> Path:
    """A new virtual environment with the wheel and what it says that it needs, and nothing else.

    What it needs is installed here already, by the same declaration: linked from here it takes
    seconds, where unpacking and compiling it again takes minutes. Returns the folder of programs.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (described,) = packages.glob("gradwatch-*.dist-info")
    for needed in needs(Distribution.at(described), set(extras)).values():
        for file in needed.files or ():
            if ".." not in file.parts:
                link(Path(str(needed.locate_file(file))), packages / file)
    subprocess.run([*pip, "check"], check=True)
    return folder / "bin"


def needs(wanted: Distribution, extras: set[str]) -> dict[str, Distribution]:
    """What a distribution requires with these extras, and all that this requires, by name."""
    found: dict[str, Distribution] = {}
    waiting = [(wanted, frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        distribution, extras_of_it = waiting.pop()
        for text in distribution.requires or ():
            needed = Requirement(text)
            asked = [{"extra": extra} for extra in ("", *extras_of_it)]
            if needed.marker is not None and not any(map(needed.marker.evaluate, asked)):
                continue
            name = canonicalize_name(needed.name)
            target = wanted if name == "gradwatch" else distribution_of(needed)
            if target is not wanted:
                found[name] = target
            if (name, frozenset(needed.extras)) not in seen:
                seen.add((name, frozenset(needed.extras)))
                waiting.append((target, frozenset(needed.extras)))
    return found


def distribution_of(needed: Requirement) -> Distribution:
    """What is installed here for a requirement."""
    found = metadata.distribution(needed.name)
    assert needed.specifier.contains(found.version, prereleases=True), (str(needed), found.version)
    return found


def link(source: Path, target: Path) -> None:
    """One file in two places; a copy of it where a link cannot be made."""
    if target.exists() or not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def demo(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, str]]:
    """A finished demo that left its dashboard up, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    programs = fresh_environment(folder / "venv", wheel, "all")
    printed = folder / "printed.txt"
    with printed.open("w") as output:
        process = subprocess.Popen(
            [str(programs / "gradwatch"), "demo", "--data", str(folder / "data")],
            stdout=output,
            stderr=output,
            cwd=folder,  # the checkout must not be importable
            env={**os.environ, "COLUMNS": "200", "PYTHONPATH": ""},
        )

    def done() -> bool:
        return "Look at them" in printed.read_text() or process.poll() is not None

    wait_until(done, DEMO_DEADLINE_S, printed.read_text)
    assert process.poll() is None, printed.read_text()
    addresses = json.loads((folder / "data" / "addresses.json").read_text())
    yield Service(addresses, process), printed.read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(40) == 0
    assert not living_processes(str(folder)), "the demo left processes behind"


def living_processes(mark: str) -> list[str]:
    """Command lines of processes that mention `mark`."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if mark in line]


def test_every_verdict_is_as_expected(demo: tuple[Service, str]) -> None:
    service, printed = demo
    assert "Every verdict is as expected." in printed
    assert "NOT EXPECTED" not in printed
    verdicts = {run.info.name: run.verdict for run in service.client.runs().runs}
    healthy = {name for name, verdict in verdicts.items() if verdict == "healthy"}
    assert len(verdicts) == 6
    assert healthy == {"healthy-mlp", "healthy-transformer"}


def test_the_run_page_shows_the_finding(demo: tuple[Service, str]) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        reason = "chromium is not installed (Debian package: chromium)"
        if os.environ.get("GRADWATCH_REQUIRE_SERVICES"):
            pytest.fail(reason)
        pytest.skip(reason)
    service, _ = demo
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(
            executable_path=str(chromium), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(service.dashboard)
        page.get_by_text("ten-sigmoids").first.wait_for(timeout=60_000)
        run = next(r for r in service.client.runs().runs if r.info.name == "ten-sigmoids")
        page.goto(f"{service.dashboard}/?run={run.info.id}")
        page.get_by_text("Vanishing gradients").first.wait_for(timeout=60_000)
        page.get_by_text("What to try").first.wait_for(timeout=60_000)
        page.locator(".js-plotly-plot").nth(1).wait_for(timeout=60_000)
        browser.close()


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with nothing but `pip install gradwatch`."""
    return fresh_environment(tmp_path_factory.mktemp("light") / "venv", wheel)


def test_the_base_install_brings_less_than_ten_megabytes_beside_numpy(light: Path) -> None:
    (packages,) = (light.parent / "lib").glob("python*/site-packages")
    ours = [
        path
        for path in packages.rglob("*")
        if path.is_file()
        and not re.match(
            r"(numpy|pip|setuptools|pkg_resources|_distutils)", str(path.relative_to(packages))
        )
    ]
    assert sum(path.stat().st_size for path in ours) < 10e6


def test_without_torch_only_what_needs_it_says_so(light: Path) -> None:
    def python(code: str) -> subprocess.CompletedProcess[str]:
        command = [str(light / "python"), "-c", code]
        return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)

    assert python("import gradwatch; gradwatch.Client").returncode == 0
    refused = python("import gradwatch; gradwatch.watch")
    assert refused.returncode != 0
    assert "pip install 'gradwatch[torch]'" in refused.stderr
    helped = subprocess.run([str(light / "gradwatch"), "--help"], capture_output=True, text=True)
    assert helped.returncode == 0
    assert "gradwatch demo" in helped.stdout
    up = subprocess.run([str(light / "gradwatch"), "up"], capture_output=True, text=True)
    assert up.returncode == 1
    assert "pip install 'gradwatch[server,dashboard]'" in up.stderr
