"""An interpreter that starts fast: a server has already imported torch, DeepSpeed and DALI, and forks (``FOVEA_WARM=0``: never).

A run of two ranks imports these packages three times, which takes longer than the toy runs of the tests. Processes that the
server forks are otherwise like new ones: own session, streams, environment, signals and exit status; commands that are not
fovea's, and those whose environment differs in what packages read at their import, are started anew. ``client.c`` is what stands
in for the interpreter; without a C compiler every process is a new one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.warm.server import READ_AT_IMPORT

SOURCE = Path(__file__).resolve().parent
ROOT = SOURCE.parents[2]
REAL = sys.executable  # before it is replaced


def _read_at_import() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if name.startswith(READ_AT_IMPORT)}


_before: dict[str, str] = {}


def restore_variables() -> None:
    """Undo what imports in this process did to its environment, so that the processes it starts can be forked."""
    for name in _read_at_import().keys() - _before.keys():
        del os.environ[name]
    os.environ.update(_before)


def prepare() -> str | None:
    """Make the fast interpreter for this process and those it starts, once; where it lies, or none without a compiler."""
    _before.update(_read_at_import())
    if made := os.environ.get("FOVEA_WARM_PYTHON"):
        return made
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or os.environ.get("FOVEA_WARM") == "0":
        return None
    folder = Path(tempfile.mkdtemp(prefix="fovea-warm-"))
    texts = {"PYTHON": sys.executable, "FOLDER": str(folder), "SERVER": str(SOURCE / "server.py"), "OWNER": str(os.getpid())}
    defined = [f'-D{name}="{text}"' for name, text in texts.items()]
    done = subprocess.run([compiler, "-O1", *defined, "-o", str(folder / "python"), str(SOURCE / "client.c")], check=False)
    if done.returncode:
        shutil.rmtree(folder)
        return None
    found = "import importlib.util as u; print(u.find_spec('launch').origin)"
    alone = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    origin = subprocess.run([sys.executable, "-P", "-c", found], env=alone, capture_output=True, text=True, check=False).stdout
    variables = {**alone, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if origin.strip() == str(ROOT / "launch" / "__init__.py"):
        variables["FOVEA_WARM_INSTALLED"] = "1"
    (folder / "environment").write_bytes(b"".join(os.fsencode(f"{name}={text}") + b"\0" for name, text in variables.items()))
    os.environ["FOVEA_WARM_PYTHON"] = str(folder / "python")
    return str(folder / "python")


def remove() -> None:
    """Remove what ``prepare`` made in this process."""
    if made := os.environ.pop("FOVEA_WARM_PYTHON", None):
        shutil.rmtree(Path(made).parent, ignore_errors=True)
