"""Keeps compiled code on each node from one start to the next, so that a requeued run does not compile it again."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

_THREADS = 8  # processes of one rank that compile; each imports torch
_log = logging.getLogger(__name__)


def use_compile_cache(user: str, ranks: int, environment: dict[str, str] | os._Environ[str] = os.environ) -> Path | None:
    """Choose where Inductor and Triton keep compiled code, and how many processes compile. To be called before torch is imported.

    ``TORCHINDUCTOR_CACHE_DIR``, ``TRITON_CACHE_DIR`` and ``TORCHINDUCTOR_COMPILE_THREADS`` are left as they are if they are set.
    By default the code lies in ``$FOVEA_CACHE/fovea-compiled-<user>``, or in the temporary directory; not in a job's scratch
    directory, which ends with the job. The directory must belong to the user: the code in it is executed.

    Args:
        user: name of the user.
        ranks: ranks of this node, which share its cores.
        environment: the variables to set.

    Returns:
        The directory, or ``None`` if torch's own default is used because no other is safe.
    """
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(_THREADS, len(os.sched_getaffinity(0)) // ranks))))
    if named := environment.get("TORCHINDUCTOR_CACHE_DIR"):
        folder = Path(named)
    else:
        folder = Path(environment.get("FOVEA_CACHE") or tempfile.gettempdir()) / f"fovea-compiled-{user}"
        if problem := _unsafe(folder):
            _log.warning("%s: %s; compiled code is not kept there", folder, problem)
            return None
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    environment.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    return folder


def _unsafe(folder: Path) -> str:
    """Why code in the directory must not be executed, or nothing. Creates it if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except OSError as error:
        return error.strerror or "cannot be created"
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
        return "belongs to another user, or is a link"
    return "other users can write to it" if about.st_mode & 0o022 else ""
