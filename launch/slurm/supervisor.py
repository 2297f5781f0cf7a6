"""Supervises one attempt on a Slurm cluster: starts the ranks, monitors them, and decides what happens next.

``python -m launch.slurm.supervisor RUN``, in the batch step on the job's first node. Standard library only, so that it runs
outside the container. Signals reach only this process (``--signal=B:USR2``): it asks the ranks to stop through a file that they
check between steps. A signal to the ranks themselves would kill their data workers before anything is saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch.slurm import slurm_commands as tools
from launch.slurm.decide import AttemptResult, Budgets, Decision, classify, decide
from pipeline.errors import LaunchError
from pipeline.masking import printable
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory

_PORTS = range(61001, 65536)  # above the range for outgoing connections
_MEETINGS = 3  # rendezvous tries per attempt, if the port was taken meanwhile
_TICK = 0.5


class Supervisor:
    """One attempt of a run on a cluster.

    Args:
        run: the run directory.
        environment: the batch step's environment.
    """

    def __init__(self, run: RunDirectory, environment: dict[str, str]) -> None:
        self.run, self.env = run, environment
        self.job = int(environment["SLURM_JOB_ID"])
        self.life = int(environment.get("SLURM_RESTART_COUNT", 0))
        self.facts = record.job(run)
        self.stop_reason = ""
        self.attempt = 0
        self._step: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []
        self._limit = float("inf")
        self._everywhere = False

    def attend(self) -> int:
        """Run the whole attempt; returns the batch script's exit code."""
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        if (over := record.final_state(self.run)) or record.pending_request(self.run, record.STOP):
            self._log(f"nothing to do: {over.get('why') or 'the user requested a stop'}")
            if not over:
                record.end(self.run, "stopped", "stopped by request before the attempt began")
            return 0
        if other := self._another():
            self._log(f"error: job {other} supervises this run already; this job exits")
            return 2
        self.run.write("live.json", {"job": self.job, "life": self.life, "host": socket.gethostname()})
        self._close_dangling()
        self._limit = self._end_of_job()
        self.attempt = self.run.next_attempt()
        before = record.saved_step(self.run)
        nodes = self.env.get("SLURM_JOB_NODELIST", "")
        self.run.note(
            "start", attempt=self.attempt, ranks=self.facts["ranks"], job=self.job, life=self.life, nodes=nodes, before=before
        )
        if self.facts["after"] == "chain":
            self._successor(after=self.job)
        decision = self._attempt(before)
        return self._act(decision)

    # ---- one attempt ------------------------------------------------------------------------------------------------------

    def _attempt(self, before: int) -> Decision:
        budgets = Budgets(**self.facts["budgets"])
        code, hung, bad = 0, False, self._preflight()
        self._heed()
        slow = None if bad else self._links()
        for _ in range(_MEETINGS if not bad and slow is None and not self.stop_reason else 0):
            code, hung = self._ranks()
            failure = record.failure(self.run, self.attempt)
            if self.stop_reason or failure is None or failure.get("cause") != "rendezvous":
                break
            self._log(f"the ranks could not connect ({failure['what']}); trying again on another port")
            with contextlib.suppress(OSError):
                (self.run.logs(self.attempt) / "failure.json").rename(self.run.logs(self.attempt) / "failure-meeting.json")
        failure = slow or record.failure(self.run, self.attempt)
        end = AttemptResult(
            code=code,
            outcome=record.outcome(self.run, self.attempt),
            failure=failure,
            stop_reason=self.stop_reason,
            hung=hung,
            before=before,
            after=record.saved_step(self.run),
            bad_nodes=bad,
            everywhere=self._everywhere,
        )
        decision = decide(end, [row for row in record.endings(self.run) if row.get("attempt") != self.attempt], budgets)
        self.run.note(
            "end",
            attempt=self.attempt,
            code=code,
            cause=decision.cause,
            why=decision.why,
            after=end.after,
            action=decision.action,
        )
        record.exclude(self.run, dict(decision.exclude))
        return decision

    def _preflight(self) -> dict[str, str]:
        """Nodes that failed the checks, with the reasons."""
        settings = self.facts["preflight"]
        if not settings["enabled"]:
            return {}
        folder = self.run.logs(self.attempt) / "preflight"
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            **settings,
            "folder": str(folder),
            "run": str(self.run.path),
            "gpus": self.facts["gpus_per_node"],
            "t": time.time(),
        }
        command = [
            *("srun", "--kill-on-bad-exit=0", f"--ntasks={self.facts['nodes']}", "--ntasks-per-node=1"),
            *(f"--output={str(folder).replace('%', '%%')}/%N.log", "--overlap"),
            *(self.facts["host_python"], "-m", "launch.slurm.preflight", json.dumps(options)),
        ]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=settings["seconds"] + 30, check=False, stdin=subprocess.DEVNULL)
        bad, answers = {}, {path.stem: record.read(path) for path in folder.glob("*.json")}
        try:
            expected = tools.nodes(self.env.get("SLURM_JOB_NODELIST", ""))
        except LaunchError:
            expected = list(answers)
        for node in expected:
            if node not in answers:
                bad[node] = f"preflight did not answer in {settings['seconds']:.0f} s"
            elif answers[node].get("problems"):
                bad[node] = "; ".join(answers[node]["problems"])
        self._everywhere = len(bad) == len(expected) > 1
        for node, why in bad.items():
            self._log(f"preflight: {node}: {why}")
        return bad

    def _links(self) -> dict[str, Any] | None:
        """Check the connections between the nodes; returns a failure, or ``None`` if there is none or the check is disabled."""
        settings = self.facts["preflight"]
        required = float(settings["bandwidth_gbps"])
        if not settings["enabled"] or not required or self.stop_reason:
            return None
        logs = self.run.logs(self.attempt)
        logs.mkdir(parents=True, exist_ok=True)
        command = [_filled(argument, logs) for argument in self.facts["links"]]
        environment = {**self.env, "MASTER_PORT": str(_free_port()), "FOVEA_ATTEMPT": str(self.attempt)}
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=environment, timeout=settings["seconds"] + 60, check=False, stdin=subprocess.DEVNULL)
        bandwidth = record.read(logs / "links.json").get("gbps")
        if bandwidth is not None and float(bandwidth) >= required:
            self._log(f"an all-reduce over all ranks: {float(bandwidth):.2f} GB/s")
            return None
        result = "did not end" if bandwidth is None else f"ran at {float(bandwidth):.3f} GB/s of {required:g} required"
        self._log(f"preflight: an all-reduce over all ranks {result}")
        return {
            "kind": "Links",
            "cause": "node",
            "retryable": True,
            "what": f"an all-reduce over all ranks {result}",
            "rank": -1,
            "code": 1,
            "step": 0,
        }

    def _ranks(self) -> tuple[int, bool]:
        """Start all ranks as one step and wait for their end; returns its code, and whether it was ended as hung."""
        logs = self.run.logs(self.attempt)
        logs.mkdir(parents=True, exist_ok=True)
        command = [_filled(argument, logs) for argument in self.facts["srun"]]
        environment = {**self.env, "MASTER_PORT": str(_free_port()), "FOVEA_ATTEMPT": str(self.attempt)}
        self._step = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        hung, alive = False, time.monotonic()
        beats, looked = "", 0.0
        while (code := self._step.poll()) is None:
            time.sleep(_TICK)
            now = time.monotonic()
            self._heed()
            if now - looked > 5:
                looked = now
                if (latest := self._beats()) != beats:
                    beats, alive = latest, now
                elif not hung and now - alive > self.facts["hang"]:
                    hung = True
                    self._log(f"no rank sent a heartbeat for {self.facts['hang']:.0f} s; the attempt is ended")
                    self._kill_step()
        return code if code >= 0 else 128 - code, hung

    def _beats(self) -> str:
        """Fingerprint of the heartbeats: changes whenever any rank writes one."""
        pulses = (self.run.logs(self.attempt) / "pulse").glob("rank-*.json")
        beats = []
        for path in pulses:
            with contextlib.suppress(OSError):
                beats.append(f"{path.name}{path.stat().st_mtime_ns}")
        return " ".join(sorted(beats))

    def _kill_step(self) -> None:
        """End the ranks even if a node's Slurm daemon is gone."""
        with contextlib.suppress(LaunchError):
            for line in tools.call("squeue", "--noheader", "--steps", f"--jobs={self.job}", "--format=%i").split():
                if line.partition(".")[2].isdigit():
                    tools.cancel(line)
        if self._step is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._step.wait(timeout=30)
            self._step.kill()

    def _end_of_job(self) -> float:
        """Wall-clock time at which Slurm will end the job; its own warning comes up to a minute early, or never."""
        with contextlib.suppress(LaunchError, ValueError):
            end = tools.facts(self.job).get("EndTime", "Unknown")
            return time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S"))
        return float("inf")

    # ---- stop requests -----------------------------------------------------------------------------------------------------

    def _note(self, number: int, _: object) -> None:
        self._signals.append(number)

    def _heed(self) -> None:
        """Act on received signals and on the time limit."""
        if self._signals:
            near = time.time() > self._limit - float(self.facts["lead"]) - 120
            self._stop("time limit" if near and signal.SIGUSR2 in self._signals else "preempted")
        elif time.time() > self._limit - float(self.facts["lead"]):
            self._stop("time limit")

    def _stop(self, reason: str) -> None:
        """Ask the ranks to save a checkpoint and stop after the current step."""
        if not self.stop_reason:
            self.stop_reason = reason
            record.request(self.run, f"{record.STOP}-{self.attempt}", reason)
            self._log(f"{reason}: the ranks save and stop")

    # ---- afterwards -------------------------------------------------------------------------------------------------------

    def _act(self, decision: Decision) -> int:
        self._log(f"attempt {self.attempt}: {decision.why} → {decision.action}")
        if decision.action != "requeue":
            record.end(self.run, {"finish": "finished", "stop": "stopped", "fail": "failed"}[decision.action], decision.why)
            if self.facts["after"] == "chain":
                self._cancel_successor()
            return 0 if decision.action != "fail" else 1
        if self.facts["after"] == "chain":
            return 0  # the successor is already in the queue
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # requeueing ends this process itself, which has one thing left to do
        away = sorted(record.excluded(self.run))
        try:
            if int(self.env.get("SLURM_RESTART_COUNT", 0)) == self.life:
                tools.requeue(self.job)
            # Slurm delays a requeued job by two minutes because of old credentials, which this job does not use.
            changes = ["StartTime=now", *([f"ExcNodeList={','.join(away)}"] if away else [])]
            for _ in range(20):
                with contextlib.suppress(LaunchError):
                    tools.call("scontrol", "update", f"JobId={self.job}", *changes)
                    break
                time.sleep(0.5)
            time.sleep(60)
        except LaunchError as error:
            self._log(f"Slurm does not requeue the job ({error}); a successor is submitted instead")
            self._successor(after=self.job)
        return 0

    def _successor(self, *, after: int) -> None:
        """Submit a job that takes over when this one ends, however it ends."""
        options = [f"--dependency=afterany:{after}"]
        if away := sorted(record.excluded(self.run)):
            options.append(f"--exclude={','.join(away)}")
        try:
            number = tools.submit(self.run.path / "submit" / "script.sbatch", *options)
        except LaunchError as error:
            self._log(f"error: no successor could be submitted ({error}); resume the run with: fovea resume {self.run.path}")
            return
        self.run.write("successor.json", {"job": number, "after": after})
        self._log(f"job {number} takes over when this one ends")

    def _cancel_successor(self) -> None:
        number = record.read(self.run.path / "successor.json").get("job")
        if number:
            with contextlib.suppress(LaunchError):
                tools.cancel(int(number))

    def _another(self) -> int | None:
        """The job that already supervises this run, if there is one."""
        held = int(record.read(self.run.path / "live.json").get("job", self.job))
        if held == self.job:
            return None
        with contextlib.suppress(LaunchError):
            if any(job.state in tools.RUNNING - {"COMPLETING"} for job in tools.jobs(held)):
                return held
        return None

    def _close_dangling(self) -> None:
        """Record the end of attempts that were cut off with their node, since their supervisor could not."""
        for row in record.endings(self.run):
            if "ended_at" not in row and "started_at" in row and "job" in row:
                number, after = int(row["attempt"]), record.saved_step(self.run)
                request = record.pending_request(self.run, f"{record.STOP}-{number}")
                outcome = record.outcome(self.run, number)
                if outcome is not None:
                    cause, why = classify(AttemptResult(outcome=outcome, stop_reason=str((request or {}).get("reason", ""))))
                elif request:
                    cause, why = str(request.get("reason")), "cut off while it was stopping"
                else:
                    cause, why = "node", "cut off: its first machine failed, or the job was killed"
                self.run.note("end", attempt=number, code=-1, cause=cause, why=why, after=after, action="requeue")

    def _log(self, text: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} fovea: {printable(text)}", flush=True)


def _filled(argument: str, logs: Path) -> str:
    """An argument of ``srun`` with the attempt's log directory; in Slurm's file patterns ``%`` is written twice."""
    own = str(logs).replace("%", "%%") if argument.startswith("--output=") else str(logs)
    return argument.replace("%LOGS%", own)


def _free_port() -> int:
    for port in random.SystemRandom().sample(_PORTS, 200):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    return 0


def main() -> int:
    """Entry of ``python -m launch.slurm.supervisor RUN``."""
    return Supervisor(RunDirectory(Path(sys.argv[1])), dict(os.environ)).attend()


if __name__ == "__main__":
    sys.exit(main())
