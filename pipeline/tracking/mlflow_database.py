"""Creates MLflow's SQLite database atomically; replaces one whose creation was interrupted.

MLflow creates a database in place, with about sixty migrations. A process that is killed in between leaves a file that MLflow can
neither use nor repair. Here the migrations run on a file in the temporary directory, which is copied next to its destination,
synced, and linked there atomically. A run's own database is a copy of its journal: a broken one is renamed, and the journal is
sent again.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

from pipeline.errors import DataError
from pipeline.runtime.locks import lock
from pipeline.untrusted import open_regular, printable

State = Literal["absent", "whole", "half", "other", "unreadable"]
OWN = "mlflow.db"
_VERSION = "alembic_version"
_SUPER = bytes.fromhex("d9d505f920a163d7")  # the end of a rollback journal that names a super-journal
_PLAIN = "".join(chr(code) for code in range(32, 127) if chr(code) not in "?%")
_QUIET, _PATIENCE, _TICK = 3.0, 60.0, 0.25  # seconds
_STALE = 3600.0  # seconds after which an unfinished copy counts as abandoned


def uri_of(path: Path) -> str:
    """Returns the tracking URI of a SQLite file.

    SQLAlchemy treats a ``?`` in the path as the start of options and decodes ``%3F``. Such paths are quoted, and the URI names
    the driver, without which MLflow would create directories of the quoted name.
    """
    text = str(path.absolute())
    return f"sqlite+pysqlite:///{quote(text, safe=_PLAIN)}" if re.search(r"[?%]", text) else f"sqlite:///{text}"


def path_of(uri: str) -> Path | None:
    """Returns the file of a SQLite tracking URI; ``None`` for servers and in-memory databases."""
    scheme, _, rest = uri.partition(":///")
    text = unquote(rest.partition("?")[0])
    if scheme.partition("+")[0] != "sqlite" or text in ("", ":memory:") or text.startswith("file:"):
        return None
    return Path(text)


def ensure(uri: str, *, own: bool, log: Callable[[str], None] = lambda _: None) -> None:
    """Ensures that a SQLite tracking URI points to a database that MLflow can open.

    Args:
        uri: MLflow tracking URI; anything but a SQLite file is left alone.
        own: whether the file is the run's own copy of its journal, so that replacing it loses nothing.
        log: receives a message if a broken database was set aside.

    Raises:
        DataError: SQLite would delete another file because of the rollback journal beside the database.
        OSError: the file cannot be written.
        Exception: any error of MLflow.
    """
    path = path_of(uri)
    if path is None:
        return
    check_journal(path)
    state = _settled(path)
    if state in ("absent", "half") or (own and state in ("other", "unreadable")):
        _sweep(path)
        with _made(path) as fresh:
            if state != "absent":
                _replace(path, state, log)
            with contextlib.suppress(FileExistsError):  # another process was faster: its database is equivalent
                _link(fresh, path)
        _forget(uri)


def check_journal(path: Path) -> None:
    """Rejects a rollback journal that names a super-journal, since SQLite deletes that file wherever it is.

    SQLite writes such a name when one transaction changes several attached databases, which MLflow never does.

    Raises:
        DataError: the journal names a super-journal, or is not a regular file.
    """
    journal = path.with_name(f"{path.name}-journal")
    try:
        descriptor = open_regular(journal)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - len(_SUPER), 0))
        if file.read() == _SUPER:
            raise DataError(
                "names another file, which SQLite would delete",
                where=printable(str(journal)),
                hint="Delete the run's mlflow.db-journal; the run is not to be trusted",
            )


def _forget(uri: str) -> None:
    """Closes this process's connections to the file that previously had this name."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    engine = getattr(SqlAlchemyStore, "_engine_map", {}).get(uri)
    if engine is not None:
        engine.dispose()


def inspect(path: Path) -> State:
    """Returns the state of a database file for the installed version of MLflow.

    Returns:
        ``absent``; ``whole``; ``half``: its creation was interrupted, and it holds no runs; ``other``: it holds runs, or belongs
        to another version of MLflow; ``unreadable``: not a database, or a damaged one.
    """
    try:
        if path.stat().st_size == 0:
            return "half"
    except FileNotFoundError:
        return "absent"
    try:
        # Not read-only: SQLite must first roll back what a killed process left in the rollback journal.
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=rw", uri=True, timeout=20)) as base:
            tables = {row[0] for row in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            versions = {row[0] for row in base.execute(f"SELECT version_num FROM {_VERSION}")} if _VERSION in tables else set()
            if versions and versions == _heads():
                return "whole"
            if "runs" in tables and base.execute("SELECT 1 FROM runs LIMIT 1").fetchone():
                return "other"
            return "half" if not tables or tables & {"experiments", "runs", _VERSION} else "other"
    except sqlite3.OperationalError:  # locked, or a directory that is not writable: MLflow's own error says more
        return "whole"
    except sqlite3.DatabaseError:
        return "unreadable"


def _heads() -> set[str]:
    import mlflow.store
    from alembic.script import ScriptDirectory

    return set(ScriptDirectory(str(Path(mlflow.store.__file__).parent / "db_migrations")).get_heads())


def _settled(path: Path) -> State:
    """Returns the file's state once it no longer changes: a server that uses it may be creating it right now."""
    begin, before, since = time.monotonic(), None, time.monotonic()
    while True:
        state = inspect(path)
        if state != "half" or time.monotonic() - begin > _PATIENCE:
            return state
        with contextlib.suppress(OSError):
            about = path.stat()
            if (now := (about.st_size, about.st_mtime_ns)) != before:
                before, since = now, time.monotonic()
        if time.monotonic() - since > _QUIET:
            return state
        time.sleep(_TICK)


@contextlib.contextmanager
def _made(path: Path) -> Iterator[Path]:
    """Creates a complete, empty database beside ``path``, under a unique name."""
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    try:
        with tempfile.TemporaryDirectory(prefix="fovea-mlflow-") as folder:
            raw = Path(folder) / OWN
            MlflowClient(tracking_uri=uri_of(raw)).search_experiments(max_results=1)
            # The experiment "Default" would keep this directory for its artifacts; MLflow creates the experiment again if it is
            # missing.
            with contextlib.closing(sqlite3.connect(raw)) as base, base:
                for table in ("experiment_tags", "experiments"):
                    base.execute(f"DELETE FROM {table}")
            with partial.open("xb") as target, raw.open("rb") as source:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _link(fresh: Path, path: Path) -> None:
    """Links the file to its final name.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if path.exists():
            raise FileExistsError(path) from None
        fresh.replace(path)
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _replace(path: Path, state: State, log: Callable[[str], None]) -> None:
    """Renames a broken database, unless another process has already done so."""
    with path.with_name(f".{path.name}.lock").open("a") as file:
        lock(file.fileno(), file.name)
        if inspect(path) != state:
            return
        kept = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
        path.rename(kept)
        for suffix in ("-journal", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                path.with_name(path.name + suffix).rename(kept.with_name(kept.name + suffix))
    why = {"half": "was left half-made", "unreadable": "is damaged"}.get(state, "belongs to another version of MLflow")
    log(f"{path} {why}; it is kept as {kept.name}, and everything is sent to a new one")


def _sweep(path: Path) -> None:
    """Removes unfinished copies of killed processes."""
    for left in path.parent.glob(f".{path.name}.*.new"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
