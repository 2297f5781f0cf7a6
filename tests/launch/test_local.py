"""Ranks on this machine: their places, their signals, their ends. The ranks are tiny programs without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from launch.local import free_port, start
from launch.rank_environment import RankEnvironment
from pipeline.errors import LaunchError

ROOT = Path(__file__).resolve().parents[2]

# A rank that notes each signal it gets and ends well on SIGTERM.
LISTENER = """
import os, pathlib, signal, sys, time
here, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def note(number, frame):
    with (here / f"signals-{rank}").open("a") as file: file.write(signal.Signals(number).name + "\\n")
    if number == signal.SIGTERM: sys.exit(0)
for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"): signal.signal(getattr(signal, name), note)
(here / f"pid-{rank}").write_text(str(os.getpid()))
while True: time.sleep(0.02)
"""

LAUNCHER = """
import pathlib, sys
from launch.local import start
here = pathlib.Path(sys.argv[1])
sys.exit(start([sys.executable, "-c", sys.argv[2], str(here)], 2, log_directory=here, grace=1.0))
"""


def rank(code: str, *words: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *words]


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def launcher(folder: Path, code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder), code], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    wait_for(lambda: all((folder / f"pid-{n}").exists() and (folder / f"pid-{n}").read_text() for n in range(2)))
    return process


def pids(folder: Path) -> list[int]:
    return [int((folder / f"pid-{n}").read_text()) for n in range(2)]


def test_each_rank_is_told_its_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os; print(*(os.environ[k] for k in "
        "('RANK','WORLD_SIZE','LOCAL_RANK','LOCAL_WORLD_SIZE','MASTER_ADDR','MASTER_PORT','OMP_NUM_THREADS','FOVEA_KEY','MINE')))"
    )
    environment = {**os.environ, "MINE": "x"}
    assert start(rank(code), 3, log_directory=tmp_path / "logs", environment=environment, threads=2) == 0
    places = [capfd.readouterr().out.split(), *((tmp_path / "logs" / f"rank-{n}.log").read_text().split() for n in (1, 2))]
    assert [place[:5] for place in places] == [[str(n), "3", str(n), "3", "127.0.0.1"] for n in range(3)]
    assert len({tuple(place[5:]) for place in places}) == 1
    assert 61001 <= int(places[0][5]) <= 65535 and places[0][6] == "2" and places[0][8] == "x"
    assert not (tmp_path / "logs" / "rank-0.log").exists()


def test_the_first_failure_decides_and_its_last_lines_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1': print('boom: the reason', flush=True); sys.exit(2)\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(7)); time.sleep(300)"  # fails later, whatever the machine's load
    )
    assert start(rank(code), 2, log_directory=tmp_path, grace=0.5) == 2
    told = capfd.readouterr().err
    assert "rank 1 of 2 ended with code 2" in told and "  | boom: the reason" in told and "rank-1.log" in told


def test_the_others_end_by_themselves_within_the_grace(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit(3)\n"
        "time.sleep(0.4); pathlib.Path(sys.argv[1], 'ended').touch()"
    )
    assert start(rank(code, str(tmp_path)), 2, log_directory=tmp_path, grace=600.0) == 3
    assert (tmp_path / "ended").exists()


def test_who_stays_after_the_grace_gets_sigterm_then_sigkill(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys, time\n"
        "rank = os.environ['RANK']\n"
        "def note(number, frame): pathlib.Path(sys.argv[1], f'term-{rank}').touch(); rank == '2' and os._exit(0)\n"
        "signal.signal(signal.SIGTERM, note); pathlib.Path(sys.argv[1], f'ready-{rank}').touch()\n"
        "while rank == '1' and not all(pathlib.Path(sys.argv[1], f'ready-{n}').exists() for n in (0, 2)): time.sleep(0.02)\n"
        "if rank == '1': sys.exit(4)\n"
        "while True: time.sleep(0.05)"
    )
    assert start(rank(code, str(tmp_path)), 3, log_directory=tmp_path, grace=0.3) == 4
    assert (tmp_path / "term-0").exists() and (tmp_path / "term-2").exists()


def test_a_rank_ended_by_a_signal_counts_as_128_and_its_number(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.1)"
    assert start(rank(code), 2, log_directory=tmp_path, grace=2.0) == 137
    assert "rank 1 of 2 was ended by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGINT", "SIGTERM"])
def test_signals_reach_every_rank_once_and_the_launcher_waits(tmp_path: Path, name: str) -> None:
    process = launcher(tmp_path, LISTENER)
    os.kill(process.pid, getattr(signal, name))
    notes = [tmp_path / f"signals-{n}" for n in range(2)]
    wait_for(lambda: all(note.exists() and note.read_text() == f"{name}\n" for note in notes))  # a second one must not cut in
    if name != "SIGTERM":
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 0
    expected = f"{name}\n" if name == "SIGTERM" else f"{name}\nSIGTERM\n"
    assert [note.read_text() for note in notes] == [expected] * 2
    process.stderr.close()  # type: ignore[union-attr]


def test_the_third_interrupt_kills_ranks_that_do_not_listen(tmp_path: Path) -> None:
    process = launcher(tmp_path, LISTENER)

    def heard(times: int) -> bool:
        notes = [tmp_path / f"signals-{n}" for n in range(2)]
        return all(note.exists() and len(note.read_text().split()) == times for note in notes)

    for times in (1, 2):
        os.kill(process.pid, signal.SIGINT)
        wait_for(partial(heard, times))
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(20) == 137
    process.stderr.close()  # type: ignore[union-attr]


def test_no_rank_outlives_a_launcher_killed_by_sigkill(tmp_path: Path) -> None:
    process = launcher(tmp_path, LISTENER)
    ranks = pids(tmp_path)
    assert all(alive(pid) for pid in ranks)
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in ranks))
    process.stderr.close()  # type: ignore[union-attr]


def test_an_exception_in_the_launcher_leaves_no_rank_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        wait_for(lambda: all((tmp_path / f"pid-{n}").exists() and (tmp_path / f"pid-{n}").read_text() for n in range(2)))
        raise RuntimeError("in the middle")

    monkeypatch.setattr("launch.local._wait", fail)
    with pytest.raises(RuntimeError):
        start(rank(LISTENER, str(tmp_path)), 2, log_directory=tmp_path)
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)]
    start(rank("pass"), 1, log_directory=tmp_path)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)]


def test_what_cannot_be_started_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be run"):
        start(["/no/such/program"], 1, log_directory=tmp_path)
    with pytest.raises(LaunchError, match="0 ranks"):
        start(rank("pass"), 0, log_directory=tmp_path)


def test_free_ports_lie_above_the_ephemeral_range_and_vary() -> None:
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10 and all(61001 <= port <= 65535 for port in ports)


SLURM_STEP = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


def test_a_slurm_step_tells_its_tasks_their_place() -> None:
    place = RankEnvironment.read(SLURM_STEP)
    assert place == RankEnvironment(5, 7, 1, 3, "10.0.0.1", place.port, "slurm", "77.0.2")
    assert RankEnvironment.read(SLURM_STEP | {"SLURM_RESTART_COUNT": "3", "MASTER_PORT": "61234"}).key == "77.3.2"
    assert RankEnvironment.read(SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}).local_world_size == 2


def test_a_batch_script_is_no_rank_though_it_has_a_procid() -> None:
    batch = {key: value for key, value in SLURM_STEP.items() if not key.startswith("SLURM_STEP")} | {"SLURM_PROCID": "0"}
    assert RankEnvironment.read(batch) == RankEnvironment()
    assert RankEnvironment.read({}) == RankEnvironment()
    assert RankEnvironment.read(batch | {"SLURM_STEP_ID": "batch"}).source == "single"


def test_torchruns_variables_win_over_slurms() -> None:
    torchrun = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "61001",
    }
    place = RankEnvironment.read(SLURM_STEP | torchrun)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size, place.address, place.port) == (
        3,
        4,
        1,
        2,
        "h",
        61001,
    )
    assert RankEnvironment.read(place.variables()) == place.__class__(**{**place.__dict__, "key": place.key})


def test_each_restart_of_torchrun_has_a_key_of_its_own() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "job"}
    keys = [RankEnvironment.read({**torchrun, "TORCHELASTIC_RESTART_COUNT": count}).key for count in ("0", "1")]
    assert keys == ["job.0", "job.1"]


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "1"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
        {key: value for key, value in SLURM_STEP.items() if key != "SLURM_LAUNCH_NODE_IPADDR"},
    ],
)
def test_places_that_cannot_be_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"RANK|MASTER_ADDR|rank"):
        RankEnvironment.read(environment)
