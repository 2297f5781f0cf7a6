"""Control characters of keys, file names, logs and records never reach the terminal or a report's text."""

from __future__ import annotations

import errno
import io
import json
import logging
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.table import Table

from launch.cli.main import main
from launch.progress import LineLogger
from launch.terminal import Terminal, clean_logs
from pipeline.errors import FoveaError, of_system
from pipeline.reports.comparison import write as report
from pipeline.runtime.run_directory import RunDirectory
from tests.checkpoint.test_manifest import GOOD, JSON, run_with
from tests.helpers.commands import fovea
from tests.helpers.runs import TOY, environment

EVIL = "\x1b]0;TITLE\x07\x1b[2J\x9b31m\u202e"


def harmless(text: str) -> bool:
    return not any(c in text for c in "\x1b\x07\x9b\u202e\r")


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard whose keys, members and name hold escapes; one sample is whole, one cannot be decoded, one is no picture."""
    good = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(good, "PNG")
    broken = good.getvalue()[:60] + bytes(20) + good.getvalue()[80:]
    path = tmp_path / f"x{EVIL}.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            (f"a{EVIL}.png", good.getvalue()),
            (f"b{EVIL}.png", broken),
            (f"c{EVIL}.png", b"no"),
            (f"d{EVIL}", b""),
        ):
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def test_commands_on_shards_escape_names(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pattern = str(tmp_path / "x*.tar")
    for words in (["index"], ["verify"], ["stats"]):
        fovea("shards", *words, pattern)
        out = capsys.readouterr()
        assert harmless(out.out + out.err), words
        assert "TITLE" in out.out + out.err, "the name is shown, escaped"
    assert fovea("shards", "index", str(shard)) == 2, "a name with control characters cannot be typed"
    refusal = capsys.readouterr().err
    assert harmless(refusal) and "control characters" in refusal and "Traceback" not in refusal
    fovea("shards", "index", pattern, "--report", str(tmp_path / "report.json"))
    texts = list(tmp_path.rglob("report.txt"))
    assert texts and all(harmless(file.read_text()) for file in texts)
    fovea("shards", "index", f"{tmp_path}/none{EVIL}.tar")
    assert harmless(capsys.readouterr().err)


def test_errors_tables_lines_and_logs_are_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    terminal = Terminal(file=file)
    terminal.print(table)
    terminal.print(EVIL, "[bold]x[/]")
    assert harmless(file.getvalue()) and "TITLE" in file.getvalue() and "bold" not in file.getvalue()
    assert harmless(str(FoveaError(EVIL, where=EVIL, hint=EVIL)))
    clean_logs()
    logging.getLogger("pipeline.test").warning("name %s at http://u:CANARY@h/?sig=CANARY", EVIL)
    LineLogger(64).log(EVIL)
    out = capsys.readouterr()
    assert harmless(out.out + out.err) and "CANARY" not in out.err


def test_status_and_logs_of_a_foreign_run_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path / "run")
    run.write("config.json", {})
    run.write("final_state.json", {"state": f"failed{EVIL}", "why": EVIL})
    run.note("start", attempt=0, ranks=EVIL, nodes=EVIL)
    run.note("end", attempt=0, code=1, cause=EVIL, why=EVIL)
    run.logs(0).mkdir(parents=True)
    (run.logs(0) / "rank-0.log").write_text(EVIL)
    assert fovea("status", str(run.path)) == 0
    assert fovea("logs", str(run.path)) == 0
    out = capsys.readouterr()
    assert harmless(out.out + out.err) and out.out.count("TITLE") > 3


RECORDS = [
    *("outcome.json", "final_state.json", "plan.json", "config.json", "submit/job.json"),
    *("evaluations/step_3.json", "attempts.jsonl"),
]
KEYS = ["steps", "state", "why", "scores", "stop", "job", "event", "attempt", "t", "seconds"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(RECORDS), keys=st.lists(st.sampled_from(KEYS), max_size=3), value=JSON)
def test_records_of_a_wrong_type_end_in_one_error(tmp_path: Path, name: str, keys: list[str], value: Any) -> None:
    from launch.slurm.status import as_json, status, table

    run = RunDirectory(tmp_path / "run")
    run_with(run.path, GOOD)
    run.write("config.json", {})
    run.note("start", attempt=0, ranks=1)
    document = dict.fromkeys(keys, value) if keys else value
    run.write(name, document)
    if name == "attempts.jsonl":
        (run.path / name).write_text(json.dumps(document) + "\n")
    for act in (lambda: table(one := status(run)) + as_json(one), lambda: report([run.path], tmp_path / "r.html")):
        try:
            act()
        except FoveaError as error:
            assert "\n" not in str(error)
    (run.path / name).unlink()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "a" * 5000], "File name too long. Choose a shorter name"),
        (["shards", "index", "a\nb.tar"], "must not contain line breaks"),
        (["train", "FILE", "data.shards=/d/a.tar", "run.directory=FILE/run"], "/toy.yaml/run: Not a directory"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy.yaml").write_text(TOY)
    with pytest.raises(SystemExit) as stop:
        main([word.replace("FILE", str(tmp_path / "toy.yaml")) for word in words])
    message = capsys.readouterr().err
    assert stop.value.code in (1, 2)
    assert told in message and "Traceback" not in message and message.count("\n") == 1


def test_a_working_directory_that_is_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit):
        main(["config", "check", "dinov2/cifar10_vit_tiny", "data.shards=a.tar"])
    assert capsys.readouterr().err.startswith("fovea: the working directory does not exist anymore")


def test_an_error_of_a_library_keeps_its_traceback() -> None:
    assert of_system(OSError("a library's own")) is None
    assert "ulimit" in str(of_system(OSError(errno.EMFILE, "Too many open files")))
    assert str(of_system(OSError(errno.ENOSPC, "No space left on device", "/d/x"))).startswith("/d/x: No space left on device.")


def test_streams_that_were_closed_lead_nowhere_and_no_file_gets_their_number() -> None:
    code = "import os, sys\nfrom launch.streams import open_streams\nopen_streams()\n"
    code += "print('lost')\nsys.exit(0 if os.open('/dev/zero', os.O_RDONLY) > 2 and sys.stdout.fileno() == 1 else 1)"
    command = ["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, env=environment(), check=False).returncode == 0
