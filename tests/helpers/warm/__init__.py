"""An interpreter that starts fast: a server has already imported torch, DeepSpeed and DALI, and forks (``FOVEA_WARM=0``: never).

A run of two ranks imports these packages three times, which takes longer than the toy runs of the tests. Processes that the
server forks are otherwise like new ones: own session, streams, environment, signals and exit status; commands that are not
fovea's, and those whose environment differs in what packages read at their import, are started anew. ``client.c`` is what stands
in for the interpreter; without a C compiler every process is a new one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
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
    if (shutil.which("cc") or shutil.which("gcc")) is None or os.environ.get("FOVEA_WARM") == "0":
        return None
    folder = Path(tempfile.mkdtemp(prefix="fovea-warm-"))
    found = "import importlib.util as u; print(u.find_spec('launch').origin)"
    alone = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    origin = subprocess.run([sys.executable, "-P", "-c", found], env=alone, capture_output=True, text=True, check=False).stdout
    variables = {**alone, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if origin.strip() == str(ROOT / "launch" / "__init__.py"):
        variables["FOVEA_WARM_INSTALLED"] = "1"
    (folder / "owner").write_text(str(os.getpid()))
    if not _compiled(folder, variables):
        shutil.rmtree(folder)
        return None
    os.environ["FOVEA_WARM_PYTHON"] = str(folder / "python")
    return str(folder / "python")


def standin(variables: Mapping[str, str]) -> str:
    """An interpreter whose processes have begun on stand-in devices, see ``tests.helpers.standin.process.begin``.

    Args:
        variables: the environment of all of them; processes with another in what imports read start anew.
    """
    made = os.environ.get("FOVEA_WARM_PYTHON")
    if made is None:
        return sys.executable
    folder = Path(made).with_name("standin")
    with Path(made).with_name("standin.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "python").exists():
            folder.mkdir(exist_ok=True)
            shutil.copy(folder.parent / "owner", folder)
            if not _compiled(folder, variables, "standin"):
                return sys.executable
    return str(folder / "python")


def _compiled(folder: Path, variables: Mapping[str, str], kind: str = "") -> bool:
    """Makes an interpreter, whose server has an environment and begins in a kind of its own."""
    (folder / "environment").write_bytes(b"".join(os.fsencode(f"{name}={text}") + b"\0" for name, text in variables.items()))
    texts = {"PYTHON": REAL, "FOLDER": str(folder), "SERVER": str(SOURCE / "server.py"), "KIND": kind}
    texts["OWNER"] = (folder / "owner").read_text()
    defined = [f'-D{name}="{text}"' for name, text in texts.items()]
    compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
    command = [compiler, "-O1", *defined, "-o", str(folder / "python"), str(SOURCE / "client.c")]
    return subprocess.run(command, check=False).returncode == 0


def remove() -> None:
    """Remove what ``prepare`` made in this process."""
    if made := os.environ.pop("FOVEA_WARM_PYTHON", None):
        shutil.rmtree(Path(made).parent, ignore_errors=True)
