"""A rank that trains nothing and keeps the contract: checkpoints, pulse, outcome, control files. Standard library only.

``python rank.py RUN PLAN``; the plan is a JSON object: ``steps``, ``seconds`` a step, ``every`` so many steps a checkpoint, and
what an attempt does at a step: ``{"0": [5, "crash"]}``, with crash, kill, refuse, freeze, quiet (rank 1 ends early with 0), meet
(the ranks do not meet the first time), broken (rank 1's node is at fault), fill (fills the disk of the run and fails at the next
file) or nonfinite. With ``scores``, by the name of the run directory, the run pauses at its ``train.pause_at`` and has its score
of knn/k10 there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

run, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
rank, attempt = int(os.environ["SLURM_PROCID"]), int(os.environ["FOVEA_ATTEMPT"])
logs = run / "logs" / f"attempt-{attempt:04d}"
signalled: list[int] = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda n, _: signalled.append(n))


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{rank}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def saved() -> int:
    steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step_*") if (path / "manifest.json").exists()]
    return max(steps, default=0)


def save(step: int) -> None:
    if rank == 0:
        put(run / "checkpoints" / f"step_{step:09d}" / "manifest.json", {"step": step, "seconds": step * plan["seconds"]})


# As pipeline.errors.failure_fields writes them.
VERDICTS = {
    "ValueError": {"retryable": True, "cause": "crash"},
    "ConfigError": {"retryable": False, "cause": "refused"},
    "NonFiniteError": {"retryable": False, "cause": "nonfinite"},
    "RendezvousError": {"retryable": True, "cause": "rendezvous"},
    "MachineError": {"retryable": True, "cause": "node"},
}


def fail(kind: str, what: str) -> None:
    put(
        logs / "failure.json",
        {
            "rank": rank,
            "kind": kind,
            "what": what,
            "code": 1,
            "step": step,
            "node": os.environ["SLURMD_NODENAME"],
            **VERDICTS[kind],
        },
    )
    os._exit(1)


step = saved()
at, act = plan.get("acts", {}).get(str(attempt), [-1, ""])
print(f"rank {rank} of attempt {attempt} begins at step {step} on {os.environ['SLURMD_NODENAME']}", flush=True)
if rank == 0:
    with (run / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"event": "training", "attempt": attempt, "t": time.time(), "step": step}) + "\n")
if act == "meet" and not (logs / "failure-meeting.json").exists():  # which the attendant makes before the second start
    fail("RendezvousError", "the address is in use")
stop = ""
scores = plan.get("scores", {})
pause = json.loads((run / "config.json").read_text())["train"]["pause_at"] if scores else None
while step < plan["steps"]:
    if step == at:
        if act == "crash":
            fail("ValueError", f"broken at {step}") if rank == 1 else time.sleep(30)
        if act == "kill" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while act == "kill" and not signalled:  # until Slurm ends it, however busy the machine is
            time.sleep(0.02)
        if act == "broken":
            fail("MachineError", "uncorrectable ECC error") if rank == 1 else time.sleep(30)
        if act == "refuse":
            fail("ConfigError", "no such shard")
        if act == "nonfinite":
            fail("NonFiniteError", "10 steps in a row were not finite")
        if act == "fill" and rank == 0:
            with contextlib.suppress(OSError), (run / "fill").open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        if act == "freeze":
            time.sleep(300)
        if act == "quiet" and rank == 1:
            os._exit(0)
    time.sleep(plan["seconds"])
    step += 1
    put(logs / "pulse" / f"rank-{rank}.json", {"step": step, "beat": step})
    if step % plan["every"] == 0:
        save(step)
    if (run / "control" / "stop").exists():
        stop = "USER_REQUEST"
    elif (run / "control" / f"stop-{attempt}").exists():
        stop = "PREEMPTED"
    elif signalled and (logs / "failure.json").exists():
        os._exit(1)  # another rank has failed, and Slurm ends the rest
    elif signalled:
        stop = "SIGTERM"
    if pause == f"{step} steps":
        stop = "USER_REQUEST"
        if rank == 0:
            row = {"t": time.time(), "kind": "metrics", "step": step, "values": {"knn/k10": scores[run.name]}}
            (run / "tracking").mkdir(exist_ok=True)
            (run / "tracking" / f"journal-{attempt:04d}.jsonl").write_text(json.dumps(row) + "\n")
    if stop:
        save(step)
        break
if rank == 0:
    save(step)
    put(run / "outcome.json", {"stop": stop or "FINISHED", "step": step, "steps": plan["steps"], "attempt": attempt})
