"""First use: a clone, `make demo`, the first picture; and what the base install costs a job.

Runs in a temporary folder and removes it. Needs a package index, and minutes when its cache is
cold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import urllib3

ROOT = Path(__file__).parents[1]
PICTURE_BAR_S = 300.0
SIZE_BAR_MB = 10.0
INSTALL_BAR_S = 10.0
IMPORT_BAR_MS = 50.0
DEADLINE_S = 900.0
IMPORTS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_demo(Path(folder)) | measure_install(Path(folder))
    figures["import_ms"] = measure_import()
    if given.json:
        print(json.dumps(figures))
        return
    bars = {
        "clone_to_first_picture_s": PICTURE_BAR_S,
        "clone_to_verdicts_s": None,
        "base_install_mb": SIZE_BAR_MB,
        "base_install_s": INSTALL_BAR_S,
        "import_ms": IMPORT_BAR_MS,
    }
    print(f"{'figure':28}{'measured':>10}{'bar':>10}")
    for name, value in figures.items():
        bar = bars[name]
        print(f"{name:28}{value:>10.1f}{'' if bar is None else f'{bar:>10.0f}'}")


def measure_demo(folder: Path) -> dict[str, float]:
    """Seconds from `git clone` until the dashboard answers, and until the table is printed."""
    started = time.perf_counter()
    clone = folder / "gradwatch"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    printed = folder / "printed.txt"
    with printed.open("w") as output:
        process = subprocess.Popen(
            ["make", "demo"], cwd=clone, stdout=output, stderr=output, start_new_session=True
        )
    try:
        addresses = clone / ".gradwatch" / "demo" / "addresses.json"
        wait_for(process, printed, addresses.exists)
        dashboard = json.loads(addresses.read_text())["dashboard"]
        wait_for(process, printed, lambda: answers(dashboard))
        picture_s = time.perf_counter() - started
        wait_for(process, printed, lambda: "Look at them" in printed.read_text())
        verdicts_s = time.perf_counter() - started
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
    return {"clone_to_first_picture_s": picture_s, "clone_to_verdicts_s": verdicts_s}


def wait_for(process: subprocess.Popen[bytes], printed: Path, holds: object) -> None:
    """Wait for a condition; give up when the process ends or takes too long."""
    assert callable(holds)
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"make demo did not get there:\n{printed.read_text()}")
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return urllib3.request("GET", url, retries=False, timeout=2.0).status == 200
    except urllib3.exceptions.HTTPError:
        return False


def measure_install(folder: Path) -> dict[str, float]:
    """Megabytes and seconds of `pip install .` where numpy is there already, as with torch."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(folder / "venv" / "bin" / "pip"), "install", "--quiet"]
    wheels = folder / "wheels"
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "numpy"], check=True)
    before = size_of(folder / "venv")
    started = time.perf_counter()
    subprocess.run([*pip, str(wheel)], check=True)
    seconds = time.perf_counter() - started
    megabytes = (size_of(folder / "venv") - before) / 1e6
    return {"base_install_mb": megabytes, "base_install_s": seconds}


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def measure_import() -> float:
    """Milliseconds that importing `gradwatch.watch` takes where torch is imported. Median."""
    code = (
        "import time, torch; t = time.perf_counter(); "
        "from gradwatch import watch; print(time.perf_counter() - t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(IMPORTS)
    ]
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    main()
