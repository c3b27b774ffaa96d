"""Tests on several hosts need root, for network namespaces."""

import pytest
from network import why_impossible


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all of them where the machine cannot make namespaces, and say why."""
    if reason := why_impossible():
        for item in items:
            if "tests/hosts/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))
