"""Tests on stand-in CUDA devices run where the library that takes CUDA's place can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.standin.build import unavailable

_HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips these tests, with the reason, where the stand-in cannot be built."""
    own = [item for item in items if item.path.is_relative_to(_HERE)]
    if own and (reason := unavailable()):
        for item in own:
            item.add_marker(pytest.mark.skip(reason=reason))
