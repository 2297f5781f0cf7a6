"""A run directory from elsewhere gets no credentials, sends no file from outside it, and has none written outside it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.evaluation.reporter import EvalReporter
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import EvalDestination, Journal, Shipper, eval_destinations, own_database, remember, server_of
from pipeline.tracking.journal import read
from tests.checkpoint.test_manifest import JSON
from tests.helpers.commands import fovea


class Sink:
    """A server that answers nothing useful and keeps what it was asked with."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                sink.asked.append(f"{self.path} {self.headers.get('Authorization')}")
                self.send_response(404)
                self.end_headers()

            do_POST = do_GET

            def log_message(self, *arguments: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory with a journal, and a user with credentials."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "CANARY")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "theirs"
    journal = Journal(folder / "tracking" / "journal-0000.jsonl")
    journal.metrics(1, {"train/loss": 2.0})
    journal.close()
    configured(folder, None)
    return folder


def configured(run: Path, uri: str | None) -> None:
    document = {
        "data": {"shards": ["x.tar"]},
        "method": {"name": "clip"},
        "model": {"timm_name": "vit_tiny_patch16_224"},
        "tracking": {"uri": uri},
    }
    (run / "config.json").write_text(json.dumps(document))


def test_a_server_that_only_the_run_names_is_never_contacted(run: Path, sink: Sink, capsys: pytest.CaptureFixture[str]) -> None:
    configured(run, sink.uri)
    (run / "tracking" / "cursor.json").write_text(
        json.dumps({"uri": sink.uri, "run_id": "a" * 32, "offsets": {}, "steps": {}, "artifacts": []})
    )
    assert fovea("mlflow", "sync", str(run)) == 2
    assert "the MLflow server http://127.0.0.1" in capsys.readouterr().err
    assert fovea("mlflow", "sync", "--all") == 2
    assert "skipped" in capsys.readouterr().out
    messages: list[str] = []
    reporter = EvalReporter.of_run(run, RunDirectory(run).settings(), None, log=messages.append)
    assert reporter is not None
    reporter(3, {"knn/k1": 0.5})
    reporter.close()
    assert len(messages) == 1 and messages[0].startswith("the scores stay in")
    assert sink.asked == []


def test_a_server_that_only_an_evaluation_of_the_run_names_is_never_contacted(run: Path, sink: Sink) -> None:
    EvalDestination(sink.uri, "fovea", "eval").begin(run / "tracking" / "eval-1").close()
    Journal(run / "tracking" / "eval-1" / "journal-0000.jsonl").metrics(1, {"eval/knn": 0.5})
    assert fovea("mlflow", "sync", str(run)) == 2
    assert sink.asked == []


@pytest.mark.parametrize("how", ["named", "environment", "trained"])
def test_the_users_own_server_is_asked_with_credentials(
    run: Path, sink: Sink, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(run, sink.uri)
    if how == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{sink.uri}/")
    elif how == "trained":
        remember(sink.uri)
    words = ["--uri", sink.uri] if how == "named" else []
    assert fovea("mlflow", "sync", str(run), *words) != 0, "the sink accepts nothing"
    assert any("CANARY" in line for line in sink.asked)
    assert capsys.readouterr().out.startswith(f"theirs: sending to {sink.uri}")


def test_the_list_of_servers_holds_no_address_and_is_the_users_alone(run: Path, tmp_path: Path) -> None:
    remember("http://mlflow.example:5000")
    remember("http://mlflow.example:5000")
    (file,) = (tmp_path / "state" / "fovea").iterdir()
    assert "example" not in file.read_text() and len(file.read_text().split()) == 1
    assert file.stat().st_mode & 0o077 == 0 and file.parent.stat().st_mode & 0o077 == 0
    assert server_of(run, "http://mlflow.example:5000/") == "http://mlflow.example:5000/"
    file.unlink()
    file.symlink_to(tmp_path / "victim")
    remember("http://mlflow.example:5000")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///{tmp}/elsewhere.db",
        "sqlite:///{run}/../../elsewhere.db",
        "sqlite:///elsewhere.db",
        "sqlite:///file:{tmp}/elsewhere.db?uri=true",
        "sqlite:///{run}/x.db?a=1",
        "sqlite:///{run}/link.db",
        "sqlite+pysqlite:///{tmp}/elsewhere.db",
        "file:///{tmp}/mlruns",
        "{tmp}/mlruns",
        "postgresql://u:p@h/db",
        "databricks",
        "",
    ],
)
def test_no_store_outside_the_run_is_written(run: Path, tmp_path: Path, uri: str) -> None:
    (run / "link.db").symlink_to(tmp_path / "elsewhere.db")
    uri = uri.replace("{tmp}", str(tmp_path)).replace("{run}", str(run))
    if uri:
        with pytest.raises(ConfigError, match="is named by the run only") as caught:
            server_of(run, uri)
        assert "u:p" not in str(caught.value)
    else:
        (run / "mlflow.db").symlink_to(tmp_path / "elsewhere.db")
        assert server_of(run, f"sqlite:///{run}/own.db") == f"sqlite:///{run}/own.db"
        with pytest.raises(ConfigError):
            server_of(run, f"sqlite:///{run}/mlflow.db")
    assert not (tmp_path / "elsewhere.db").exists() and not (tmp_path / "mlruns").exists()


def test_only_files_of_the_run_are_sent(run: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    (tmp_path / "secret").write_text("PRIVATE KEY")
    (run / "link").symlink_to(tmp_path / "secret")
    (run / "folder").symlink_to(tmp_path)
    (run / "report.html").write_text("<html></html>")
    os.mkfifo(run / "pipe")
    journal = Journal(run / "tracking" / "journal-0000.jsonl")
    for path in ("link", "folder/secret", "pipe", "../../secret", "a\0b", "\x1b[2J"):
        journal.artifact(Path(path))
    for path in (tmp_path / "secret", Path("/proc/self/environ"), Path("/dev/zero"), run / "report.html", run / "tracking"):
        journal.artifact(path)
    journal.close()
    said: list[str] = []
    shipper = Shipper(run / "tracking", uri=own_database(run), experiment="fovea", name="toy", log=said.append, root=run)
    shipper.ship()
    cursor = json.loads((run / "tracking" / "cursor.json").read_text())
    cursor["artifacts"] = [str(tmp_path / "secret")]
    (run / "tracking" / "cursor.json").write_text(json.dumps(cursor))
    Shipper(run / "tracking", uri=own_database(run), experiment="fovea", name="toy", log=said.append, root=run).ship()
    sent = [file.path for file in MlflowClient(own_database(run)).list_artifacts(cursor["run_id"])]
    assert sent == ["report.html"]
    assert len(said) == 11 and not any("\x1b" in line for line in said)
    stored = [file for file in (run / "tracking" / "artifacts").rglob("*") if file.is_file()]
    assert [file.name for file in stored] == ["report.html"]


def test_a_database_of_the_run_cannot_have_files_stored_elsewhere(run: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(own_database(run))
    client.create_experiment("fovea", artifact_location=str(tmp_path / "home" / ".ssh"))
    (run / "authorized_keys").write_text("theirs")
    Journal(run / "tracking" / "journal-0000.jsonl").artifact(run / "authorized_keys")
    said: list[str] = []
    Shipper(run / "tracking", uri=own_database(run), experiment="fovea", name="toy", log=said.append, root=run).ship()
    assert not (tmp_path / "home").exists()
    assert len(said) == 1 and "would store it in" in said[0]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=JSON, key=st.sampled_from(["t", "kind", "step", "values", "path", None]))
def test_records_of_a_wrong_type_are_left_out(tmp_path: Path, document: Any, key: str | None) -> None:
    good = {"t": 1.0, "kind": "metrics", "step": 1, "values": {"loss": 1.0}}
    bad = document if key is None else {**good, "path": "x", key: document}
    file = tmp_path / "journal-0000.jsonl"
    file.write_bytes("\n".join([json.dumps(bad), json.dumps(good), ""]).encode("utf-8", "surrogatepass"))
    records = [record for _, record in read(file)]
    assert records[-1] == good
    for record in records:
        assert float(record["t"]) == record["t"]
        if record["kind"] == "metrics":
            assert record["step"] >= 0 and all(isinstance(float(value), float) for value in record["values"].values())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=JSON, key=st.sampled_from(["uri", "run_id", "offsets", "steps", "artifacts", "joins", None]))
def test_cursors_and_destinations_of_a_wrong_type_count_as_none(tmp_path: Path, document: Any, key: str | None) -> None:
    tracking = tmp_path / "tracking"
    (tracking / "eval").mkdir(parents=True, exist_ok=True)
    good = {"uri": "sqlite:///x", "run_id": "r", "offsets": {}, "steps": {}, "artifacts": []}
    (tracking / "cursor.json").write_text(json.dumps(document if key is None else {**good, key: document}))
    Shipper(tracking, uri="sqlite:///x", experiment="e", name="n")._pending()
    about = {"uri": "sqlite:///x", "experiment": "e", "name": "n", "joins": ""}
    (tracking / "eval" / "about.json").write_text(json.dumps(document if key is None else {**about, key: document}))
    for _, aside in eval_destinations(tracking):
        assert isinstance(aside.uri, str) and aside.joins in ("", "../cursor.json")


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "journal-0000.jsonl"
    with file.open("wb") as out:
        out.truncate(64 << 20)
        out.seek(0, 2)
        out.write(b'\n{"t": 1, "kind": "tags", "values": {"a": "b"}}\n')
    assert [record["kind"] for _, record in read(file)] == ["tags"]
