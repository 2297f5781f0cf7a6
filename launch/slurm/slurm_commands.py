"""Wrappers of Slurm's commands. Standard library only."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import LaunchError

WAITING = frozenset(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "SPECIAL_EXIT", "RESV_DEL_HOLD"))
RUNNING = frozenset(("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING"))
_SEPARATOR = "\x1f"  # squeue passes it on, and no name contains it
_FORMAT = _SEPARATOR.join(("%i", "%T", "%r", "%S", "%L", "%N", "%M", "%j", "%E", "%o"))
_AWAY = ("configuration source", "Unable to contact", "Connection refused", "Socket timed out", "establish")


@dataclass(frozen=True)
class Job:
    """A line of ``squeue``.

    Attributes:
        id: job ID.
        state: as printed by Slurm, ``RUNNING``, ``PENDING``…
        reason: why it is pending.
        start: actual or expected start time.
        left: time left until its limit.
        nodes: node list.
        elapsed: elapsed time.
        name: job name.
        dependency: dependencies that are not fulfilled.
        script: path of the batch script.
    """

    id: int
    state: str
    reason: str = ""
    start: str = ""
    left: str = ""
    nodes: str = ""
    elapsed: str = ""
    name: str = ""
    dependency: str = ""
    script: str = ""

    @property
    def live(self) -> bool:
        """Whether it is running or pending."""
        return self.state in WAITING | RUNNING


def call(*argv: str, limit: float = 60.0) -> str:
    """Output of a command.

    Raises:
        LaunchError: it is not installed, does not answer within ``limit`` seconds, or fails; with its error output.
    """
    if shutil.which(argv[0]) is None:
        raise LaunchError(
            f"{argv[0]} is not on the PATH", where="Slurm", hint="Run this on a login node, or load the module that has it"
        )
    where = " ".join([word for word in argv if not word.startswith("-")][:3])
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"did not answer within {limit:.0f} s",
            where=where,
            hint="Check that the Slurm controller is running, or try again later",
        ) from error
    if done.returncode:
        message = (done.stderr or done.stdout).strip().removeprefix(f"{argv[0]}: ").removeprefix("error: ")
        away = any(phrase in message for phrase in _AWAY)
        hint = (
            "Check that this is a login node and that the Slurm controller is running; `fovea doctor` shows more" if away else ""
        )
        raise LaunchError(" ".join(message.split()) or f"failed with code {done.returncode}", where=where, hint=hint)
    return done.stdout


def submit(script: Path, *options: str) -> int:
    """Submit a batch script; returns the job ID."""
    answer = call("sbatch", "--parsable", *options, str(script))
    return int(answer.strip().split(";")[0])


def test(script: Path, *options: str) -> str:
    """Test a script without submitting it (``sbatch --test-only``): when and where it would start.

    Raises:
        LaunchError: it could never run.
    """
    command = ["sbatch", "--test-only", *options, str(script)]
    if shutil.which("sbatch") is None:
        return call(*command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    message = (done.stderr or done.stdout).strip()
    if done.returncode:
        raise LaunchError(
            message.splitlines()[-1] if message else "refused",
            where="sbatch --test-only",
            hint="Change the cluster profile, or run this on a login node",
        )
    return message.removeprefix("sbatch: ")


def jobs(*ids: int, name: str | None = None) -> list[Job]:
    """Queue entries of these jobs, or of this user's jobs with this name; finished jobs are not included."""
    options = ["--me"] if not ids else []
    if name is not None:
        options.append(f"--name={name}")
    return [job for job in _listed(*options) if not ids or job.id in ids]


def jobs_of(script: Path, *ids: int, user: int | None = None, limit: float = 60.0) -> list[Job]:
    """Queue entries of all jobs that were submitted with a batch script, and of those with one of these IDs; by number.

    Args:
        script: absolute path of the batch script.
        ids: further jobs.
        user: whose jobs; by default this user's.
        limit: seconds in which Slurm must answer.

    Raises:
        LaunchError: Slurm does not answer.
    """
    return of_script(_listed("--me" if user is None else f"--user={user}", limit=limit), script, *ids)


def of_script(listed: Iterable[Job], script: Path, *ids: int) -> list[Job]:
    """Those jobs that were submitted with a batch script or have one of these IDs; by number."""
    return sorted((job for job in listed if job.script == str(script) or job.id in ids), key=lambda job: job.id)


def user_jobs(users: Iterable[int] = (), limit: float = 60.0) -> list[Job]:
    """Queue entries of all jobs of some users.

    Args:
        users: user IDs; none stand for this user.
        limit: seconds in which Slurm must answer.

    Raises:
        LaunchError: Slurm does not answer.
    """
    named = ",".join(str(user) for user in sorted(set(users)))
    return _listed(f"--user={named}" if named else "--me", limit=limit)


def _listed(*options: str, limit: float = 60.0) -> list[Job]:
    listed = []
    for line in call("squeue", "--noheader", f"--format={_FORMAT}", *options, limit=limit).splitlines():
        number, *rest = line.strip().split(_SEPARATOR)
        if re.fullmatch(r"\d+", number) and len(rest) == 9:
            listed.append(Job(int(number), *(part.strip() for part in rest)))
    return listed


def facts(job: int, limit: float = 60.0) -> dict[str, str]:
    """Output of ``scontrol show job`` by key; empty if Slurm no longer knows the job."""
    try:
        text = call("scontrol", "show", "job", "--oneliner", str(job), limit=limit)
    except LaunchError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return pairs(text)


def pairs(text: str) -> dict[str, str]:
    """The pairs ``key=value`` of a line of ``scontrol``; the first of a key counts, as paths with blanks come last."""
    return dict(pair.split("=", 1) for pair in reversed(text.split()) if "=" in pair)


def settings(limit: float = 60.0) -> dict[str, str]:
    """Output of ``scontrol show config`` by key."""
    rows = (line.split("=", 1) for line in call("scontrol", "show", "config", limit=limit).splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in rows}


def keeps_accounts(facts: Mapping[str, str]) -> bool:
    """Whether Slurm has an accounting.

    Args:
        facts: :func:`settings`; without one, Slurm 22.05 names ``accounting_storage/none`` and Slurm 24.11 ``(null)``.
    """
    kind = facts.get("AccountingStorageType", "")
    return kind not in ("", "(null)") and "none" not in kind


def enforced(facts: Mapping[str, str]) -> frozenset[str]:
    """What Slurm enforces of ``associations``, ``limits`` and ``qos``; nothing where it only records (``nojobs``, ``nosteps``).

    Args:
        facts: :func:`settings`; each enforcing word implies ``associations``, and ``safe`` implies ``limits``
            (https://slurm.schedmd.com/slurm.conf.html, AccountingStorageEnforce).
    """
    options = {option.strip() for option in facts.get("AccountingStorageEnforce", "").lower().split(",")}
    if "all" in options:
        return frozenset({"associations", "limits", "qos"})
    implied = {"associations"} if options & {"associations", "limits", "safe", "qos", "wckeys"} else set()
    implied |= {"limits"} if options & {"limits", "safe"} else set()
    return frozenset(implied | (options & {"qos"}))


def user() -> str | None:
    """The login name of the effective user ID, by which Slurm knows the user whatever ``$LOGNAME`` says; ``None`` without one."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return None


def nodes(expression: str) -> list[str]:
    """Node names of ``n[1-3,7]``."""
    return call("scontrol", "show", "hostnames", expression).split() if expression else []


def partition_nodes(partition: str | None = None) -> set[str]:
    """Names of all nodes of a partition, whatever their state; by default of the partition in which jobs run without one.

    Raises:
        LaunchError: Slurm does not answer, or there is no such partition.
    """
    named = [f"--partition={partition}"] if partition else []
    rows = [line.split() for line in call("sinfo", "--noheader", "--Node", "--format=%N %P", *named).splitlines()]
    return {row[0] for row in rows if len(row) == 2 and (partition or row[1].endswith("*"))}


def requeue(job: int, exclude: Sequence[str] = ()) -> None:
    """Requeue a job and exclude some nodes. A running job is ended at once."""
    call("scontrol", "requeue", str(job))
    if exclude:
        call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(exclude)}")


def cancel(job: int | str, *options: str, limit: float = 60.0) -> None:
    """Cancel a job, or one step of it."""
    call("scancel", *options, str(job), limit=limit)
