"""How the agent is set: keywords of `watch`, else environment variables, else these defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PREFIX = "GRADWATCH_"


class SettingError(ValueError):
    """A setting has a value that cannot be used. The message names the variable."""


def default_spool() -> Path:
    """Where runs are kept on local disk: the user's data folder."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "gradwatch" / "spool"


@dataclass(frozen=True)
class Settings:
    """What the agent needs to know. Each field is the variable GRADWATCH_<FIELD> as well."""

    url: str = ""  # the collector, as http://127.0.0.1:8470; empty keeps the run on local disk
    token: str = ""  # sent as a bearer token
    project: str = "default"
    name: str = ""  # empty takes the script's name
    run_id: str = ""  # joins ranks that cannot tell that they belong together; 32 hex digits
    norm_every: int = 1  # steps between norm frames, at least
    detail_every: int = 20  # steps between detail frames, at least
    overhead_budget: float = (
        0.01  # share of the training time that the agent may take; 0 = no limit
    )
    spool: str = ""  # folder; empty takes the user's data folder
    spool_limit_mb: int = 1024  # on disk, for each process
    disabled: bool = False  # makes watch() do nothing

    @property
    def spool_dir(self) -> Path:
        return Path(self.spool) if self.spool else default_spool()

    @classmethod
    def load(cls, given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Settings:
        """Settings from keywords (None means not given) over the environment over defaults.

        Raises SettingError when a value cannot be used.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            text = environ.get(PREFIX + field.name.upper())
            if given.get(field.name) is not None:
                values[field.name] = given[field.name]
            elif text is not None:
                values[field.name] = _parse(field.name, text, type(field.default))
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        for name in ("norm_every", "detail_every", "spool_limit_mb"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.overhead_budget <= 1:
            raise SettingError(
                f"overhead_budget is a share from 0 to 1, not {self.overhead_budget}"
            )
        if self.url and not self.url.startswith(("http://", "https://")):
            raise SettingError(f"url must start with http:// or https://, not {self.url!r}")
        if self.run_id and not _is_run_id(self.run_id):
            raise SettingError(f"run_id must be 32 hexadecimal digits, not {self.run_id!r}")


def default_run_name() -> str:
    """The training script's name, which is what people call their run before they name it."""
    script = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else ""
    return script if script not in ("", "-c", "-m") else "notebook"


def _is_run_id(text: str) -> bool:
    return len(text) == 32 and all(digit in "0123456789abcdef" for digit in text)


def _parse(name: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return text.strip().lower() in ("1", "true", "yes", "on")
        return kind(text)
    except ValueError:
        variable = PREFIX + name.upper()
        raise SettingError(f"{variable}={text!r} is not a {kind.__name__}") from None
