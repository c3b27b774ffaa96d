"""The table of settings, the class that holds their values, and the page that documents them."""

import dataclasses
import socket
from pathlib import Path

import pytest

from vllm_efa_ep.bootstrap.keep_alive import expect_signs_of_life
from vllm_efa_ep.config import SETTINGS, Setting, Settings, settings_markdown
from vllm_efa_ep.errors import ConfigurationError

_TYPES = {"string": str, "integer": int, "number": float}


def test_the_table_and_the_class_agree() -> None:
    """Same fields, same order, same defaults."""
    fields = dataclasses.fields(Settings)
    assert [(setting.field, setting.default) for setting in SETTINGS] == [(f.name, f.default) for f in fields]
    assert Settings.from_environment({}) == Settings()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.variable)
def test_a_setting_is_complete(setting: Setting) -> None:
    """Variable, type, default and meaning fit together."""
    assert setting.variable == f"EFA_EP_{setting.field.upper()}"
    assert isinstance(setting.default, _TYPES[setting.kind])
    assert setting.meaning.endswith(".")
    assert setting.parse(str(setting.default)) == setting.default


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.variable)
def test_the_environment_is_read(setting: Setting) -> None:
    """Each variable sets its field and no other; an empty one counts as unset."""
    text = (
        setting.choices[-1]
        if setting.choices
        else {"string": "some text", "integer": "77", "number": "2.5"}[setting.kind]
    )
    value = _TYPES[setting.kind](text)
    read = Settings.from_environment({setting.variable: text, "PATH": "/bin"})
    assert read == dataclasses.replace(Settings(), **{setting.field: value})
    assert Settings.from_environment({setting.variable: ""}) == Settings()


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("EFA_EP_TIMEOUT_S", "soon", ["'soon'", "number"]),
        ("EFA_EP_TIMEOUT_S", "0", ["0", "0.1 seconds"]),
        ("EFA_EP_TIMEOUT_S", "nan", ["nan", "0.1 seconds"]),
        ("EFA_EP_RANKS_PER_NODE", "1.5", ["'1.5'", "integer"]),
        ("EFA_EP_RANKS_PER_NODE", "-1", ["-1", "at least 0 ranks"]),
        ("EFA_EP_CHUNK_BYTES", "0", ["at least 1 bytes"]),
        ("EFA_EP_CHUNK_BYTES", "256k", ["'256k'", "integer"]),
        ("EFA_EP_RING_COMMANDS", "15", ["at least 16 commands"]),
        ("EFA_EP_BACKEND", "fast", ["'fast'", "high_throughput", "low_latency"]),
        ("EFA_EP_TIMEOUT_S", "inf", ["inf", "at most 131071 seconds"]),
        ("EFA_EP_TIMEOUT_S", "1e10", ["10000000000", "at most 131071 seconds"]),
        ("EFA_EP_MASK_WINDOW_S", "inf", ["inf", "at most 131071 seconds"]),
        ("EFA_EP_HOST_TIMEOUT_S", "200000", ["200000", "at most 131071 seconds"]),
        ("EFA_EP_RING_COMMANDS", "1048577", ["1048577", "at most 1048576 commands"]),
        ("EFA_EP_NICS_PER_RANK", "10000000000", ["at most 1024 NICs"]),
        ("EFA_EP_RANKS_PER_NODE", "1025", ["at most 1024 ranks"]),
    ],
)
def test_a_bad_value_is_refused(variable: str, text: str, words: list[str]) -> None:
    """The error names the variable, the value and what is accepted."""
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_environment({variable: text})
    for word in [variable, *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("chunk_bytes", 0, ["EFA_EP_CHUNK_BYTES=0", "at least 1 bytes"]),
        ("chunk_bytes", 4096.0, ["EFA_EP_CHUNK_BYTES=4096.0 is no integer"]),
        ("num_sms", None, ["EFA_EP_NUM_SMS=None is no integer"]),
        ("ring_commands", -1, ["EFA_EP_RING_COMMANDS=-1", "at least 16 commands"]),
        ("timeout_s", float("nan"), ["EFA_EP_TIMEOUT_S=nan", "at least 0.1 seconds"]),
        ("timeout_s", "120", ["EFA_EP_TIMEOUT_S='120' is no number"]),
        ("libfabric", None, ["EFA_EP_LIBFABRIC=None is no string"]),
        ("signal_policy", "none", ["EFA_EP_SIGNAL_POLICY='none'", "counted"]),
    ],
)
def test_a_bad_value_in_a_program_is_refused(field: str, value: object, words: list[str]) -> None:
    """As in the environment: a chunk of 0 bytes would divide by zero, far from here."""
    with pytest.raises(ConfigurationError) as refused:
        Settings(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        dataclasses.replace(Settings(), **{field: value})  # type: ignore[arg-type]
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("host_timeout_s", [4, 131071])
def test_a_host_may_be_silent_for_as_long_as_tcp_takes(host_timeout_s: int) -> None:
    """At both bounds."""
    assert Settings(host_timeout_s=host_timeout_s).host_timeout_s == host_timeout_s
    with socket.socket() as connection:
        expect_signs_of_life(connection, host_timeout_s)


def test_a_misspelt_variable_is_refused() -> None:
    """It would otherwise be ignored in silence."""
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_environment({"EFA_EP_TIMEOUT": "3"})
    assert "EFA_EP_TIMEOUT;" in str(refused.value)
    assert "EFA_EP_TIMEOUT_S" in str(refused.value)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """``os.environ`` is read if nothing else is given."""
    monkeypatch.setenv("EFA_EP_CHUNK_BYTES", "4096")
    assert Settings.from_environment().chunk_bytes == 4096


def test_the_documentation_is_generated() -> None:
    """``docs/settings.md`` is what ``vllm-efa-ep settings --markdown`` prints."""
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == settings_markdown()
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `EFA_EP_")]
    assert len(rows) == len(SETTINGS)
