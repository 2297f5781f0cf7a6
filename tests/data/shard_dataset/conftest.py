"""The data set that the tests of this folder open."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.library import make
from tests.helpers.opened import Opener
from tests.helpers.shared import made_once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "library", make)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("library-index")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def opened(folder: Path, index: Path) -> Opener:
    return Opener(folder, index)
