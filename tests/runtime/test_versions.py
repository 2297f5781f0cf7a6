"""The version of fovea where it is installed, and where a checkout is run without being installed."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pipeline.runtime import versions
from pipeline.runtime.versions import fovea_version

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkout_that_is_not_installed_has_the_version_of_its_project_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    assert fovea_version() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    monkeypatch.setattr(versions, "_PROJECT", tmp_path / "pyproject.toml")
    assert fovea_version() == "unknown"


def test_nothing_else_asks_the_packages_for_it() -> None:
    asking = re.compile(r"""version\(["']fovea["']\)""")
    files = [path for room in ("pipeline", "launch") for path in (ROOT / room).rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in files if asking.search(path.read_text())] == ["pipeline/runtime/versions.py"]
