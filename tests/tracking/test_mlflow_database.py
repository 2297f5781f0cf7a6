"""MLflow's SQLite file appears whole or not at all, and one that was left half-made is replaced from the journal."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.tracking import Journal, Shipper
from pipeline.tracking import mlflow_database as database
from tests.helpers.limits import LONG, deadline
from tests.helpers.matrix import fast_only
from tests.helpers.runs import ROOT, environment

SHIP = """
import sys
from pathlib import Path
from pipeline.tracking import Shipper
from pipeline.tracking.mlflow_database import uri_of
run = Path(sys.argv[1])
print("go", flush=True)
Shipper(run / "tracking", uri=uri_of(run / "mlflow.db"), experiment="e", name="n", log=print).ship()
print("sent", flush=True)
"""


def journal(run: Path) -> None:
    one = Journal(run / "tracking" / "journal-0000.jsonl")
    one.metrics(1, {"loss": 0.5})
    one.close()


def shipper(run: Path, said: list[str] | None = None) -> Shipper:
    log = said.append if said is not None else print
    return Shipper(run / "tracking", uri=database.uri_of(run / "mlflow.db"), experiment="e", name="n", log=log)


def process(run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SHIP, str(run)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(run: Path) -> list[tuple[int, float]]:
    with contextlib.closing(sqlite3.connect(run / "mlflow.db")) as base:
        return list(base.execute("SELECT step, value FROM metrics WHERE key = 'loss'"))


def half_made(path: Path, *, migrations: int) -> None:
    """What MLflow leaves when it is killed after so many of its migrations."""
    import mlflow.store
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    folder = str(Path(mlflow.store.__file__).parent / "db_migrations")
    order = [script.revision for script in ScriptDirectory(folder).walk_revisions()][::-1]
    engine = create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    engine.dispose()
    if migrations:
        config = Config(str(Path(folder).parent / "db_migrations" / "alembic.ini"))
        config.set_main_option("script_location", folder)
        config.set_main_option("sqlalchemy.url", f"sqlite:///{path}")
        command.upgrade(config, order[migrations - 1])


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_no_broken_database(tmp_path: Path) -> None:
    journal(tmp_path)
    draw = random.Random(5)
    killed = 0
    for _ in range(6):
        one = process(tmp_path)
        assert one.stdout is not None and one.stdout.readline() == "go\n"
        time.sleep(draw.uniform(0.2, 3.5))
        killed += one.poll() is None
        one.send_signal(signal.SIGKILL)
        one.communicate()
        assert database.inspect(tmp_path / "mlflow.db") in ("absent", "whole")
    assert killed
    shipper(tmp_path).ship()
    assert losses(tmp_path) == [(1, 0.5)]


@pytest.mark.parametrize("migrations", fast_only([0, 1, 30, 45], [30]))
def test_a_half_made_database_is_set_aside_and_everything_is_sent_anew(tmp_path: Path, migrations: int) -> None:
    journal(tmp_path)
    half_made(tmp_path / "mlflow.db", migrations=migrations)
    said: list[str] = []
    shipper(tmp_path, said).ship()
    assert losses(tmp_path) == [(1, 0.5)]
    (line,) = said
    (kept,) = tmp_path.glob("mlflow.db.broken-*")
    assert "half-made" in line and kept.name in line


@pytest.mark.slow
def test_an_empty_file_and_one_that_is_no_database_are_replaced(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("noise", b"no database " * 1000)):
        journal(tmp_path / name)
        (tmp_path / name / "mlflow.db").write_bytes(content)
        shipper(tmp_path / name).ship()
        assert losses(tmp_path / name) == [(1, 0.5)]


@pytest.mark.slow
def test_a_database_cut_off_from_the_run_it_had_is_made_anew_with_all_points(tmp_path: Path) -> None:
    journal(tmp_path)
    shipper(tmp_path).ship()
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as base, base:
        base.execute("UPDATE alembic_version SET version_num = 'from another version'")
    said: list[str] = []
    shipper(tmp_path, said).ship()  # nothing is left to send: the file is not looked at
    assert said == []
    more = Journal(tmp_path / "tracking" / "journal-0001.jsonl")
    more.metrics(2, {"loss": 0.25})
    more.close()
    shipper(tmp_path, said).ship()
    assert "another version" in said[0]
    assert losses(tmp_path) == [(1, 0.5), (2, 0.25)]


def test_somebody_elses_database_with_runs_is_left_alone(tmp_path: Path) -> None:
    journal(tmp_path / "run")
    shipper(tmp_path / "run").ship()
    shared = tmp_path / "shared.db"
    shutil.copy(tmp_path / "run" / "mlflow.db", shared)
    with contextlib.closing(sqlite3.connect(shared)) as base, base:
        base.execute("UPDATE alembic_version SET version_num = 'older'")
    before = shared.read_bytes()
    database.ensure(database.uri_of(shared), own=False)
    assert shared.read_bytes() == before
    (tmp_path / "photo.db").write_bytes(b"a photo")
    database.ensure(database.uri_of(tmp_path / "photo.db"), own=False)
    assert (tmp_path / "photo.db").read_bytes() == b"a photo"


@pytest.mark.slow
def test_a_database_that_is_deleted_while_it_is_in_use_is_made_anew(tmp_path: Path) -> None:
    journal(tmp_path)
    one = shipper(tmp_path)
    one.ship()
    (tmp_path / "mlflow.db").unlink()
    more = Journal(tmp_path / "tracking" / "journal-0001.jsonl")
    more.metrics(2, {"loss": 0.25})
    more.close()
    one.start()  # the first try fails on the file that is gone, the next one makes another
    end = deadline()
    while one._pending() and time.monotonic() < end:
        time.sleep(0.1)
    assert one.close(60)
    assert losses(tmp_path) == [(1, 0.5), (2, 0.25)]


@pytest.mark.slow
def test_two_processes_that_make_it_at_once_agree_on_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        journal(tmp_path / name)
    script = SHIP.replace('run / "mlflow.db"', 'run.parent / "mlflow.db"')
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / name)], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL
        )
        for name in ("a", "b")
    ]
    assert [one.wait(LONG) for one in both] == [0, 0]
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as base:
        assert base.execute("SELECT count(*) FROM runs").fetchone() == (2,)
    assert not list(tmp_path.glob(".*.new")) and not list(tmp_path.glob("*.broken*"))


@pytest.mark.slow
def test_without_hard_links_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    database.ensure(database.uri_of(tmp_path / "mlflow.db"), own=True)
    assert database.inspect(tmp_path / "mlflow.db") == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize(
    "name", fast_only(["plain", "a b", "what?", "50%done", "100%25", "x#y", "été [a]", "q?a=b&c=d", "a@b:c"], ["q?a=b&c=d"])
)
def test_the_file_lies_where_the_run_is_whatever_its_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / name
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    journal(run)
    uri = database.uri_of(run / "mlflow.db")
    assert database.path_of(uri) == run / "mlflow.db"
    shipper(run).ship()
    assert losses(run) == [(1, 0.5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({name, "cwd"})
    assert not list(elsewhere.iterdir())


def test_servers_and_memory_are_no_files() -> None:
    for uri in ("http://host:5000", "postgresql://u:p@h/db", "sqlite://", "sqlite:///:memory:", "databricks", "file:/tmp/mlruns"):
        assert database.path_of(uri) is None


def test_a_journal_that_names_another_file_deletes_nothing(tmp_path: Path) -> None:
    """SQLite deletes the super-journal that a hot rollback journal names, wherever it lies."""
    base, victim = tmp_path / "mlflow.db", tmp_path / "victim"
    with contextlib.closing(sqlite3.connect(base)) as made, made:
        made.execute("CREATE TABLE t (a)")

    def plant() -> None:
        victim.write_bytes(b"precious" * 100)
        magic, name, page = bytes.fromhex("d9d505f920a163d7"), str(victim).encode(), base.read_bytes()[:4096]
        head = (magic + struct.pack(">5I", 1, 0, base.stat().st_size // 4096, 512, 4096)).ljust(512, b"\0")
        record = struct.pack(">I", 1) + page + struct.pack(">I", sum(page[4096 - 200 : 0 : -200]))
        end = struct.pack(">I", (1 << 30) // 4096 + 1) + name + struct.pack(">2I", len(name), sum(name)) + magic
        Path(f"{base}-journal").write_bytes(head + record + end)

    plant()
    with contextlib.closing(sqlite3.connect(base)) as opened:
        opened.execute("SELECT * FROM t").fetchall()
    assert not victim.exists(), "the attack works on SQLite itself"
    plant()
    with pytest.raises(DataError, match="names another file"):
        database.ensure(database.uri_of(base), own=True)
    assert victim.exists()
