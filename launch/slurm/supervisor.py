"""Supervises one attempt on a Slurm cluster: starts the ranks, monitors them, and decides what happens next.

``python -m launch.slurm.supervisor RUN``, in the batch step on the job's first node. Standard library only, so that it runs
outside the container. Signals reach only this process (``--signal=B:USR2``): it asks Slurm what they mean (:mod:`job_end`) and
asks the ranks to stop through a file that they check between steps. A signal to the ranks themselves would kill their data
workers before anything is saved. How the run comes back afterwards: :mod:`successor`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import host_memory, send_end
from launch.slurm import excluded_nodes, job_end, memory_keepers, node_checks, successor, takeover
from launch.slurm import slurm_commands as tools
from launch.slurm.decide import RESTARTABLE, AttemptResult, Budgets, Decision, decide, spent
from launch.slurm.job_nodes import JobNodes
from launch.slurm.outbox import Outbox
from launch.slurm.preflight import is_full
from launch.slurm.steps import Step, filled, free_port
from pipeline.errors import LaunchError
from pipeline.masking import printable
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory

_MEETINGS = 3  # rendezvous tries per attempt, if the port was taken meanwhile
_CANCELLED = "the job was cancelled (scancel)"
_FULL_DELAY = 600.0  # seconds until a successor looks whether a full disk has space again


class Supervisor:
    """One attempt of a run on a cluster.

    Args:
        run: the run directory.
        environment: the batch step's environment.
    """

    def __init__(self, run: RunDirectory, environment: dict[str, str]) -> None:
        own = (host_memory.VARIABLE, host_memory.LAST_START)
        self.run, self.env = run, {name: value for name, value in environment.items() if name not in own}
        self.job = int(environment["SLURM_JOB_ID"])
        self.life = int(environment.get("SLURM_RESTART_COUNT", 0))
        self.facts = record.job(run)
        self.attempt = 0
        self.stop_reason = ""
        log = run.path / "logs" / f"batch-{self.job}.log"
        self.watch = job_end.JobWatch(self.job, self.life, log, float(self.facts["lead"]))
        self._settled = False
        self._beats, self._alive, self._looked, self._hung, self._replaced = "", time.monotonic(), 0.0, False, False
        self._full = ""
        self._restarts = int(self.facts.get("restarts", 0))
        self._nodes = JobNodes(self.job, int(self.facts.get("nodes", 1)), int(self.facts.get("spare", 0)), self.env)
        self._outbox = Outbox(run, self.facts.get("notify") or {}, self.env, self._log)

    def attend(self) -> int:
        """Run the whole attempt; returns the batch script's exit code."""
        self.watch.listen()
        if (over := record.final_state(self.run)) or record.pending_request(self.run, record.STOP):
            self._log(f"nothing to do: {over.get('why') or 'the user requested a stop'}")
            if not over:
                record.end(self.run, "stopped", "stopped by request before the attempt began")
            return 0
        if other := takeover.rival(self.run, self.job):
            self._log(f"error: job {other} supervises this run already; this job exits")
            return 2
        before = takeover.cancelled_predecessor(self.run, self.job)
        cut_off = self._write(takeover.close_dangling, self.run)
        if before is not None:
            return self._finish(Decision("stop", "cancelled", f"job {before} was cancelled (scancel)"))
        self._outbox.resume()
        if cut_off and (gives_up := spent(record.endings(self.run), Budgets(**self.facts["budgets"]))):
            decision = Decision("fail", str(record.endings(self.run)[-1].get("cause")), gives_up, spent=True)
            self.attempt = max(self.run.next_attempt() - 1, 0)
            code = self._finish(decision)
        else:
            with contextlib.ExitStack() as stack:
                self._keep_memory(stack)
                self._announce_last()
                decision = self._attempt()
                while self._restartable(decision):
                    self._outbox.add(decision)
                    self._announce_last()
                    decision = self._attempt()
            code = self._act(decision)
        self._outbox.close(continues=self._replaced or decision.action == "requeue")
        return code

    # ---- one attempt ------------------------------------------------------------------------------------------------------

    def _attempt(self) -> Decision:
        """Start the attempt and wait for its end."""
        self.watch.begin()
        if self.facts["after"] != "requeue":
            self._guard()
        before, self.attempt = self._kept_step(), self.run.next_attempt()
        history = record.endings(self.run)
        self._write(self.run.write, "live.json", {"job": self.job, "life": self.life, "host": socket.gethostname()})
        start = {"job": self.job, "life": self.life, "nodes": self.env.get("SLURM_JOB_NODELIST", ""), "before": before}
        self._write(self.run.note, "start", attempt=self.attempt, ranks=self.facts["ranks"], **start)
        code, nodes, failure = 0, node_checks.NodeProblems(), None
        if not self._full:
            code, nodes, failure = self._run_ranks()
        outcome = record.outcome(self.run, self.attempt)
        if self._full or (code and outcome is None and is_full(self.run.path)):
            self._full = f"the disk of {self.run.path} is full"
        end = AttemptResult(
            code=code,
            outcome=outcome,
            failure=failure,
            stop_reason=self.stop_reason,
            hung=self._hung,
            before=before,
            after=self._kept_step(),
            bad_nodes=nodes.bad,
            everywhere=nodes.everywhere,
            full=self._full or nodes.full,
        )
        decision = decide(end, history, Budgets(**self.facts["budgets"]))
        ended = {"code": code, "cause": decision.cause, "why": decision.why, "after": end.after, "action": decision.action}
        if not self._replaced:
            self._write(self.run.note, "end", attempt=self.attempt, **ended)
            self._write(record.exclude, self.run, dict(decision.exclude), float(self.facts.get("exclude_hours", 24.0)))
        return decision

    def _keep_memory(self, stack: contextlib.ExitStack) -> None:
        """Make the folders for snapshots in host memory, if the run takes any."""
        if not self.facts.get("snapshots"):
            return
        try:
            if self.facts["nodes"] == 1:
                value = str(stack.enter_context(host_memory.folder(self.run.path)))
            else:
                log = self.run.path / "logs" / f"memory-{self.job}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                python, nodes = str(self.facts["host_python"]), self._nodes.usable
                value = stack.enter_context(memory_keepers.kept(self.run.path, nodes, python, self.env, log))
        except (LaunchError, OSError) as error:
            self._log(f"warning: no snapshots are taken ({error})")
            return
        self.env[host_memory.VARIABLE] = value

    def _kept_step(self) -> int:
        """Number of steps of what the next attempt continues from, on disk or in host memory; -1 for nothing."""
        folder = host_memory.of_this_node(self.env)
        return max(record.saved_step(self.run), host_memory.newest_step(folder) if folder else -1)

    def _restartable(self, decision: Decision) -> bool:
        """Whether the ranks are started again within this job."""
        ending = self.stop_reason or self.watch.end is not None or self._replaced or self._full
        if ending or not self._restarts or decision.action != "requeue":
            return False
        if change := self._nodes.drop(decision.exclude):
            self._log(change)
        others = decision.cause == "node" and self.facts.get("spare")
        if not self._nodes.enough or not (others or decision.cause in RESTARTABLE):
            return False
        self._restarts -= 1
        self._log(f"attempt {self.attempt}: {decision.why} → the ranks start again in this job, {self._restarts} restarts left")
        self._beats, self._hung, self._alive = "", False, time.monotonic()
        return True

    def _announce_last(self) -> None:
        """Tell the ranks that no restart is left, so that no later start would read their snapshots."""
        if not self._restarts:
            self.env[host_memory.LAST_START] = "1"

    def _run_ranks(self) -> tuple[int, node_checks.NodeProblems, dict[str, Any] | None]:
        """Check the nodes, then start the ranks; returns their exit code, the nodes' problems, and the first failure."""
        logs = self.run.logs(self.attempt)
        try:
            logs.mkdir(parents=True, exist_ok=True)
            self.env |= self._nodes.variables()
            facts = {**self.facts, "nodes": len(self._nodes.usable) or self.facts["nodes"]}
            nodes = node_checks.check_nodes(
                self.job, self.run.path, logs, facts, self.env, self._look, self._nodes.step_options(all_usable=True)
            )
            for node, why in nodes.bad.items():
                self._log(f"preflight: {node}: {why}")
            self._heed()
            if nodes.bad and self.facts.get("spare"):
                self._nodes.drop(nodes.bad)
            if nodes.bad and self.facts.get("spare") and self._nodes.enough:
                self._log(f"the ranks run on {', '.join(self._nodes.training)}")
                reasons = "; ".join(f"{node}: {why}" for node, why in nodes.bad.items())
                self._outbox.add(Decision("requeue", "node", reasons, dict(nodes.bad)))
                self._write(record.exclude, self.run, dict(nodes.bad), float(self.facts.get("exclude_hours", 24.0)))
                self.env |= self._nodes.variables()
                nodes = node_checks.NodeProblems()
            if nodes.bad or self.stop_reason:
                return 0, nodes, None
            if slow := node_checks.check_links(
                self.job, logs, self.attempt, self.facts, self.env, self._look, self._nodes.step_options()
            ):
                self._log(f"preflight: {slow}")
                row = {"kind": "Links", "cause": "node", "retryable": True, "what": slow, "rank": -1, "code": 1, "step": 0}
                return 1, nodes, row
        except OSError as error:
            self._note_full(error)
            return 1, node_checks.NodeProblems(), None
        code = 0
        for _ in range(_MEETINGS if not self.stop_reason else 0):
            command = [filled(argument, logs) for argument in self.facts["srun"]]
            command[1:1] = self._nodes.step_options()
            environment = {**self.env, "MASTER_PORT": str(free_port()), "FOVEA_ATTEMPT": str(self.attempt)}
            self._alive = time.monotonic()
            code = Step(self.job, command, environment).wait(self._look)
            failure = record.failure(self.run, self.attempt)
            if self.stop_reason or failure is None or failure.get("cause") != "rendezvous":
                break
            self._log(f"the ranks could not connect ({failure['what']}); trying again on another port")
            with contextlib.suppress(OSError):
                (logs / "failure.json").rename(logs / "failure-meeting.json")
        return code, nodes, record.failure(self.run, self.attempt)

    def _look(self) -> str:
        """Watch over a step: signals, the end of the job, heartbeats; returns how to end the step, or nothing."""
        self._heed()
        if self.watch.too_late:
            self._log(f"{self.stop_reason}: the ranks are not gone shortly before the end of the job; they are given up")
            return "kill"
        now = time.monotonic()
        if now - self._looked < 5:
            return ""
        self._looked = now
        if request := record.pending_request(self.run, f"{record.NOW}-{self.attempt}"):
            self.stop_reason = str(request.get("reason") or "requeued")
            self._log("a user asked that the run is requeued now; the ranks are ended without saving")
            return "kill"
        live = record.read(self.run.path / "live.json")
        if live and (live.get("job"), live.get("life")) != (self.job, self.life):
            self._replaced = True
            self._log(f"error: job {live.get('job')} attends this run now; the ranks of this job are ended")
            return "kill"
        if (latest := self._heartbeats()) != self._beats:
            self._beats, self._alive = latest, now
        elif now - self._alive > self.facts["hang"]:
            self._hung = True
            self._log(f"no rank sent a heartbeat for {self.facts['hang']:.0f} s; the attempt is ended")
            return "end"
        return ""

    def _heartbeats(self) -> str:
        """Fingerprint of the heartbeats: changes whenever any rank writes one."""
        pulses = (self.run.logs(self.attempt) / "pulse").glob("rank-*.json")
        beats = []
        for path in pulses:
            with contextlib.suppress(OSError):
                beats.append(f"{path.name}{path.stat().st_mtime_ns}")
        return " ".join(sorted(beats))

    def _heed(self) -> None:
        """Act on received signals and on the time limit."""
        reason, end = self.watch.look(), self.watch.end
        if reason and not self.stop_reason:
            self._write(record.request, self.run, f"{record.STOP}-{self.attempt}", reason)
            self._log(f"{reason}: the ranks save and stop")
        self.stop_reason = reason
        if end is None or not end.ending or self._settled:
            return
        self._settled = True
        cancelled = end.cause == job_end.CANCELLED
        if cancelled and not record.final_state(self.run):
            self._write(record.end, self.run, "stopped", _CANCELLED)
        if cancelled or end.cause == job_end.REQUEUED:
            with contextlib.suppress(LaunchError):
                successor.cancel(self.run, self.job, limit=self.watch.patience)

    # ---- afterwards -------------------------------------------------------------------------------------------------------

    def _act(self, decision: Decision) -> int:
        if self._replaced:
            return 0
        self._log(f"attempt {self.attempt}: {decision.why} → {decision.action}")
        if decision.action != "requeue":
            return self._finish(decision)
        self._outbox.add(decision)  # sent while the job is put back
        if self.watch.end is not None and self.watch.end.returns:
            if self.watch.end.cause == job_end.REQUEUED or self.facts["after"] == "requeue" or not self._hand_over():
                self._log("Slurm has put this job back into the queue itself")
            return 0
        delay = _FULL_DELAY if decision.cause == "disk" else 0.0
        if self.facts["after"] != "requeue" and self._guard(delay, again=True):
            return 0
        return self._requeue()

    def _finish(self, decision: Decision) -> int:
        """End the run: record its final state and leave no job of it in the queue."""
        state = {"finish": "finished", "stop": "stopped", "fail": "failed"}[decision.action]
        over = record.final_state(self.run)
        if decision.cause != "cancelled" or not over or over.get("why") == _CANCELLED:  # not by `fovea cancel`
            self._write(record.end, self.run, state, decision.why)
        self._outbox.add(decision)  # when the final state can be read
        with contextlib.suppress(LaunchError):
            successor.cancel(self.run, self.job)
            if decision.action == "fail":
                self._send_end()
            if self.watch.end is not None and self.watch.end.returns:
                tools.cancel(self.job)
        return 0 if decision.action != "fail" else 1

    def _send_end(self) -> None:
        """Inform the trackers that the run has failed, whose ranks are gone; not if the job ends now."""
        logs, step = self.run.logs(self.attempt), self.facts.get("send_end")
        if not step or self.watch.end is not None or self.stop_reason or not send_end.is_tracked(self.run):
            return
        with contextlib.suppress(OSError, LaunchError):
            command = [filled(argument, logs) for argument in step]
            command[1:1] = self._nodes.step_options()
            Step(self.job, command, self.env).wait(lambda: "kill" if self.watch.look() else "", send_end.LIMIT)

    def _guard(self, delay: float = 0.0, *, again: bool = False) -> bool:
        """See to it that a successor waits for the end of this job; whether it does."""
        try:
            number = successor.ensure(self.run, self.job, self._avoided(), delay)
        except LaunchError as error:
            self._log(
                f"warning: no successor could be submitted ({error}); "
                + ("the job is requeued instead" if again else "the supervisor tries again when the attempt ends")
            )
            return False
        self._log(f"job {number} takes over when this one ends" + (f", in {delay:.0f} s at the earliest" if delay else ""))
        return True

    def _hand_over(self) -> bool:
        """Let the successor go on instead of this job, which Slurm has requeued after a preemption or a lost node."""
        try:
            waiting = successor.waiting(self.run, self.job, limit=self.watch.patience)
            if not waiting:
                return False
            record.hand_over(self.run, self.job)
            tools.cancel(self.job, limit=self.watch.patience)
        except (LaunchError, OSError) as error:
            self._log(f"warning: the successor does not continue instead of this job ({error})")
            return False
        self._log(f"job {waiting[0].id} continues instead of this job, which Slurm would keep waiting for two minutes")
        return True

    def _requeue(self) -> int:
        """Put this job back into the queue, where it may start two minutes later."""
        try:
            tools.requeue(self.job)
        except LaunchError as error:
            end = job_end.of_running(self.job, self.life, Path(os.devnull))
            if end is None or not end.returns:
                self._log(f"error: Slurm does not requeue the job ({error}); resume the run with: fovea resume {self.run.path}")
                return 1
        if away := self._avoided():
            with contextlib.suppress(LaunchError):
                tools.call("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={','.join(away)}")
        return 0

    def _avoided(self) -> list[str]:
        away, forgiven = excluded_nodes.avoid(self.run, self.facts)
        if forgiven:
            self._log(f"not excluded, since too few nodes would be left: {', '.join(forgiven)}")
        return away

    # ---- a disk that may be full ------------------------------------------------------------------------------------------

    def _write(self, write: Callable[..., object], *arguments: Any, **named: Any) -> object:
        """Write a record of the run; a full disk is noted instead of ending the supervisor."""
        try:
            return write(*arguments, **named)
        except OSError as error:
            self._note_full(error)
            return None

    def _note_full(self, error: OSError) -> None:
        self._full = f"the run directory cannot be written ({error.strerror}; {self.run.path})"
        self._log(f"error: {self._full}")

    def _log(self, text: str) -> None:
        """Write a line to the batch log, which may lie on the full disk."""
        with contextlib.suppress(OSError):
            os.write(1, f"{time.strftime('%Y-%m-%d %H:%M:%S')} fovea: {printable(text)}\n".encode())


def main() -> int:
    """Entry of ``python -m launch.slurm.supervisor RUN``."""
    return Supervisor(RunDirectory(Path(sys.argv[1])), dict(os.environ)).attend()


if __name__ == "__main__":
    sys.exit(main())
