"""A process that leaves its memory to the kernel ends otherwise like any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

START = "import atexit, sys, threading\nfrom pipeline.runtime.interpreter import end_process, exit_code\n"


def ended(code: str, **streams: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{START}{code}"],
        **({"capture_output": True} | streams),  # type: ignore[call-overload]
        env={name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"},
        text=True,
        check=False,
        timeout=600,
    )


def test_output_is_written_exit_functions_run_and_threads_are_awaited(tmp_path: Path) -> None:
    code = f"""
import multiprocessing, time
atexit.register(print, "last")
def work():
    threading.main_thread().join()  # returns when that thread has begun to end the process
    open({str(tmp_path / "written")!r}, "w").write("by a thread")
threading.Thread(target=work).start()
multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,), daemon=True).start()
sys.stdout.write("no line end, ")
end_process(7)
"""
    done = ended(code)
    assert (done.returncode, done.stdout, done.stderr) == (7, "no line end, last\n", "")
    assert (tmp_path / "written").read_text() == "by a thread"


def test_output_that_cannot_be_written_is_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for code, status in ((0, 120), (3, 3)):
        done = ended(f"print('x'); end_process({code})", stdout=writing, capture_output=False, stderr=subprocess.DEVNULL)
        assert done.returncode == status
    os.close(writing)


@pytest.mark.parametrize(("code", "status"), [("None", 0), ("0", 0), ("75", 75), ("'a sentence'", 1)])
def test_the_status_is_that_of_sys_exit(code: str, status: int) -> None:
    plain = ended(f"sys.exit({code})")
    done = ended(f"try:\n    sys.exit({code})\nexcept SystemExit as stop:\n    end_process(exit_code(stop))")
    assert (done.returncode, done.stdout, done.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert done.returncode == status
