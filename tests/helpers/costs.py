"""What each test costs, as a pytest plugin: ``FOVEA_TEST_COSTS=FILE`` appends one line of JSON a test: seconds, CPU seconds of
this process and of the processes it waited for, and the MiB it holds afterwards."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def _cpu() -> float:
    """CPU seconds of this process and of the processes it started, also by way of the warm server."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    forked = Path(os.environ.get("FOVEA_WARM_PYTHON", "none")).with_name(f"cpu-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
    return sum(usage.ru_utime + usage.ru_stime for usage in own) + (float(forked.read_text() or 0) if forked.exists() else 0.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Measure one test with its fixtures."""
    wall, cpu = time.perf_counter(), _cpu()
    result = yield
    file = os.environ.get("FOVEA_TEST_COSTS")
    if file:
        row = {
            "test": item.nodeid,
            "slow": item.get_closest_marker("slow") is not None,
            "seconds": round(time.perf_counter() - wall, 3),
            "cpu": round(_cpu() - cpu, 3),
            "resident": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20,
        }
        with Path(file).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
    return result
