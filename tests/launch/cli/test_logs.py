"""``fovea logs`` reads the end of regular files, whatever a run directory holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.cli.slurm import logs
from launch.slurm.submit import living
from pipeline.errors import LaunchError
from pipeline.runtime.run_directory import RunDirectory


def made(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    RunDirectory(folder).note("start", attempt=0)
    log = folder / "logs" / "attempt-0000" / "rank-0.log"
    log.parent.mkdir(parents=True)
    return log


def test_the_last_lines_of_a_huge_log_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = made(tmp_path)
    with log.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(0, os.SEEK_END)
        file.write(b"\nsecond\x1b[31m\nlast\n")
    logs(str(tmp_path), lines=2)
    assert capsys.readouterr().out == "second\\x1b[31m\nlast\n"


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_log_that_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    log = made(tmp_path)
    {"fifo": lambda: os.mkfifo(log), "device": lambda: log.symlink_to("/dev/zero"), "folder": log.mkdir}[kind]()
    with pytest.raises(LaunchError, match="must be a regular file"):
        logs(str(tmp_path))


@pytest.mark.parametrize("job", ["[1]", '"x"', "1e400", "-4", "true"])
def test_a_job_number_of_a_wrong_type_names_no_job(tmp_path: Path, job: str) -> None:
    (tmp_path / "submit").mkdir()
    (tmp_path / "submit" / "job.json").write_text(f'{{"job": {job}}}')
    assert living(RunDirectory(tmp_path)) == []
