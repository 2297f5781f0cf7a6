"""What installers and Docker get: floors without known holes, ports of this machine only, no secrets in the image."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PEERS = set(PROJECT["optional-dependencies"]["peers"])  # not beside transformers 5, which exports need: an environment of its own
REQUIREMENTS = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_every_dependency_has_a_floor_that_this_machine_meets(text: str) -> None:
    one = Requirement(text)
    assert any(part.operator in (">=", "==", "~=") for part in one.specifier), f"{text} has no floor"
    if text in PEERS:
        return
    assert one.name.lower().endswith("-bin") or one.specifier.contains(version(one.name), prereleases=True)


@pytest.mark.parametrize(
    ("name", "holed"), [("pillow", "10.2"), ("pyarrow", "14.0"), ("jinja2", "3.1.5"), ("scikit-learn", "1.4.2")]
)
def test_releases_with_known_holes_are_excluded(name: str, holed: str) -> None:
    matching = [Requirement(text) for text in REQUIREMENTS if Requirement(text).name == name]
    assert matching and not any(one.specifier.contains(holed) for one in matching)


def test_the_tests_install_every_extra() -> None:
    extras = {name: set(texts) for name, texts in PROJECT["optional-dependencies"].items()}
    dependencies = set(PROJECT["dependencies"])
    assert set().union(*extras.values()) - dependencies - PEERS == extras["test"] - PEERS
    assert extras["train"] < dependencies


def test_training_needs_no_extra() -> None:
    """What only benchmarks, exports or Parquet tables import is not imported by any other room."""
    only = {"torchvision": ("pipeline/bench/",), "pyarrow": ("pipeline/data/storage/parquet.py",)}
    only |= dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), ("pipeline/weights/export/",))
    for path in (file for room in ("pipeline", "launch") for file in (ROOT / room).rglob("*.py")):
        names = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
        wrong = [name for name in names if not str(path.relative_to(ROOT)).startswith(only.get(name, ""))]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_services_listen_on_this_machine_and_images_have_a_tag() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "image" not in service or re.search(r":[^/]*[0-9]", service["image"]), name


def test_secrets_and_data_stay_out_of_the_build() -> None:
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert {"**/.env", "**/*.pem", "mlruns", "data", "runs", ".git"} <= ignored


@pytest.mark.slow
def test_a_wheel_holds_every_config_and_two_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("fovea-*.whl"))) as wheel:
        names = wheel.namelist()
    shared = {name.partition("/data/share/fovea/")[2] for name in names if "/data/share/fovea/" in name}
    own = {
        path.relative_to(ROOT).as_posix()
        for folder in ("configs", "slurm")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert own <= shared
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.startswith("fovea-")} == {"pipeline", "launch"}
    modules = {path.relative_to(ROOT).as_posix() for room in ("pipeline", "launch") for path in (ROOT / room).rglob("*.py")}
    assert modules <= set(names)
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline/reports/templates").iterdir()}
    assert templates and templates <= set(names)
