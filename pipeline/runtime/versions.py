"""The version of this package."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def fovea_version() -> str:
    """Version of the installed package; of the checkout where it is run without being installed, as on a machine without a
    package registry; else ``unknown``.
    """
    try:
        return version("fovea")
    except PackageNotFoundError:
        return str(tomllib.loads(_PROJECT.read_text())["project"]["version"]) if _PROJECT.is_file() else "unknown"
