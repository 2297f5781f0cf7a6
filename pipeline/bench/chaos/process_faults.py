"""Faults of processes: killed, frozen, out of memory, with another clock."""

from __future__ import annotations

import resource
import signal
import threading
import time

from pipeline.bench.chaos.kinds import Case, Kind
from pipeline.bench.chaos.runs import Run, children, kill, until
from pipeline.bench.chaos.site import RANKS, Site, helper

_HANG = ("watchdog.hang_floor=3", "watchdog.hang_factor=5")  # a test's patience; the default is five minutes


def _nothing(case: Case, run: Run) -> str:
    """The control: what noise alone looks like."""
    return "nothing was done"


def _kill_rank(case: Case, run: Run) -> str:
    number = case.rng.randrange(RANKS)
    return f"rank {number} killed" if kill(run.rank(number)) else ""


def _prepare_restart(case: Case) -> None:
    case.overrides += ("launch.restarts=3", "checkpoint.snapshot_every=2 steps")


def _prepare_stop_restart(case: Case) -> None:
    _prepare_stop(case)
    _prepare_restart(case)


def kill_all(case: Case, run: Run) -> str:
    """Kill the launcher and all ranks, as when a machine loses its power."""
    assert run.process is not None
    for process in [run.process.pid, *run.alive()]:
        kill(process)
    return "launcher and ranks killed"


def _prepare_stop(case: Case) -> None:
    case.overrides += _HANG


def _stop_rank(case: Case, run: Run) -> str:
    number = case.rng.randrange(RANKS)
    process, launcher = run.rank(number), run.process
    assert launcher is not None
    if not kill(process, signal.SIGSTOP):
        return ""

    def follow() -> None:  # a forked stand-in of a process cannot notice that the launcher has killed it while it is stopped
        launcher.wait()
        kill(process)

    threading.Thread(target=follow, daemon=True).start()
    return f"rank {number} stopped"


def _memory(case: Case, run: Run) -> str:
    number = case.rng.randrange(RANKS)
    process = run.rank(number)
    try:
        if not process:  # to the kernel, zero is the caller
            return ""
        resource.prlimit(process, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
    except ProcessLookupError:
        return ""
    return f"no further memory for rank {number}"


def _prepare_worker(case: Case) -> None:
    case.overrides.append("data.num_workers=1")


def _kill_worker(case: Case, run: Run) -> str:
    number = case.rng.randrange(RANKS)
    workers = children(run.rank(number))
    if not workers or not kill(case.rng.choice(workers)):
        return ""
    return f"data worker of rank {number} killed"


def _no_compiler(site: Site) -> str:
    return "" if site.clock() else "no C compiler"


def _prepare_clock(case: Case) -> None:
    file, library = case.folder / "shift", case.site.clock()
    helper("clock").put(file, 0)
    case.environment |= {"LD_PRELOAD": str(library), "FOVEA_CLOCK": str(file)}


def _clock(case: Case, run: Run) -> str:
    seconds = case.rng.choice((-1, 1)) * round(10 ** case.rng.uniform(0, 6))
    helper("clock").put(case.folder / "shift", seconds)
    return f"wall clock of all processes set by {seconds:+} s"


def _torn(case: Case, run: Run) -> str:
    folder = run.directory / "checkpoints"
    until(lambda: any(folder.glob(".tmp-*")) or not run.running(), "no checkpoint is being written", 120, pause=0.0005)
    seen = [path.name for path in folder.glob(".tmp-*")]
    time.sleep(case.rng.uniform(0, 0.03))
    kill_all(case, run)
    left = [path.name for path in folder.glob(".tmp-*")]
    return f"all killed while {', '.join(seen) or 'a checkpoint'} was written; {'left' if left else 'committed'}"


KINDS = (
    Kind("none", "nothing (control)", _nothing),
    Kind("kill-rank", "SIGKILL of a rank", _kill_rank),
    Kind("kill-restart", "SIGKILL of a rank, with launch.restarts", _kill_rank, _prepare_restart),
    Kind("stop-restart", "SIGSTOP of a rank, with launch.restarts", _stop_rank, _prepare_stop_restart, first=5),
    Kind("kill-all", "SIGKILL of launcher and ranks", kill_all),
    Kind("stop-rank", "SIGSTOP of a rank", _stop_rank, _prepare_stop, first=5),
    Kind("memory", "a rank gets no further memory", _memory, first=2, margin=4),
    Kind("worker", "SIGKILL of a data worker", _kill_worker, _prepare_worker, first=2, margin=4),
    Kind("clock", "wall clock jumps by 1 s to 11 days, either way", _clock, _prepare_clock, first=2, missing=_no_compiler),
    Kind("torn", "SIGKILL of all while a checkpoint is written", _torn, margin=8),
)
