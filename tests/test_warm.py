"""A run in processes that were forked from a warm server is the run in new processes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import warm
from tests.helpers.costs import spent
from tests.helpers.limits import LONG, deadline
from tests.helpers.runs import ROOT, command, environment, recorded, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.executable == warm.REAL, reason="needs a C compiler, and FOVEA_WARM not 0"),
]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, check=False, timeout=600, stdin=subprocess.DEVNULL
    )


def test_a_run_has_the_same_bits_as_in_new_processes(shards: str, config: Path, tmp_path: Path) -> None:
    before = spent()[0]
    for name in ("new", "warm"):
        arguments = command(config, shards, tmp_path / name)
        done = run([warm.REAL, *arguments[1:]] if name == "new" else arguments)
        assert done.returncode == 0, done.stderr
    assert recorded(tmp_path / "new", 1) == recorded(tmp_path / "warm", 1) != {}
    assert weights(tmp_path / "new", 24) == weights(tmp_path / "warm", 24) != {}
    end = deadline(300)
    while spent()[0] < before + 2 and time.monotonic() < end:  # the launcher kills the process that forks its ranks, and goes
        time.sleep(0.02)
    assert spent()[0] == before + 2, "the launcher, or the process that forks its ranks, was started anew"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_signals_and_exit_codes_are_those_of_a_process(shards: str, config: Path, tmp_path: Path, number: int, code: int) -> None:
    arguments = command(config, shards, tmp_path / "run", "train.duration=4000 steps")
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"step      3" in line:
                break
        process.send_signal(number)
        assert process.wait(LONG) == code
        process.stdout.read()  # ends when all ranks have ended
    assert run([sys.executable, "-m", "launch.cli.main", "config", "check", "no/such"]).returncode == 2


def test_a_process_with_another_path_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "launch" / "cli").mkdir(parents=True)
    for folder in ("launch", "launch/cli"):
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "launch" / "cli" / "main.py").write_text("print('another')")
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli.main", "--version"],
        env={**environment(), "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"another\n"


OTHERS = {"PYTHONDONTWRITEBYTECODE": "1", "XDG_STATE_HOME": "/nowhere", "XDG_CACHE_HOME": "/nowhere"}


@pytest.mark.parametrize("variables", [{}, OTHERS], ids=["", "others"])
def test_processes_with_the_environment_of_tests_are_forked(variables: dict[str, str]) -> None:
    before = spent()[0]
    code = "import json, os, sys; print(json.dumps([sys.dont_write_bytecode, dict(os.environ)]))"
    told = []
    for python in (sys.executable, warm.REAL):
        done = subprocess.run([python, "-c", code, "launch.cli"], env=environment() | variables, capture_output=True, check=True)
        told.append(json.loads(done.stdout))
    assert spent()[0] == before + 1
    assert told[0][0] == told[1][0] and {name: told[0][1][name] for name in told[1][1]} == told[1][1]


def test_inherited_files_are_passed_on_under_their_numbers_and_no_others(tmp_path: Path) -> None:
    code = "import os, sys; [os.write(int(n), n.encode()) for n in sys.argv[2:]]"
    before = spent()[0]
    read, write = os.pipe()
    with (tmp_path / "a").open("w") as file:
        numbers = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, low) for low in (40, 90)] + [write]
        try:
            words = [sys.executable, "-c", code, "launch.cli", *map(str, numbers)]
            subprocess.run(words, env=environment(), pass_fds=numbers, check=True)
        finally:
            for number in numbers:
                os.close(number)
    assert (tmp_path / "a").read_text() == "{}{}".format(*numbers) and spent()[0] == before + 1
    with open(read) as end:
        assert end.read() == str(write), "the process, or the server, still holds a file that it should not have"


def test_limits_the_mask_of_new_files_niceness_and_cores_are_those_of_the_process_that_starts_it(tmp_path: Path) -> None:
    code = (
        "import json, os, resource, sys; from tests.helpers import exported; "
        "state = [resource.getrlimit(resource.RLIMIT_FSIZE), os.umask(0), os.nice(0), sorted(os.sched_getaffinity(0))]; "
        "json.dump(state, open(1, 'w'))"
    )
    begin = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 31)); os.umask(0o27); "
    begin += "os.nice(3); "
    begin += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.execv(sys.argv[1], [sys.argv[1], '-c', *sys.argv[2:]])"
    found = []
    for python in (warm.REAL, sys.executable):
        before = spent()[0]
        done = run([warm.REAL, "-c", begin, python, code, "launch.cli"])
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
        assert spent()[0] - before == (python != warm.REAL)
    assert found[0] == found[1]
    assert found[0].startswith(f"[[{1 << 30}, {1 << 31}], 23, ")


def test_modules_that_fovea_starts_as_processes_are_forked_or_import_little() -> None:
    named = re.compile(r"module_command\(\s*\"([\w.]+)\"")
    sources = [path.read_text() for room in ("launch", "pipeline") for path in (ROOT / room).rglob("*.py")]
    started = {name for text in sources for name in named.findall(text)} - {"pipeline.bench.prove.runner"}  # see client.c
    assert "launch.rank_main" in started
    (ours,) = re.findall(r"OURS\[\] = \{(.*?)\}", (ROOT / "tests/helpers/warm/client.c").read_text(), re.DOTALL)
    assert [name for name in started if not name.startswith(tuple(re.findall(r'"(.*?)"', ours)))] == []
