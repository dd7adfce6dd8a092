"""Settings: from the environment, overridden by flags, refused in one line."""

import os
from pathlib import Path
from typing import Any

import pytest

from app.errors import SettingsError
from app.settings import PREFIX, Settings


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def test_a_variable_overrides_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a variable the default holds; with it, the variable."""
    assert Settings.read({}).port == 8000

    monkeypatch.setenv("NORMGATE_PORT", "9000")

    assert Settings.read({}).port == 9000


def test_a_flag_overrides_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag wins over the environment, which still gives the settings without a flag."""
    monkeypatch.setenv("NORMGATE_PORT", "9000")
    monkeypatch.setenv("NORMGATE_MODEL_STORE", "/srv/models")

    settings = Settings.read({"port": "9001"})

    assert (settings.port, settings.model_store) == (9001, Path("/srv/models"))


@pytest.mark.parametrize("url", ["s3://bucket/models", "gs://bucket"])
def test_a_store_may_be_a_url(url: str) -> None:
    """A URL stays the text it is; what is none is a folder."""
    assert Settings.read({"model_store": url}).model_store == url
    assert Settings.read({"model_store": "a/b"}).model_store == Path("a/b")


def test_lists_are_json_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allowed factories read as a JSON list from a flag as from the environment."""
    text = '["python/a.b:c", "python/d:e"]'
    by_flag = Settings.read({"allowed_factories": text}).allowed_factories

    monkeypatch.setenv("NORMGATE_ALLOWED_FACTORIES", text)

    assert by_flag == ("python/a.b:c", "python/d:e")
    assert Settings.read({}).allowed_factories == by_flag


def test_unknown_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable stops the start, and the message names every one of them."""
    monkeypatch.setenv("NORMGATE_PROT", "9000")
    monkeypatch.setenv("NORMGATE_X", "1")

    with pytest.raises(SettingsError, match=r"^unknown setting NORMGATE_PROT, NORMGATE_X in"):
        Settings.read({})


def test_the_data_variable_is_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """``NORMGATE_DATA`` belongs to tests and benchmarks, and hurts no server beside them."""
    monkeypatch.setenv("NORMGATE_DATA", "/data")

    assert Settings.read({}) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("PORT", "65536"),
        ("PORT", ""),
        ("MAX_BATCH_SIZE", "0"),
        ("QUEUE_SIZE", "1.5"),
        ("DEADLINE_MS", "0"),
        ("MAX_WAIT_MS", "-1"),
        ("DEVICES", "gpu"),
        ("DEVICES", "cuda:0,cpu"),
        ("MAX_PIXELS", "many"),
        ("DRIFT_FALSE_ALARM_BOUND", "1e-31"),  # beyond the evidence that is counted: no alarm, ever
    ],
)
@pytest.mark.parametrize("by_flag", [False, True])
def test_a_bad_value_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, by_flag: bool
) -> None:
    """The line names the setting and the value, wherever the value came from."""
    flags: dict[str, Any] = {}
    if by_flag:
        flags[name.lower()] = value
    else:
        monkeypatch.setenv(PREFIX + name, value)

    with pytest.raises(SettingsError) as caught:
        Settings.read(flags)

    message = str(caught.value)
    assert message.startswith(f"NORMGATE_{name} is {value!r}: ")
    assert "\n" not in message


def test_all_bad_values_are_told_at_once() -> None:
    """Two bad values make one line with both names."""
    with pytest.raises(SettingsError) as caught:
        Settings.read({"port": "x", "queue_size": "0"})

    message = str(caught.value)
    assert "NORMGATE_PORT is 'x'" in message
    assert "NORMGATE_QUEUE_SIZE is '0'" in message
    assert "\n" not in message


@pytest.mark.parametrize("by_flag", [False, True])
def test_a_list_that_is_no_json_is_named(monkeypatch: pytest.MonkeyPatch, by_flag: bool) -> None:
    """A factory without JSON round it is refused in a line that names the setting."""
    if not by_flag:
        monkeypatch.setenv("NORMGATE_ALLOWED_FACTORIES", "python/a:b")

    with pytest.raises(SettingsError, match=r"(?i)^[^\n]*allowed_factories[^\n]*$"):
        Settings.read({"allowed_factories": "python/a:b"} if by_flag else {})


def test_the_readme_lists_every_setting() -> None:
    """The table in the README is what the settings say of themselves."""
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")

    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f"`{field.default}`"
        assert f"| `{PREFIX}{name.upper()}` | {default} | {field.description} |" in readme


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_inflight_bytes": 1000}, "max_inflight_bytes is 1000; one image"),
        ({"deadline_ms": 70_000}, "deadline_ms is 70000; max_deadline_ms is 60000"),
    ],
)
def test_limits_that_do_not_fit(flags: dict[str, Any], words: str) -> None:
    """Settings that contradict each other are refused with both numbers."""
    with pytest.raises(SettingsError, match=words) as caught:
        Settings.read(flags)
    assert "\n" not in str(caught.value)


def test_secrets_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of the wrong form is refused without being repeated in the message."""
    monkeypatch.setenv("NORMGATE_API_KEYS", '{"not": "a-list-with-s3cret"}')

    with pytest.raises(SettingsError) as caught:
        Settings.read({})

    assert "NORMGATE_API_KEYS is not shown" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_settings_cannot_be_changed() -> None:
    """Settings are frozen once read."""
    settings, name = Settings.read({}), "port"

    with pytest.raises(ValueError, match="frozen"):
        setattr(settings, name, 1)
