"""Starts the ranks of ``fovea train`` on this host, and again when they died or hung, as often as ``launch.restarts`` allows.

Each start is an attempt of its own and continues from the newest snapshot in host memory or checkpoint on disk. Does not import
torch.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from launch import host_memory, local
from launch.forked import RankServer
from launch.preload import surroundings
from launch.resume import chosen_again
from launch.slurm.decide import RESTARTABLE, AttemptResult, Budgets, Decision, decide
from pipeline.checkpoint.files import Saved
from pipeline.config.schema import Config
from pipeline.data.inputs import Inputs
from pipeline.runtime import job_record as record
from pipeline.runtime.interpreter import module_command
from pipeline.runtime.run_directory import RunDirectory
from pipeline.runtime.startup_phases import VARIABLE, StartupPhases


def attend(
    config: Config,
    run: RunDirectory,
    ranks: int,
    checkpoint: Saved | None,
    inputs: Inputs,
    *,
    server: RankServer | None = None,
    startup: StartupPhases | None = None,
) -> tuple[int, int]:
    """Start the ranks until the run ends or no restart is left.

    Args:
        config: the settings.
        run: the run directory, locked by the caller; the settings are written there.
        ranks: number of ranks.
        checkpoint: the checkpoint to start from, ``None`` to begin.
        inputs: the indexed data.
        server: forks the ranks; closed by the caller.
        startup: when the phases before the first start have ended.

    Returns:
        Number of the last attempt, and its exit code.

    Raises:
        FoveaError: the ranks cannot be started.
    """
    left, history = config.launch.restarts, list[dict[str, Any]]()
    with contextlib.ExitStack() as stack:
        environment = surroundings()
        snapshots = None
        if left and config.checkpoint.snapshot_every is not None:
            snapshots = stack.enter_context(host_memory.folder(run.path))
            environment[host_memory.VARIABLE] = str(snapshots)
        received: list[int] = []
        stack.enter_context(local.noted(received))  # also between two attempts
        record.clear(run)  # once: a request between two attempts is obeyed
        while True:
            if not left:
                environment[host_memory.LAST_START] = "1"
            attempt = run.next_attempt()
            run.note("start", attempt=attempt, ranks=ranks, resumed_from=checkpoint.step if checkpoint else None)
            start = str(checkpoint.path) if checkpoint else "-"
            startup = startup or StartupPhases("launcher", time.time())
            startup.mark("checkpoint chosen")
            environment[VARIABLE] = startup.variable()
            code = local.start(
                module_command("launch.rank_main", str(run.config), str(attempt), start),
                ranks,
                log_directory=run.logs(attempt),
                environment=environment,
                threads=config.train.threads,
                kill_on_signal=bool(left),
                server=server,
                received=received,
            )
            before = checkpoint
            run.note("end", attempt=attempt, code=code, **({"signal": True} if received else {}))
            finished = (record.outcome(run, attempt) or {}).get("stop") == "FINISHED"  # a rank may be killed as it leaves
            if code == 0 or received or finished or not left:
                return attempt, code
            checkpoint = chosen_again(config, run, inputs, snapshots)
            decision = _decide(config, run, attempt, code, before, checkpoint, history)
            if decision.action != "requeue" or decision.cause not in RESTARTABLE:
                if decision.cause != "refused":  # else the rank has said it
                    print(f"fovea: the ranks are not started again: {decision.why}", file=sys.stderr)
                return attempt, code
            if received or record.pending_request(run, record.STOP):
                print("fovea: stopped before the ranks started again; the same command resumes", file=sys.stderr)
                return attempt, code
            left -= 1
            startup = None  # the next start has its own
            begin = f"step {checkpoint.step}" if checkpoint else "the beginning"
            where = " in host memory" if checkpoint and snapshots and checkpoint.path.parent == snapshots else ""
            print(f"fovea: {decision.why}; the ranks start again from {begin}{where}, {left} restarts left", file=sys.stderr)


def _decide(
    config: Config,
    run: RunDirectory,
    attempt: int,
    code: int,
    before: Saved | None,
    after: Saved | None,
    history: list[dict[str, Any]],
) -> Decision:
    """What follows from the end of an attempt, which is added to the history of this launch."""
    failure = record.failure(run, attempt)
    steps = {"before": before.step if before else -1, "after": after.step if after else -1}
    outcome = record.outcome(run, attempt)
    result = AttemptResult(code=code, outcome=outcome, failure=failure, before=steps["before"], after=steps["after"])
    n = config.launch.restarts
    decision = decide(result, history, Budgets(crash=n, hang=n, rendezvous=n, no_progress=n + 1))
    history.append({**steps, "cause": decision.cause, "why": decision.why})
    return decision
