"""How the agent is set: keywords of `watch`, else environment variables, else these defaults."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gradwatch.health.kinds import KINDS

PREFIX = "GRADWATCH_"


class SettingError(ValueError):
    """A setting has a value that cannot be used. The message names the variable."""


def default_spool() -> Path:
    """Where runs are kept on local disk: the user's data folder."""
    base = os.environ.get("XDG_DATA_HOME")
    try:
        data = Path(base) if base else Path.home() / ".local" / "share"
    except RuntimeError:  # a container's user without a name has no home
        data = Path(tempfile.gettempdir()) / f"gradwatch-{os.getuid()}"
    return data / "gradwatch" / "spool"


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
    stop_on: str = ""  # kinds of findings, separated by commas, that end the training by an error
    locate_nan: bool = False  # trace every step, so that the first NaN is named at its own step
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
            name, variable = field.name, PREFIX + field.name.upper()
            # A variable that is set to nothing, as compose files do, is not set.
            text = environ.get(variable, "").strip()
            if given.get(name) is not None:
                values[name] = _checked(name, name, given[name], type(field.default))
            elif text:
                values[name] = _checked(name, variable, text, type(field.default))
        return cls(**values)


def default_run_name() -> str:
    """The training script's name, which is what people call their run before they name it."""
    script = Path(sys.argv[0]) if sys.argv else Path()
    name = script.parent.name if script.name == "__main__.py" else script.name
    return name if name not in ("", "-c", "-m") else "notebook"


def kinds_of(text: str) -> tuple[str, ...]:
    """The kinds of findings that a setting names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _is_run_id(text: str) -> bool:
    return len(text) == 32 and all(digit in "0123456789abcdef" for digit in text)


# What a value must be, beside its type, and how to say so.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "norm_every": (lambda steps: steps >= 1, "must be 1 or more"),
    "detail_every": (lambda steps: steps >= 1, "must be 1 or more"),
    "spool_limit_mb": (lambda size: size >= 1, "must be 1 or more"),
    "overhead_budget": (lambda share: 0 <= share <= 1, "is a share from 0 to 1"),
    "url": (
        lambda url: not url or url.startswith(("http://", "https://")),
        "must start with http:// or https://",
    ),
    "token": (lambda token: token.isascii() and token.isprintable(), "must be plain text"),
    "stop_on": (
        lambda kinds: set(kinds_of(kinds)) <= set(KINDS),
        f"must name kinds of findings, separated by commas; known are {', '.join(KINDS)}",
    ),
    "project": (bool, "must not be empty"),
    "run_id": (_is_run_id, "must be 32 hexadecimal digits"),
}
TYPES: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false"}
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _checked(name: str, where: str, value: Any, kind: type) -> Any:
    """A value as its field's type. `where` is the keyword or variable that gave it."""
    # A token is a secret: it is not repeated where logs are kept.
    shown = "the one given" if name == "token" else repr(value)
    try:
        parsed = str(value).lower() in YES if kind is bool else kind(value)
        # int(2.5) is 2, which nobody asked for.
        if (kind is int and parsed != float(value)) or (
            kind is bool and not parsed and str(value).lower() not in NO
        ):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise SettingError(f"{where} must be {TYPES.get(kind, 'text')}, not {shown}") from None
    holds, wanted = RULES.get(name, (lambda _: True, ""))
    if not holds(parsed):
        raise SettingError(f"{where} {wanted}, not {shown}")
    return parsed
