"""A module of ours is run from any working directory, whatever a person keeps there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runtime.interpreter import alone_environment, module_command, safe_environment
from tests.helpers.runs import ROOT, environment

NAMES = [
    "launch.py",
    "pipeline.py",
    "torch.py",
    "random.py",
    "yaml.py",
    "pydantic.py",
    "launch/__init__.py",
    "pipeline/config/load.py",
]


@pytest.fixture(params=NAMES)
def littered(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a file of a common name that must not be imported."""
    file = tmp_path / request.param
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("raise SystemExit('a file of the working directory was imported')\n")
    return tmp_path


@pytest.mark.parametrize(
    "path", [pytest.param(True, id="on PYTHONPATH"), pytest.param(False, id="found by its own place", marks=pytest.mark.slow)]
)
def test_a_file_in_the_working_directory_is_not_imported(littered: Path, path: bool) -> None:
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"PYTHONPATH": str(ROOT)} if path else {}
    done = subprocess.run(
        module_command("launch.cli.main", "config", "check", "dinov2/scenes_vit_tiny"),
        cwd=littered,
        env=safe_environment(variables),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0 and "in order" in done.stdout, done.stderr


def test_another_package_of_the_name_that_comes_first_on_the_path_does_not_matter(tmp_path: Path) -> None:
    other = tmp_path / "ros" / "launch"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path / 'ros'}:{ROOT}"}
    words = module_command("launch.cli.main", "--version")
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0 and done.stdout.startswith("fovea"), done.stderr


def test_interpreters_of_that_process_leave_the_folder_alone_too(tmp_path: Path) -> None:
    (tmp_path / "launch.py").write_text("print('mine')\n")
    code = "import sys; print(sys.path[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=safe_environment(environment()), capture_output=True, text=True
    )
    assert done.stdout.strip() not in ("", str(tmp_path))


def test_ranks_of_its_own_know_nothing_of_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FOVEA_ATTEMPT", "FOVEA_KEY")
    for name in (*foreign, "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "2")
    variables = alone_environment()
    assert not variables.keys() & set(foreign) and variables["SLURM_JOB_ID"] == "2"
