"""Notifies users about a run: e-mail, webhook, command. Standard library only, since a job's supervisor uses it.

A notification never fails a run and costs at most ``notify.timeout`` seconds, whatever the other side does: it is sent by a
thread that is not waited for any longer. What was sent, and why something was not, is recorded in ``<run>/notifications.jsonl``.

A run directory may come from another user, and its stored settings could name a command. Stored settings are therefore used only
if this user has started a run with exactly these before (:mod:`pipeline.runtime.known`); on a cluster, the job's environment
carries their digest, which the run directory does not. ``fovea status``, ``runs`` and ``logs`` never notify.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import shutil
import smtplib
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from email.message import EmailMessage
from pathlib import Path
from typing import IO, Any

from pipeline.masking import printable, shown
from pipeline.runtime import job_record as record
from pipeline.runtime import known
from pipeline.runtime.known import digest
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import read_bytes

VARIABLE = "FOVEA_NOTIFY"  # digest of the settings that a job may use
_KIND = "notifications"
_RECORD = "notifications.jsonl"
_MOST_SECRET = 1 << 16
_MOST_TEXT = 8000


class NotSent(Exception):
    """Why a notification was not sent; without addresses, passwords or what a server said."""


def canonical(settings: Mapping[str, Any]) -> str:
    """The settings as one text, whatever their order.

    Args:
        settings: section ``notify``, as JSON values.
    """
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def accepted(settings: Mapping[str, Any], *, named: bool) -> bool:
    """Whether settings may be used: the user names them now, or has before.

    Args:
        settings: section ``notify``, as JSON values.
        named: whether they come from a file or a command line of the user, not from a run directory.
    """
    if named:
        known.add(_KIND, canonical(settings))
    return named or known.is_known(_KIND, canonical(settings))


def choose(*candidates: tuple[Any, bool]) -> dict[str, Any]:
    """The first section ``notify`` with a channel that may be used, as JSON values; empty if there is none.

    Args:
        candidates: sections (:class:`pipeline.runtime.notify_settings.NotifySettings`), and whether the user named each now.
    """
    for settings, named in candidates:
        if not settings.channels:
            continue
        values: dict[str, Any] = settings.model_dump(mode="json")
        for key in ("smtp_password_file", "webhook_file"):
            values[key] = os.path.abspath(os.path.expanduser(values[key])) if values[key] else None
        if accepted(values, named=named):
            return values
        print(
            "fovea: the section notify is stored in the run only, and you have started no run with it: nothing is sent by it",
            file=sys.stderr,
        )
    return {}


def in_job(settings: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Whether the job was submitted with these settings by its user."""
    return bool(settings) and environment.get(VARIABLE) == digest(canonical(settings))


def notify(settings: Mapping[str, Any], event: str, run: Path, subject: str, lines: list[str]) -> None:
    """Send a notification by all channels at once, within ``timeout``, and record the outcome. Raises nothing.

    Args:
        settings: section ``notify``, as JSON values, which were accepted.
        event: one of ``notify.on``; others are not sent.
        run: the run directory.
        subject: one line.
        lines: of the text.
    """
    sending = Sending(settings, event, run, subject, lines)
    sending.wait()
    sending.close()


class Sending:
    """A notification on its way by all channels at once. Nothing here raises, and only :meth:`wait` takes time.

    Args:
        settings: section ``notify``, as JSON values, which were accepted.
        event: one of ``notify.on``; others are not sent.
        run: the run directory.
        subject: one line.
        lines: of the text.
        only: names of the channels to use; by default all that are set.

    Attributes:
        event: as given.
        subject: as given, made printable and cut to 200 characters.
        lines: of the text, as given; what is sent of them has its secrets masked and at most 8000 characters.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        event: str,
        run: Path,
        subject: str,
        lines: Sequence[str],
        only: Sequence[str] | None = None,
    ) -> None:
        self.event, self.subject, self.lines = event, printable(subject, limit=200), list(lines)
        self._run, self._results = run, dict[str, str]()
        self._programs: list[subprocess.Popen[bytes]] = []
        self._end = time.monotonic() + float(settings.get("timeout", 20.0))
        text, programs = shown("\n".join(lines))[:_MOST_TEXT], self._programs
        channels: dict[str, Callable[[], None]] = {}
        if settings.get("email_to"):
            channels["email"] = lambda: _email(settings, self.subject, text, programs)
        if settings.get("webhook_env") or settings.get("webhook_file"):
            channels["webhook"] = lambda: _webhook(settings, self.subject, text)
        if settings.get("command"):
            channels["command"] = lambda: _command(settings, event, run, text, programs)
        sent = event in settings.get("on", ())
        self._threads = {
            name: threading.Thread(target=_one, args=(name, send, self._results), daemon=True)
            for name, send in channels.items()
            if sent and (only is None or name in only)
        }
        for thread in self._threads.values():
            thread.start()

    def wait(self, seconds: float = float("inf")) -> list[str]:
        """Wait for the channels, at most until ``timeout``; returns those without an answer.

        Args:
            seconds: wait no longer than this.
        """
        end = min(self._end, time.monotonic() + seconds)
        for thread in self._threads.values():
            thread.join(max(end - time.monotonic(), 0.0))
        return [name for name in self._threads if name not in self._results]

    def close(self, unanswered: str = "no answer in time") -> None:
        """Record the results and end the programs that are still running.

        Args:
            unanswered: result of channels without an answer.
        """
        done = dict(self._results)
        for program in self._programs:
            if program.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(program.pid, 9)
        if not self._threads:
            return
        with contextlib.suppress(OSError), _record(self._run / _RECORD) as file:
            for name in self._threads:
                row = {"t": round(time.time(), 3), "event": self.event, "channel": name, "result": done.get(name, unanswered)}
                file.write(json.dumps(row) + "\n")


def _record(path: Path) -> IO[str]:
    """The record opened to append to; a link, or anything that is not a regular file, is an error."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags, 0o666), "a")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


def about(run: RunDirectory, event: str, why: str, budget: str = "") -> tuple[str, list[str]]:
    """Subject and lines of a notification: the reason, the last scores, and the command that comes next.

    Args:
        run: the run directory.
        event: one of ``notify.on``.
        why: the reason, in a sentence.
        budget: the budget that is used up, if that is known.
    """
    name, path = run.path.name, shlex.quote(str(run.path))
    what = {"hang": "a hang", "excluded": "a node is excluded", "budget": "gave up"}.get(event, event)
    outcome, newest = record.read(run.path / "outcome.json"), max(run.checkpoints.glob("step_*/manifest.json"), default=None)
    scores = outcome.get("scores") or (record.read(newest).get("scores") if newest is not None else None)
    numbers = scores.items() if isinstance(scores, dict) else ()
    shown_scores = "  ".join(f"{key} {value:.4f}" for key, value in numbers if type(value) is float)
    resume = f"fovea resume {path}" if record.job(run) else f"fovea train {path}"
    following = {
        "finished": f"fovea report {path}",
        "failed": f"fovea logs {path}{' --batch' if record.job(run) else ''}; then {resume}",
        "budget": f"{resume} cluster.budgets.{budget or 'no_progress'}=NUMBER",
        "hang": f"fovea logs {path}",
        "excluded": f"fovea status {path}; when the node is repaired, fovea resume {path} --forgive-nodes",
    }
    lines = [f"{name}: {what}: {why}", f"checkpoint at step {max(record.saved_step(run), 0)}", f"run {run.path}"]
    lines += [f"scores: {shown_scores}"] if shown_scores else []
    return f"fovea: {name}: {what}", [*lines, f"next: {following[event]}"]


def _one(name: str, send: Callable[[], None], results: dict[str, str]) -> None:
    try:
        send()
        results[name] = "sent"
    except NotSent as error:
        results[name] = printable(str(error), limit=200)
    except Exception as error:  # an exception's text may hold an address or a password
        code = getattr(error, "smtp_code", None)
        results[name] = type(error).__name__ + (f" (code {code})" if isinstance(code, int) else "")


def _secret(settings: Mapping[str, Any], key: str) -> str:
    """The value that ``<key>_env`` or ``<key>_file`` names; empty if neither is set.

    Raises:
        NotSent: the variable is not set, or the file cannot be read.
    """
    if variable := settings.get(f"{key}_env"):
        if not (value := os.environ.get(str(variable), "").strip()):
            raise NotSent(f"{variable} is not set")
        return value
    if file := settings.get(f"{key}_file"):
        try:
            return read_bytes(Path(str(file)), limit=_MOST_SECRET).decode().strip()
        except Exception as error:
            raise NotSent(f"notify.{key}_file cannot be read ({type(error).__name__})") from error
    return ""


def _email(settings: Mapping[str, Any], subject: str, text: str, programs: list[subprocess.Popen[bytes]]) -> None:
    recipients = [str(one) for one in settings["email_to"]]
    message = EmailMessage()
    message["Subject"], message["To"] = subject, ", ".join(recipients)
    message["From"] = str(settings.get("email_from") or recipients[0])
    message.set_content(text + "\n")
    timeout = float(settings.get("timeout", 20.0))
    if not (server := settings.get("smtp")):
        program = shutil.which("sendmail", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/lib")
        if program is None:
            raise NotSent("the program sendmail is missing; set notify.smtp")
        _run([program, "-i", "-t"], message.as_bytes(), timeout, dict(os.environ), programs)
        return
    host, port = _address(str(server))
    security, password = settings.get("smtp_security", "starttls"), _secret(settings, "smtp_password")
    context = ssl.create_default_context()
    kind: Any = smtplib.SMTP_SSL if security == "tls" else smtplib.SMTP
    with kind(host, port, timeout=timeout, **({"context": context} if security == "tls" else {})) as client:
        if security == "starttls":
            client.starttls(context=context)
        if settings.get("smtp_user"):
            client.login(str(settings["smtp_user"]), password)
        client.send_message(message)


def _address(server: str) -> tuple[str, int]:
    host, colon, port = server.rpartition(":")
    if not colon or not port.isdecimal():
        return server.strip("[]"), 25
    return host.strip("[]"), int(port)


def _webhook(settings: Mapping[str, Any], subject: str, text: str) -> None:
    """Posts Slack's JSON. Redirects are not followed: the address is the user's, what it answers is not."""
    address = urllib.parse.urlsplit(_secret(settings, "webhook"))
    if address.scheme not in ("http", "https") or not address.hostname or address.username is not None:
        raise NotSent("the webhook's address must be http:// or https:// with a host, without a user name")
    kind: Any = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.hostname, address.port, timeout=float(settings.get("timeout", 20.0)))
    body = json.dumps({"text": f"*{subject}*\n{text}"}).encode()
    try:
        target = urllib.parse.urlunsplit(("", "", address.path or "/", address.query, ""))
        connection.request("POST", target, body, {"Content-Type": "application/json"})
        status = connection.getresponse().status
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise NotSent(f"the webhook answered with {status}")


def _command(settings: Mapping[str, Any], event: str, run: Path, text: str, programs: list[subprocess.Popen[bytes]]) -> None:
    environment = {**os.environ, "FOVEA_EVENT": event, "FOVEA_RUN": str(run)}
    argv = [str(word) for word in settings["command"]]
    _run(argv, text.encode(), float(settings.get("timeout", 20.0)), environment, programs)


def _run(
    argv: list[str], data: bytes, timeout: float, environment: dict[str, str], programs: list[subprocess.Popen[bytes]]
) -> None:
    """Runs a program in a session of its own; with what it has started, it is killed after ``timeout`` seconds."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=environment, cwd="/", start_new_session=True
    )
    programs.append(process)
    try:
        process.communicate(data, timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        raise NotSent("the program did not end in time, and was killed") from None
    if process.returncode:
        raise NotSent(f"the program ended with code {process.returncode}")
