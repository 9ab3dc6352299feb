"""The parts of docs/findings that the code says: `python -m tests.health.pages` writes them.

In a page such a part stands between `<!-- code: NAME -->` and `<!-- /code -->`; all else is prose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gradwatch.explain import PAGES
from gradwatch.health.judge import DETECTORS
from gradwatch.health.kinds import KINDS
from gradwatch.health.score import DEFINITION
from gradwatch.health.thresholds import thresholds_of

FOLDER = Path(__file__).parents[2] / PAGES
INDEX = FOLDER / "README.md"


def page_of(kind: str) -> Path:
    return FOLDER / f"{kind}.md"


def with_parts(page: str, parts: Mapping[str, str], source: str = "code") -> str:
    """The page with these parts written anew. Raises ValueError for one that has no place in it.

    parts: name -> Markdown. source: what says them, the first word of the marks.
    """
    for name, text in parts.items():
        marks = rf"(<!-- {source}: {name} -->\n).*?(<!-- /{source} -->)"
        page, count = re.subn(
            marks, lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"there must be one part <!-- {source}: {name} -->, not {count}")
    return page


def parts_of(kind: str) -> dict[str, str]:
    """What the code says in a kind's page."""
    row = KINDS[kind]
    (detector,) = (each for each in DETECTORS if each.kind == kind)
    lines = ["| threshold | default | unit | reason |", "|---|---|---|---|"]
    lines += [
        f"| `{each.name}` | {each.default:g} | {each.unit} | {each.reason} |"
        for each in thresholds_of(detector.thresholds)
    ]
    return {
        "head": f"# {row.title}\n\n`{kind}`: {row.meaning}",
        "action": row.action,
        "source": f"{row.source}.",
        "thresholds": "\n".join(lines),
    }


def index_parts() -> dict[str, str]:
    """What the code says in the index."""
    lines = ["| finding | kind | what it means |", "|---|---|---|"]
    lines += [
        f"| [{kind.title}]({kind.name}.md) | `{kind.name}` | {kind.meaning} |"
        for kind in KINDS.values()
    ]
    return {"kinds": "\n".join(lines), "health": f"> {DEFINITION}"}


def write() -> None:
    """Bring every page up to date with the code. Raises OSError for a kind without a page."""
    parts = {page_of(kind): parts_of(kind) for kind in KINDS} | {INDEX: index_parts()}
    for path, said in parts.items():
        page = path.read_text(encoding="utf-8")
        path.write_text(with_parts(page, said), encoding="utf-8")


if __name__ == "__main__":
    write()
