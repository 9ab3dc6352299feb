"""Settings: keywords over variables over defaults, and what cannot be used is named."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gradwatch.settings import PREFIX, SettingError, Settings, default_run_name


def test_without_anything_given_the_defaults_hold() -> None:
    assert Settings.load({}, {}) == Settings()


def test_a_keyword_wins_over_the_variable_and_none_means_not_given() -> None:
    environ = {"GRADWATCH_NORM_EVERY": "7", "GRADWATCH_PROJECT": "theirs"}
    settings = Settings.load({"norm_every": 3, "project": None}, environ)
    assert settings.norm_every == 3
    assert settings.project == "theirs"


def test_every_setting_can_be_given_as_a_variable_of_its_type() -> None:
    texts = {"url": "http://host:1", "run_id": "0" * 32, "disabled": "yes", "overhead_budget": "1"}
    texts |= {"locate_nan": "yes", "stop_on": "non_finite, exploding"}
    for field in fields(Settings):
        text = texts.get(field.name, "5")
        settings = Settings.load({}, {PREFIX + field.name.upper(): text})
        value = getattr(settings, field.name)
        assert value != field.default
        assert type(value) is type(field.default)


@pytest.mark.parametrize("text", ["", "  "])
def test_a_variable_set_to_nothing_is_not_set(text: str) -> None:
    assert Settings.load({}, {"GRADWATCH_NORM_EVERY": text}) == Settings()


@pytest.mark.parametrize(
    ("text", "disabled"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("no", False)]
)
def test_truth_has_several_words(text: str, disabled: bool) -> None:
    assert Settings.load({}, {"GRADWATCH_DISABLED": text}).disabled is disabled


BAD: list[tuple[str, Any]] = [
    ("norm_every", "0"),
    ("norm_every", "often"),
    ("norm_every", "2.5"),
    ("detail_every", "-1"),
    ("spool_limit_mb", "0"),
    ("overhead_budget", "1.5"),
    ("stop_on", "non_finite,nan"),
    ("overhead_budget", "nan"),
    ("overhead_budget", "-0.1"),
    ("url", "localhost:8470"),
    ("run_id", "abc"),
    ("disabled", "perhaps"),
    ("token", "two\nlines"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_told_by_variable_and_by_keyword(name: str, value: Any) -> None:
    variable = PREFIX + name.upper()
    with pytest.raises(SettingError, match=variable):
        Settings.load({}, {variable: value})
    with pytest.raises(SettingError, match=f"^{name}"):
        Settings.load({name: value}, {})


@pytest.mark.parametrize("value", [2.5, object(), float("inf"), [1]])
def test_a_keyword_of_the_wrong_type_is_told_as_a_setting(value: Any) -> None:
    with pytest.raises(SettingError, match="norm_every must be a whole number"):
        Settings.load({"norm_every": value}, {})


def test_a_token_is_never_repeated_in_an_error() -> None:
    with pytest.raises(SettingError) as error:
        Settings.load({"token": "secret\n"}, {})
    assert "secret" not in str(error.value)


def test_the_spool_is_in_the_users_data_folder_unless_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert Settings().spool_dir == tmp_path / "gradwatch" / "spool"
    assert Settings(spool="/else").spool_dir == Path("/else")


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["/home/me/train.py", "--lr", "1"], "train.py"),
        (["/home/me/package/__main__.py"], "package"),
        (["-c"], "notebook"),
        ([""], "notebook"),
        ([], "notebook"),
    ],
)
def test_a_run_is_named_after_its_script(
    argv: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert default_run_name() == name


def test_a_user_without_a_home_has_a_spool_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert Settings().spool_dir.is_relative_to(tempfile.gettempdir())
