"""Interrupts runs on a real Slurm in every way that is known, and writes what became of them as a table.

``python -m tests.helpers.interruptions OUT.md --before CHECKOUT`` runs each story with this checkout and with another one, with
Slurm's own ``KillWait`` and ``cred_expire``. The ranks train nothing (``cluster_rank.py``); no command is typed but those named.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = Path(__file__).with_name("cluster_rank.py")
CODE = Path.cwd()  # the checkout whose code runs
PATIENCE = 170.0  # seconds in which a run comes back, if it does
SITE: dict[str, Any] = {"nodes": 2, "gpus_per_node": 0, "cpus_per_rank": 1, "memory": "50", "time": "30", "exclusive": False}
SITE |= {"checkpoint_lead_time": 60, "host_python": sys.executable, "local_paths": (), "preflight": {"disk_gb": 0.001}}
if other := os.environ.get("FOVEA_TEST_SLURM"):
    SITE["setup"] = (f"export PATH={other}/bin:$PATH",)


class Story:
    """One run on the cluster, interrupted.

    Args:
        slurm: the cluster.
        folder: an empty folder.
    """

    def __init__(self, slurm: Any, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.run, self.job = folder / "run", 0
        self.interrupted = 0.0

    def submit(self, acts: dict[str, Any] | None = None, *, steps: int = 5000, **profile: Any) -> None:
        """Submit the run, by the checkout's own code."""
        from launch.slurm import render
        from launch.slurm.profile import ClusterProfile
        from launch.slurm.submit import submit
        from pipeline.config.load import load
        from tests.helpers.runs import TOY

        (self.folder / "toy.yaml").write_text(TOY)
        plan = {"steps": steps, "seconds": 0.15, "every": 4, "acts": acts or {}}
        words = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=5", "--unbuffered"]
        words += ["--open-mode=append", "--output=%LOGS%/rank-%t.log", sys.executable, str(RANK), str(self.run), json.dumps(plan)]
        render.step = lambda *_, **__: words
        loaded = load(self.folder / "toy.yaml", ["data.shards=/nowhere/x.tar", f"run.directory={self.run}"])
        self.job = submit(loaded, ClusterProfile(**{**SITE, **profile}), index=False).job or 0

    def reach(self, step: int, attempt: int = 0) -> None:
        """Wait until an attempt is at a step."""
        pulse = self.run / "logs" / f"attempt-{attempt:04d}" / "pulse" / "rank-0.json"
        self.until(lambda: pulse.exists() and json.loads(pulse.read_text())["step"] >= step, 300)

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> float:
        """Wait for a condition; returns the seconds it took, or infinity."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            with contextlib.suppress(ValueError, OSError):
                if condition():
                    return time.monotonic() - begun
            time.sleep(0.2)
        return float("inf")

    def starts(self) -> int:
        """How many attempts have begun."""
        return (self.run / "attempts.jsonl").read_text().count('"event": "start"')

    def verdict(self) -> str:
        """The run's final state as recorded."""
        path = self.run / "final_state.json"
        return json.loads(path.read_text())["state"] if path.exists() else ""

    def comes_back(self) -> str:
        """Whether it trains again by itself, and after how many seconds from its interruption."""
        seconds = self.until(lambda: self.starts() > 1 or self.verdict())
        if self.starts() > 1:
            return f"trains again after {seconds:.0f} s"
        return f"ended: {self.verdict()}" if self.verdict() else f"does not train again within {PATIENCE:.0f} s"

    def queue(self) -> str:
        """What ``squeue`` shows of the run's jobs."""
        lines = self.slurm.call("squeue", "--me", "-h", "-o", "%T (%r)|%o").split("\n")
        own = [line.partition("|")[0] for line in lines if line.endswith(f"|{self.run}/submit/script.sbatch")]
        return ", ".join(sorted(line.replace(" (None)", "") for line in own)) or "no job"

    def account(self) -> str:
        """The last line that ``fovea status`` shows of an attempt's end, and the state."""
        text = self.fovea("status", str(self.run))
        ends = [line.split("  ")[-1] for line in text.splitlines() if line.startswith("  attempt")]
        return f"`{text.splitlines()[0].partition(': ')[2][:110]}`; attempt 0 `{ends[0][:90]}`" if ends else text[:110]

    def fovea(self, *words: str, **variables: str) -> str:
        """Output of a command of the checkout."""
        command = [sys.executable, "-m", "launch.cli.main", *words]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, cwd=CODE, env=environment, capture_output=True, text=True, timeout=300, check=False)
        return (done.stdout + done.stderr).strip() + ("" if done.returncode == 0 else f" (exit code {done.returncode})")

    def processes(self, *words: str) -> list[int]:
        """Processes whose command line has these arguments."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0") if entry.name.isdigit() else []
                if all(word in argv for word in words) and "srun" not in argv[0]:
                    found.append(int(entry.name))
        return found

    def supervisor(self) -> int:
        """The process of its supervisor."""
        return self.processes("launch.slurm.supervisor", str(self.run))[0]


def scancel(s: Story) -> str:
    """`scancel JOB`"""
    s.submit()
    s.reach(8)
    s.slurm.call("scancel", str(s.job))
    s.until(lambda: s.queue() == "no job" or "BeginTime" in s.queue(), 60)
    return f"queue: {s.queue()}; {s.account()}"


def requeue(s: Story) -> str:
    """`scontrol requeue JOB`"""
    s.submit()
    s.reach(8)
    s.slurm.call("scontrol", "requeue", str(s.job))
    s.until(lambda: "BeginTime" in s.queue(), 60)
    return f"queue: {s.queue()}; {s.account()}"


def requeue_and_scancel(s: Story) -> str:
    """`scontrol requeue JOB`, then `scancel JOB` while it waits"""
    s.submit()
    s.reach(8)
    s.slurm.call("scontrol", "requeue", str(s.job))
    s.until(lambda: "BeginTime" in s.queue(), 60)
    s.slurm.call("scancel", str(s.job))
    s.until(lambda: s.queue() == "no job", 15)
    return f"queue: {s.queue()}"


def time_limit(s: Story) -> str:
    """Saved before the time limit, on an empty cluster"""
    s.submit(time="2", checkpoint_lead_time=70)
    s.reach(8)
    s.until(lambda: '"event": "end"' in (s.run / "attempts.jsonl").read_text(), 120)
    return s.comes_back()


def preempted(s: Story) -> str:
    """Preemption by requeue; the urgent job takes 3 s"""
    s.submit()
    s.reach(8)
    urgent = s.folder / "urgent.sh"
    urgent.write_text("#!/bin/bash\n#SBATCH --partition=urgent --nodes=2 --exclusive --output=/dev/null\nsleep 3\n")
    s.slurm.call("sbatch", str(urgent))
    return f"{s.comes_back()}; {s.account()}"


def lost_node(s: Story) -> str:
    """A node is lost (not the first), and is back at once"""
    s.submit()
    s.reach(8)
    s.slurm.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    s.until(lambda: '"event": "end"' in (s.run / "attempts.jsonl").read_text(), 60)
    s.slurm.call("scontrol", "update", "nodename=n2", "state=resume", check=False)
    return f"{s.comes_back()}; {s.account()}"


def cancelled_finished(s: Story) -> str:
    """`fovea cancel` of a finished run"""
    s.submit(steps=12)
    s.until(lambda: s.verdict() == "finished")
    answer = s.fovea("cancel", str(s.run))
    return f"`{answer.splitlines()[-1][:60]}`; the run is {s.verdict()}"


def blank(s: Story) -> str:
    """A run directory with a blank in its name"""
    s.run = s.folder / "my run"
    try:
        s.submit(steps=12)
    except Exception as error:  # the message is the result
        return f"refused: `{str(error)[:100]}`"
    s.until(lambda: s.verdict() == "finished")
    return f"{s.verdict() or 'does not begin'}; queue: {s.queue()}"


def hang_at_limit(s: Story) -> str:
    """Ranks hang at the time limit and do not end"""
    s.submit({"0": [8, "freeze"]}, time="2")
    s.reach(8)
    s.until(lambda: "COMPLET" in s.slurm.state(s.job) or "TIMEOUT" in s.slurm.state(s.job), 250)
    return f"{s.comes_back()}; queue: {s.queue()}; {s.account()}"


def killed_supervisor(s: Story) -> str:
    """`kill -9` of the supervisor (batch script)"""
    s.submit()
    s.reach(8)
    os.kill(s.supervisor(), signal.SIGKILL)
    return f"{s.comes_back()}; {s.account()}"


def full_disk(s: Story) -> str:
    """The disk of the run directory becomes full, batch log included"""
    small = s.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=True)
    try:
        s.run = small / "run"
        s.submit({"0": [12, "fill"]})
        s.until(lambda: s.starts() and s.slurm.state(s.job) in ("COMPLETED", "FAILED", "PENDING"), 120)
        return f"queue: {s.queue()}; {s.account()}"
    finally:
        s.slurm.call("scancel", "--me", check=False)
        s.until(lambda: not subprocess.run(["umount", str(small)], capture_output=True, check=False).returncode, 60)


def silent_slurm(s: Story) -> str:
    """Slurm does not answer `fovea status` and `fovea cancel` while the run trains"""
    s.submit()
    s.reach(8)
    away = {"SLURM_CONF": "/nowhere/slurm.conf"}
    state, cancelled = s.fovea("status", str(s.run), **away), s.fovea("cancel", str(s.run), **away)
    return f"status: `{state.splitlines()[0].partition(': ')[2][:90]}`; cancel: `{cancelled[:90]}`; queue: {s.queue()}"


def never_runs(s: Story) -> str:
    """`cluster.nodes=4` on two nodes"""
    try:
        s.submit(nodes=4)
    except Exception as error:  # the message is the result
        return f"refused: `{str(error)[:150]}`"
    time.sleep(3)
    return f"queue: {s.queue()}"


STORIES = (
    scancel,
    requeue,
    requeue_and_scancel,
    time_limit,
    preempted,
    lost_node,
    hang_at_limit,
    killed_supervisor,
    full_disk,
    silent_slurm,
    never_runs,
    cancelled_finished,
    blank,
)


def tell(out: Path, names: list[str]) -> None:
    """Run stories with the code of the current directory and write their ends as JSON; all of them by default."""
    from tests.helpers.slurm import cluster

    ends = {}
    with tempfile.TemporaryDirectory(prefix="fovea-interruptions-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own = {"AuthInfo": f"socket={folder}/c/munge/sock", "KillWait": "30", "MinJobAge": "300"}
        own |= {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
        partitions = ["PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1"]
        partitions += ["PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"]
        with cluster(folder / "c", extra=own, partitions=partitions) as slurm:
            os.environ |= slurm.environment
            for story in (one for one in STORIES if one.__name__ in names or not names):
                (folder / story.__name__).mkdir()
                try:
                    ends[story.__name__] = story(Story(slurm, folder / story.__name__))
                except (AssertionError, OSError, ValueError, IndexError) as error:
                    ends[story.__name__] = f"{type(error).__name__}: {error}"[:200]
                print(f"{story.__name__}: {ends[story.__name__]}", flush=True)
                slurm.call("scancel", "--me", check=False)
                end = time.monotonic() + 90
                while slurm.call("squeue", "--me", "-h").strip() and time.monotonic() < end:
                    time.sleep(0.5)
    out.write_text(json.dumps({name: text.replace(str(folder), "…") for name, text in ends.items()}))


def main() -> None:
    """Entry of ``python -m tests.helpers.interruptions OUT.md --before CHECKOUT``."""
    if sys.argv[1] == "--tell":
        tell(Path(sys.argv[2]), sys.argv[3:])
        return
    out, before = Path(sys.argv[1]), Path(sys.argv[3])
    ends = {}
    with tempfile.TemporaryDirectory() as name:
        for key, checkout in (("before", before), ("after", CODE)):
            file = Path(name) / key
            code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
            command = [sys.executable, "-c", code, str(Path(__file__).resolve()), "--tell", str(file)]
            subprocess.run(command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, check=True)
            ends[key] = json.loads(file.read_text())
    rows = [
        f"| {story.__doc__} | {ends['before'].get(story.__name__, '')} | {ends['after'].get(story.__name__, '')} |"
        for story in STORIES
    ]
    out.write_text("\n".join(["| what happens | before | now |", "|---|---|---|", *rows]) + "\n")


if __name__ == "__main__":
    main()
