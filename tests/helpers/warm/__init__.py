"""An interpreter that starts fast: a server has already imported torch, DeepSpeed and DALI, and forks (``FOVEA_WARM=1``).

A run of two ranks imports these packages three times, which takes longer than the toy runs of the tests. Processes that the
server forks are otherwise like new ones: own session, streams, environment, signals and exit status; those whose environment
differs in what packages read at their import are started anew. Needs a C compiler.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]


def variables() -> dict[str, str]:
    """Environment variables of the fast interpreter, which starts its server at first use; empty where it is off."""
    return dict(_started()) if os.environ.get("FOVEA_WARM") == "1" else {}


def interpreter() -> str:
    """The fast interpreter where it is on, else this process's."""
    return variables().get("FOVEA_WARM_CLIENT", sys.executable)


@cache
def _started() -> dict[str, str]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("FOVEA_WARM=1 needs a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="fovea-warm-"))
    subprocess.run([compiler, "-O1", "-o", str(folder / "python"), str(FOLDER / "client.c")], check=True)
    own = {
        "FOVEA_WARM_SOCKET": str(folder / "socket"),
        "FOVEA_WARM_PYTHON": sys.executable,
        "FOVEA_WARM_CLIENT": str(folder / "python"),
    }
    server = subprocess.Popen(
        [sys.executable, "-P", str(FOLDER / "server.py"), own["FOVEA_WARM_SOCKET"]],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None and server.stdin is not None
    assert server.stdout.readline() == b"ready\n", "the server of warm processes did not start"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return own
