"""Thresholds other than the defaults: for every run, for a project's, or for one alone.

A TOML file, whose tables are kinds of findings:

    [plateau]                   # every run
    steps = 400
    [project.vision.plateau]    # those of one project
    steps = 1000
    [run.0123456789abcdef0123456789abcdef.exploding]
    growth = 200
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gradwatch.health.judge import DEFAULTS, Settings, settings_of
from gradwatch.health.thresholds import ThresholdError

Table = Mapping[str, object]


class RulesError(ValueError):
    """A file of thresholds that cannot be read, or that names what does not exist."""


class Rules(NamedTuple):
    """The tables of one file. projects: by name. runs: by id."""

    every: Table
    projects: Mapping[str, Table]
    runs: Mapping[str, Table]

    def settings(self, project: str, run: str) -> Settings:
        """The thresholds of one run; what is nearer to it counts."""
        tables = [self.every, self.projects.get(project, {}), self.runs.get(run, {})]
        return settings_of(_merged(tables)) if any(tables) else DEFAULTS


NO_RULES = Rules({}, {}, {})


def load_rules(path: str) -> Rules:
    """The thresholds of a file; the defaults without one. Raises RulesError."""
    if not path:
        return NO_RULES
    try:
        return read_rules(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ThresholdError, tomllib.TOMLDecodeError) as error:
        raise RulesError(f"GRADWATCH_THRESHOLDS={path}: {error}") from None


def read_rules(text: str) -> Rules:
    """Tables of TOML, each of them tried. Raises ThresholdError or tomllib.TOMLDecodeError."""
    every = tomllib.loads(text)
    rules = Rules(every, _tables(every, "project"), _tables(every, "run"))
    tables = {"": rules.every}
    tables |= {f"project.{name}: ": table for name, table in rules.projects.items()}
    tables |= {f"run.{name}: ": table for name, table in rules.runs.items()}
    for place, table in tables.items():
        try:
            settings_of(table)
        except ThresholdError as error:
            raise ThresholdError(f"{place}{error}") from None
    return rules


def _tables(document: dict[str, object], key: str) -> dict[str, Table]:
    """Take the tables under one key out of a document."""
    found = document.pop(key, {})
    if not isinstance(found, Mapping) or not all(isinstance(it, Mapping) for it in found.values()):
        raise ThresholdError(f"{key} must hold tables, as [{key}.NAME.plateau]")
    return {str(name): table for name, table in found.items()}


def _merged(tables: list[Table]) -> dict[str, object]:
    """Thresholds by kind, the later tables' before the earlier ones'."""
    found: dict[str, dict[str, object]] = {}
    for table in tables:
        for kind, values in table.items():
            assert isinstance(values, Mapping)
            found.setdefault(kind, {}).update(values)
    return dict(found)
