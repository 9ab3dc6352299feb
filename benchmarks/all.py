"""Runs every benchmark of this folder and prints its table; with --json, one object of them all."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, where there are many")
    given = parser.parse_args()
    scripts = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)
    figures: dict[str, object] = {}
    failed: list[str] = []
    for number, script in enumerate(scripts, start=1):
        filled = "#" * number + "." * (len(scripts) - number)
        print(f"[{filled}] {script.stem}", file=sys.stderr, flush=True)
        options = ["--json"] if given.json else []
        if given.quick and '"--quick"' in script.read_text():
            options.append("--quick")
        command = [sys.executable, str(script), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(script.stem)
        elif given.json:
            figures[script.stem] = json.loads(done.stdout)
        else:
            print(f"\n== {script.stem}\n{done.stdout}")
    if given.json:
        print(json.dumps(figures))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
