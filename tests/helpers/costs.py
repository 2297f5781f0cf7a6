"""What each test costs, and an order of the tests that follows from it.

With ``FOVEA_TEST_COSTS=FILE`` the tests append one line of JSON each: seconds, CPU seconds of this process and of all below it
(ranks of the pools too, Slurm's jobs not), processes that the warm server forked for it, and the MiB it holds afterwards.
``python -m tests.helpers.costs F`` prints the sums by file of such a file and records them in ``costs.json``, by which the
longest files are started first.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

RECORDED = Path(__file__).with_suffix(".json")  # file: seconds of its fast tests, seconds of its slow tests
UNKNOWN = (2.0, 30.0)
WAITING = ("tests/launch/slurm/",)  # tests that mostly wait, for Slurm's own intervals
_MUCH = 200  # MiB


def longest_first(items: list[pytest.Item]) -> None:
    """Sort tests by the recorded seconds of their files, as far as these tests are among those to be run.

    Files whose tests mostly wait alternate with the others, so that they run beside tests that compute.
    """
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    parts = {(_file(item.nodeid), _slow(item)) for item in items}
    seconds: dict[str, float] = defaultdict(float)
    for file, slow in parts:
        seconds[file] += recorded.get(file, UNKNOWN)[slow]
    turns = {file: turn for turn, file in enumerate(_alternating(sorted(seconds, key=lambda file: (-seconds[file], file))))}
    items.sort(key=lambda item: turns[_file(item.nodeid)])


def _alternating(files: list[str]) -> list[str]:
    waiting = [file for file in files if file.startswith(WAITING)]
    computing = [file for file in files if not file.startswith(WAITING)]
    return [part for pair in itertools.zip_longest(waiting, computing) for part in pair if part is not None]


def _file(test: str) -> str:
    return test.partition("::")[0]


def _slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def spent() -> tuple[int, float]:
    """Processes that the warm servers forked for this one, and CPU seconds of this process and of all that it started.

    Those that still run count too, with what they have waited for, as the ranks of the pools do.
    """
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    count, seconds = 0, 0.0
    folder, worker = Path(os.environ.get("FOVEA_WARM_PYTHON", "none")).parent, os.environ.get("PYTEST_XDIST_WORKER", "main")
    for path in (folder / f"cpu-{worker}", folder / "standin" / f"cpu-{worker}"):
        one, its = (path.read_text() if path.exists() else "").split() or (0, 0.0)
        count, seconds = count + int(one), seconds + float(its)
    running = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            running += sum(process.cpu_times()[:4])
    return count, sum(usage.ru_utime + usage.ru_stime for usage in own) + running + seconds


def resident() -> int:
    """MiB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


_seen = [0]


def free_memory() -> None:
    """Collect what is garbage where a test left much behind: a method and its teacher are a cycle that Python finds late."""
    if resident() > _seen[0] + _MUCH:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _seen[0] = resident()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Measure one test with its fixtures."""
    file = os.environ.get("FOVEA_TEST_COSTS")
    wall, (forked, cpu) = time.perf_counter(), spent() if file else (0, 0.0)
    result = yield
    if file:
        processes, seconds = spent()
        row = {
            "test": item.nodeid,
            "slow": _slow(item),
            "seconds": round(time.perf_counter() - wall, 3),
            "cpu": round(seconds - cpu, 3),
            "forked": processes - forked,
            "resident": resident(),
        }
        with Path(file).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
    return result


def main(path: str) -> None:
    """Print and record the costs of a run's files; files that were not run keep their record."""
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for part in (False, True):
        sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0])
        for row in rows:
            if row["slow"] == part:
                one = sums[_file(row["test"])]
                one[:] = [one[0] + 1, one[1] + row["seconds"], one[2] + row["cpu"], one[3] + row.get("forked", 0)]
        print(f"\n{'slow' if part else 'fast'}: {sum(one[0] for one in sums.values())} tests")
        for file, (tests, seconds, cpu, forked) in sorted(sums.items(), key=lambda one: -one[1][1]):
            recorded.setdefault(file, [0.0, 0.0])[part] = round(seconds, 1)
            print(f"{seconds:8.1f} s {cpu:8.1f} CPU s {tests:5d} tests {forked:4d} processes  {file}")
    RECORDED.write_text(json.dumps(dict(sorted(recorded.items())), indent=0) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
