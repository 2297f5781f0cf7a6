"""Helper processes go with the one that started them, however it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.runtime.process_pool import process_pool

ROOT = Path(__file__).resolve().parents[2]


def begun(word: str) -> None:
    os.environ["FOVEA_BEGUN"] = word


def answer() -> tuple[int, str]:
    return os.getpid(), os.environ.get("FOVEA_BEGUN", "")


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_is_prepared_before_its_first_work() -> None:
    with process_pool(1, begun, "ready") as pool:
        process, word = pool.submit(answer).result()
    assert process != os.getpid() and word == "ready"


def test_no_process_outlives_a_killed_parent() -> None:
    code = (
        "import os, sys, time\n"
        "from pipeline.runtime.process_pool import process_pool\n"
        "pool = process_pool(2)\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "pool.submit(time.sleep, 600)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert alive(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 900
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(worker)
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left
