"""Which rank failed first: whoever claims ``failure.json`` in the attempt's folder of logs. Works under every launcher."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.untrusted import read_json

NAME = "failure.json"


def claim(folder: Path, own: dict[str, Any]) -> bool:
    """Say that this rank failed first; false if another has said so before.

    Args:
        folder: the attempt's logs.
        own: ``rank``, ``what``, ``code``, ``step`` and the fields of :func:`pipeline.errors.verdict`; the machine is added.
    """
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    temporary = folder / f".failure-{own['rank']}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**own, "node": node}))
        os.link(temporary, folder / NAME)  # whole or not there, and only the first succeeds
    except FileExistsError:
        return False
    except OSError:  # a full disk: better told twice than not at all
        return True
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def claimed(folder: Path) -> dict[str, Any] | None:
    """What the rank that failed first said, if any has."""
    try:
        found = read_json(folder / NAME, limit=1 << 20)
    except (OSError, DataError):
        return None
    types = {"rank": int, "what": str, "code": int, "kind": str, "step": int}
    whole = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in types.items())
    return found if whole else None
