"""How collector and workers are set: environment variables, with defaults for one machine."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

PREFIX = "GRADWATCH_"
# What a setting may be, where not everything will do.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "notify_local": ("refuse", "allow"),
    "log_format": ("text", "json"),
    "log_level": ("debug", "info", "warning", "error"),
}


def default_data_dir() -> Path:
    """Where the embedded service keeps its database: the user's data folder."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "gradwatch"


@dataclass(frozen=True)
class Settings:
    """What collector and workers need to know. Each field is the variable GRADWATCH_<FIELD>."""

    data_dir: str = ""  # folder of the database and the broker; empty takes the user's
    database_url: str = ""  # SQLAlchemy URL; empty takes SQLite in data_dir
    broker_url: str = ""  # Celery broker; empty takes files in data_dir, without any server
    notify: str = ""  # Apprise URLs that get every alert, separated by spaces
    notify_local: str = "refuse"  # or allow: alerts may go to loopback and link-local addresses
    server_token: str = ""  # bearer token that every request must carry; empty on loopback only
    dashboard_url: str = ""  # shown in alerts, and where the collector's front page leads
    judge_every_s: float = 4.0  # seconds between two judgements of a run
    thresholds: str = ""  # TOML file of thresholds that differ from the detectors' defaults
    silent_after_s: float = 120.0  # a running job without a frame for so long is shown as silent
    requests_a_s: float = 1000.0  # a second that one token may send
    keep_frames_days: float = math.inf  # frames of single steps; what they fold into stays
    keep_histograms_days: float = math.inf  # histograms of single steps; their sums stay
    keep_runs_days: float = math.inf  # whole runs, after their last frame
    keep_rank_steps: float = 2000.0  # steps for which frames of single ranks are kept
    log_format: str = "text"  # or json: one object a line
    log_level: str = "info"  # debug, info, warning or error; a worker's --loglevel comes first

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Settings from the environment. Raises ValueError naming the variable that is wrong."""
        values: dict[str, str | float] = {}
        for field in fields(cls):
            variable = PREFIX + field.name.upper()
            # A variable that is set to nothing, as compose files do, is not set.
            text = environ.get(variable, "").strip()
            if text:
                number = isinstance(field.default, float)
                values[field.name] = (
                    _positive(variable, text, endless=field.default == math.inf)
                    if number
                    else _known(field.name, variable, text)
                )
        return cls(**values)  # pyright: ignore[reportArgumentType]

    @property
    def folder(self) -> Path:
        return Path(self.data_dir) if self.data_dir else default_data_dir()

    @property
    def database(self) -> str:
        """The database's SQLAlchemy URL."""
        return self.database_url or f"sqlite:///{self.folder / 'gradwatch.db'}"

    @property
    def broker_folder(self) -> Path:
        """Where the broker without a server keeps its messages."""
        return self.folder / "broker"

    @property
    def channels(self) -> list[str]:
        """The Apprise URLs that get every alert."""
        return self.notify.split()


def _known(name: str, variable: str, text: str) -> str:
    choices = CHOICES.get(name)
    if choices and text not in choices:
        raise ValueError(f"{variable}={text!r} is none of {', '.join(choices)}")
    return text


def _positive(variable: str, text: str, endless: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf and not (endless and value == math.inf):
        raise ValueError(f"{variable}={text!r} is not a number above 0{', or inf' * endless}")
    return value
