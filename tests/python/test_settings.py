"""The table of settings, the class that holds their values, and the page that documents them."""

import dataclasses
from pathlib import Path

import pytest

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
    ],
)
def test_a_bad_value_is_refused(variable: str, text: str, words: list[str]) -> None:
    """The error names the variable, the value and what is accepted."""
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_environment({variable: text})
    for word in [variable, *words]:
        assert word in str(refused.value)


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
