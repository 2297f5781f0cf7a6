"""Notifications: what arrives at a real SMTP server, a real HTTP server and a program; what a dead one costs; whose are sent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch import notifications
from launch.notifications import about, accepted, choose, in_job, notify
from launch.slurm import profile as profiles
from launch.slurm.decide import Decision
from launch.slurm.outbox import Outbox
from pipeline.config.load import load
from pipeline.errors import ConfigError
from pipeline.runtime import job_record as record
from pipeline.runtime.known import digest
from pipeline.runtime.notify_settings import NotifySettings
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.limits import hang_limit
from tests.helpers.runs import ROOT, TOY, environment, train
from tests.helpers.smtp import make_certificate, smtp_sink


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "toy")
    run.write("outcome.json", {"stop": "FINISHED", "steps": 8, "scores": {"knn/k10": 0.5}})
    return run


def section(**values: Any) -> dict[str, Any]:
    return NotifySettings(**values).model_dump(mode="json")


def send(settings: dict[str, Any], run: RunDirectory, event: str = "finished", why: str = "all 8 steps are done") -> list[str]:
    """Notifies, and returns the results of the channels as recorded."""
    notify(settings, event, run.path, *about(run, event, why))
    file = run.path / "notifications.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [f"{row['channel']}: {row['result']}" for row in rows]


@contextmanager
def web(status: int = 200, *, hang: bool = False) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An HTTP server; its address and the requests that it has received."""
    requests: list[tuple[str, bytes]] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, body))
            while hang and not over.wait(0.1):
                self.wfile.write(b"x")  # a byte now and then: no single read takes long
                self.wfile.flush()
            if hang:
                return
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def handle(self) -> None:
            with suppress(ConnectionError):
                super().handle()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def test_a_mail_arrives_with_reason_scores_and_the_next_command(run: RunDirectory) -> None:
    with smtp_sink() as sink:
        settings = section(
            email_to=["a@lab.org", "b@lab.org"], email_from="fovea@lab.org", smtp=f"127.0.0.1:{sink.port}", smtp_security="none"
        )
        assert send(settings, run, "failed", "no space\nleft\x1b[2J") == ["email: sent"]
    (text,) = sink.messages
    assert sink.recipients == [["a@lab.org", "b@lab.org"]] and "Subject: fovea: toy: failed\r\n" in text
    assert "From: fovea@lab.org" in text and "To: a@lab.org, b@lab.org" in text
    body = text.replace("=\r\n", "").replace("\r\n", "\n")
    assert "knn/k10 0.5000" in body and f"next: fovea logs {run.path}" in body and "\x1b" not in body


def test_a_login_goes_over_tls_only_and_the_password_is_named_not_written(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path / "cert.pem")
    (tmp_path / "secret").write_text("right\n")
    with smtp_sink(certificate=certificate) as sink:
        base = {"email_to": "a@lab.org", "smtp": f"127.0.0.1:{sink.port}", "smtp_user": "me"}
        by_file = section(**base, smtp_password_file=tmp_path / "secret")
        assert send(by_file, run) == ["email: SSLCertVerificationError"], "a server that cannot prove its name gets nothing"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert send(by_file, run)[-1] == "email: sent"
        monkeypatch.setenv("MAIL_PASSWORD", "wrong")
        by_variable = section(**base, smtp_password_env="MAIL_PASSWORD")
        assert send(by_variable, run)[-1] == "email: SMTPAuthenticationError (code 535)"
        monkeypatch.delenv("MAIL_PASSWORD")
        assert send(by_variable, run)[-1] == "email: MAIL_PASSWORD is not set"
    assert sink.logins == [("me", "right"), ("me", "wrong")] and sink.encrypted == [True]
    written = "".join(path.read_text() for path in run.path.rglob("*") if path.is_file()) + json.dumps(by_file)
    assert "right" not in written and "wrong" not in written
    with smtp_sink() as plain:
        settings = section(**{**base, "smtp": f"127.0.0.1:{plain.port}"}, smtp_password_file=tmp_path / "secret")
        assert send(settings, run)[-1] == "email: SMTPNotSupportedError", "no encryption, no login"
    assert not plain.logins


def test_a_webhook_receives_slacks_json_and_its_address_is_never_written(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web() as (address, requests):
        monkeypatch.setenv("LAB_HOOK", f"{address}/services/T0/SECRET?k=v")
        assert send(section(webhook_env="LAB_HOOK"), run) == ["webhook: sent"]
        ((path, body),) = requests
        assert path == "/services/T0/SECRET?k=v" and "knn/k10 0.5000" in json.loads(body)["text"]
    assert send(section(webhook_env="LAB_HOOK"), run)[-1] == "webhook: ConnectionRefusedError"
    for status in (302, 404, 500):
        with web(status) as (address, requests):
            (tmp_path / "hook").write_text(f"{address}/SECRET\n")
            assert send(section(webhook_file=tmp_path / "hook"), run)[-1] == f"webhook: the webhook answered with {status}"
            assert len(requests) == 1, "a redirect is not followed"
    for wrong in ("file:///etc/passwd", "http://", "SECRET", "http://u:SECRET@127.0.0.1/"):
        monkeypatch.setenv("LAB_HOOK", wrong)
        assert "must be http:// or https://" in send(section(webhook_env="LAB_HOOK"), run)[-1]
    assert "SECRET" not in (run.path / "notifications.jsonl").read_text()


def test_a_command_is_run_without_a_shell(run: RunDirectory, tmp_path: Path) -> None:
    script = (
        "import sys, os, json; json.dump([sys.argv[1:], os.environ['FOVEA_EVENT'], sys.stdin.read()], open(sys.argv[1], 'w'))"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "out"), "$(touch evil); `id`", "*"]
    assert send(section(command=words), run, "hang", "rank 1 is in $(reboot)") == ["command: sent"]
    arguments, event, text = json.loads((tmp_path / "out").read_text())
    assert arguments[1:] == ["$(touch evil); `id`", "*"] and event == "hang" and "rank 1 is in $(reboot)" in text
    assert send(section(command=["false"]), run)[-1] == "command: the program ended with code 1"
    assert send(section(command=["no-such-program-anywhere"]), run)[-1] == "command: FileNotFoundError"


def test_what_hangs_is_given_up_at_once_for_all_and_what_is_dead_costs_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with smtp_sink(silent=True) as sink, web(hang=True) as (address, _), socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("LAB_HOOK", address)
        base = {"email_to": "a@lab.org", "smtp_security": "none", "webhook_env": "LAB_HOOK", "timeout": 0.5}
        settings = section(**base, smtp=f"127.0.0.1:{sink.port}", command=["sleep", "1000"])
        with hang_limit(60):
            results = send(settings, run)
        assert [line.partition(":")[0] for line in results] == ["email", "webhook", "command"]
        assert not any(line.endswith(": sent") for line in results)
        assert results[1] == "webhook: no answer in time"
        dead = section(**base, smtp=f"127.0.0.1:{closed.getsockname()[1]}")
        assert send(dead, run)[3] == "email: ConnectionRefusedError"
    with smtp_sink(refuse=True) as sink:
        settings = section(email_to="a@lab.org", smtp=f"127.0.0.1:{sink.port}", smtp_security="none")
        assert send(settings, run)[-1] == "email: SMTPRecipientsRefused"


def test_a_run_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    notify(section(command=["true"]), "finished", tmp_path / "nowhere" / "x", "subject", [])


def test_a_record_that_is_a_link_or_a_pipe_is_not_written(tmp_path: Path) -> None:
    for name in ("link", "pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / "notifications.jsonl").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "pipe" / "notifications.jsonl")
    with hang_limit(60):
        for name in ("link", "pipe"):
            notify(section(command=["true"]), "finished", tmp_path / name, "subject", [])
    assert not (tmp_path / "victim").exists()


def test_only_chosen_events_are_sent(run: RunDirectory) -> None:
    assert send(section(command=["true"], on=["failed", "budget"]), run, "finished") == []
    assert send(section(command=["true"], on=["failed", "budget"]), run, "budget") == ["command: sent"]


@pytest.mark.parametrize(
    ("event", "budget", "following"),
    [
        ("finished", "", "fovea report "),
        ("failed", "", "--batch; then fovea resume "),
        ("budget", "crash", "cluster.budgets.crash=NUMBER"),
        ("hang", "", "fovea logs "),
        ("excluded", "", "--forgive-nodes"),
    ],
)
def test_each_event_names_the_next_command(run: RunDirectory, event: str, budget: str, following: str) -> None:
    run.write("submit/job.json", {"job": 7})
    subject, lines = about(run, event, "why", budget)
    assert subject.startswith("fovea: toy: ") and following in lines[-1] and "why" in lines[0]
    run.write("outcome.json", {"scores": [1], "stop": 3})
    assert about(run, event, "why")[1], "damaged records do not matter"


def test_settings_stored_in_a_run_are_used_only_if_this_user_has_named_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign, own = NotifySettings(command=("touch", "/tmp/evil")), NotifySettings(command=("true",))
    assert choose((foreign, False)) == {}
    assert "stored in the run only" in capfd.readouterr().err
    assert choose((foreign, False), (own, True))["command"] == ["true"], "the user's own profile is used instead"
    assert choose((own, False))["command"] == ["true"], "named before"
    assert choose((NotifySettings(command=("true", "x")), False)) == {}, "exactly these"
    assert choose((NotifySettings(), True)) == {}
    assert not accepted(section(command=["true"], webhook_env="X"), named=False)


def test_a_job_uses_the_settings_with_which_it_was_submitted(run: RunDirectory) -> None:
    settings = section(command=["true"])
    environment = {notifications.VARIABLE: digest(notifications.canonical(settings))}
    assert in_job(json.loads(json.dumps(settings)), environment)
    assert not in_job(section(command=["false"]), environment)
    assert not in_job(settings, {}) and not in_job({}, environment)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("notify.email_to=[nobody]", "not an e-mail address"),
        ("notify.email_to=['a@b.c\\r\\nBcc: d@e.f']", "must"),
        ("notify.smtp_password_env=X", "no smtp and smtp_user"),
        ("notify.webhook_env='a b'", "webhook_env"),
        ("notify.on=[always]", "notify.on"),
        ("notify.webhook=http://x", "unknown key"),
        ("notify.timeout=1000", "timeout"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "toy.yaml").write_text(TOY)
    if "Bcc" in override:
        with pytest.raises(ValueError, match="not an e-mail address"):
            NotifySettings(email_to=("a@b.c\r\nBcc: d@e.f",))
        return
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "toy.yaml", ["data.shards=x.tar", override])


def test_a_configs_section_changes_no_mathematics(tmp_path: Path) -> None:
    from pipeline.config.load import fingerprint

    (tmp_path / "toy.yaml").write_text(TOY)
    plain = load(tmp_path / "toy.yaml", ["data.shards=x.tar"]).config
    notified = load(tmp_path / "toy.yaml", ["data.shards=x.tar", "notify.command=[echo, hi]", "notify.email_to=a@b.c"]).config
    assert notified.notify.command == ("echo", "hi") and notified.notify.email_to == ("a@b.c",)
    assert fingerprint(plain) == fingerprint(notified)


def test_a_damaged_record_of_what_is_known_accepts_nothing(tmp_path: Path) -> None:
    (tmp_path / "state" / "fovea" / "notifications").mkdir(parents=True)
    assert not accepted(section(command=["true"]), named=False)
    assert accepted(section(command=["true"]), named=True)
    assert record.read(tmp_path / "state") == {}


@pytest.mark.slow
def test_a_local_run_notifies_its_end_and_a_strangers_stored_section_does_not(
    config: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = tmp_path / "received"
    command = f"notify.command=['sh', '-c', 'echo \"<$FOVEA_EVENT>\" >> {received}; cat >> {received}']"
    short = ["train.duration='6 steps'", "launch.num_processes=1"]
    done = train(config, shards, tmp_path / "run", command, *short)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "<finished>" in received.read_text() and "all 6 steps are done" in received.read_text()
    assert "sh" in (tmp_path / "run" / "config.json").read_text()
    stored = ["train", str(tmp_path / "run")]
    again = [sys.executable, "-m", "launch.cli.main", *stored]

    def repeat() -> str:
        received.unlink()
        done = subprocess.run(again, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    repeat()
    assert received.exists(), "the same user"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    assert "stored in the run only" in repeat() and not received.exists()


@pytest.mark.parametrize(
    ("decision", "event"),
    [
        (Decision("finish", "finished", "all 8 steps are done"), "finished"),
        (Decision("fail", "refused", "no such shard"), "failed"),
        (Decision("fail", "crash", "4 attempts ended by crash", spent=True), "budget"),
        (Decision("requeue", "hang", "no rank sent a heartbeat"), "hang"),
        (Decision("requeue", "node", "n2: its disk is full", {"n2": "its disk is full"}), "excluded"),
        (Decision("requeue", "time limit", "saved at step 4"), ""),
        (Decision("requeue", "crash", "broken"), ""),
        (Decision("stop", "stopped", "by request"), ""),
    ],
)
def test_a_supervisor_notifies_these_decisions_and_no_others(
    run: RunDirectory, tmp_path: Path, decision: Decision, event: str
) -> None:
    settings = section(command=["sh", "-c", f'echo "$FOVEA_EVENT" > {tmp_path}/event; cat > {tmp_path}/text'])
    environment = {notifications.VARIABLE: digest(notifications.canonical(settings))}
    outbox = Outbox(run, settings, environment, print)
    outbox.add(decision)
    outbox.close(continues=False)
    assert (tmp_path / "event").exists() is bool(event)
    if event:
        assert (tmp_path / "event").read_text().strip() == event and decision.why in (tmp_path / "text").read_text()


def test_a_restart_waits_for_no_notification_and_the_next_job_sends_what_is_left(run: RunDirectory, tmp_path: Path) -> None:
    # The program waits for a file that is made only after the first job has closed its outbox: whoever waits for it hangs.
    script = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; cat >> {tmp_path}/text"
    settings = section(command=["sh", "-c", script], email_to="a@lab.org", smtp="127.0.0.1:1", smtp_security="none", timeout=120)
    environment = {notifications.VARIABLE: digest(notifications.canonical(settings))}

    def results() -> list[str]:
        rows = map(json.loads, (run.path / "notifications.jsonl").read_text().splitlines())
        return [f"{row['event']} {row['channel']}: {row['result']}" for row in rows]

    first = Outbox(run, settings, environment, print)
    with hang_limit(60):
        first.add(Decision("requeue", "hang", "no rank sent a heartbeat"))
        first.close(continues=True)
    assert results() == ["hang email: ConnectionRefusedError", "hang command: no answer yet; the next job sends it again"]
    stranger = Outbox(run, settings, {}, print)  # submitted with other settings: sends nothing
    (tmp_path / "go").touch()
    unsent = (run.path / "unsent.json").read_text()
    stranger.resume()
    stranger.close(continues=False)
    assert len(results()) == 2 and not (tmp_path / "text").exists()
    (run.path / "unsent.json").write_text(unsent)
    second = Outbox(run, settings, environment, print)
    second.resume()
    second.close(continues=False)
    assert results()[2:] == ["hang command: sent"], "by that channel only"
    assert "no rank sent a heartbeat" in (tmp_path / "text").read_text()
    Outbox(run, settings, environment, print).resume()
    assert len(results()) == 3, "sent twice"


def test_all_notifications_that_are_left_share_one_deadline(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [100.0], list[float]()

    class Sending:
        event, subject, lines = "hang", "subject", ["line"]

        def __init__(self, *_: object) -> None: ...

        def wait(self, seconds: float) -> list[str]:
            waited.append(seconds)
            now[0] += min(seconds, 1.5)
            return ["email"]

        def close(self, _: str) -> None: ...

    monkeypatch.setattr("launch.notifications.Sending", Sending)
    monkeypatch.setattr("launch.slurm.outbox.time.monotonic", lambda: now[0])
    settings = section(command=["true"])
    outbox = Outbox(run, settings, {notifications.VARIABLE: digest(notifications.canonical(settings))}, print)
    for _ in range(4):
        outbox.add(Decision("requeue", "hang", "no rank sent a heartbeat"))
    outbox.close(continues=True)
    assert waited == [2.0, 0.5, 0.0, 0.0]
    assert len(json.loads((run.path / "unsent.json").read_text())["rows"]) == 4


@pytest.mark.parametrize("content", ["[]", "{", '{"rows": 5}', '{"rows": [5, {}, {"event": 1, "lines": [], "channels": "x"}]}'])
def test_a_damaged_list_of_what_is_left_sends_nothing(run: RunDirectory, tmp_path: Path, content: str) -> None:
    settings = section(command=["touch", str(tmp_path / "sent")])
    (run.path / "unsent.json").write_text(content)
    outbox = Outbox(run, settings, {notifications.VARIABLE: digest(notifications.canonical(settings))}, print)
    outbox.resume()
    outbox.close(continues=False)
    assert not (tmp_path / "sent").exists() and not (run.path / "unsent.json").exists()


def test_sendmail_gets_the_message_on_its_standard_input(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "sendmail"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/mail\nexit $(cat {tmp_path}/code)\n')
    program.chmod(0o755)
    (tmp_path / "code").write_text("0")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    settings = section(email_to=["a@lab.org", "b@lab.org"], email_from="fovea@lab.org")
    assert send(settings, run, "failed", "no space left") == ["email: sent"]
    assert (tmp_path / "arguments").read_text() == "-i -t\n", "recipients are read from the message, a line with a dot is no end"
    message = message_from_bytes((tmp_path / "mail").read_bytes())
    assert (message["To"], message["From"]) == ("a@lab.org, b@lab.org", "fovea@lab.org")
    assert message["Subject"] == "fovea: toy: failed" and "no space left" in str(message.get_payload())
    (tmp_path / "code").write_text("75")
    assert send(settings, run)[-1] == "email: the program ended with code 75"
    program.unlink()
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    assert send(settings, run)[-1] == "email: the program sendmail is missing; set notify.smtp"


def test_files_of_a_profile_are_relative_to_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    base = {"email_to": "a@b.c", "smtp": "h", "smtp_user": "me", "smtp_password_file": "~/secret", "webhook_file": "hook"}
    (tmp_path / "site.yaml").write_text(json.dumps({"notify": base}))
    notify = profiles.load("site.yaml").notify
    assert (notify.webhook_file, notify.smtp_password_file) == (tmp_path / "hook", Path("/home/me/secret"))
