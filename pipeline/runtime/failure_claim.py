"""Records which rank of an attempt failed first, in ``failure.json`` in its log directory. Works under every launcher."""

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
    """Claims that this rank failed first; false if another rank already has.

    Args:
        folder: the attempt's log directory.
        own: ``rank``, ``what``, ``code``, ``step`` and the fields of :func:`pipeline.errors.failure_fields`; the host name is
            added, unless they name a node.
    """
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    temporary = folder / f".failure-{own['rank']}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"node": node, **own}))
        os.link(temporary, folder / NAME)  # atomic: only the first link succeeds
    except FileExistsError:
        return False
    except OSError:  # for example a full disk: better reported twice than not at all
        return True
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def claimed(folder: Path) -> dict[str, Any] | None:
    """Returns the record of the rank that failed first, if any."""
    try:
        document = read_json(folder / NAME, limit=1 << 20)
    except (OSError, DataError):
        return None
    types = {"rank": int, "what": str, "code": int, "kind": str, "step": int}
    is_complete = isinstance(document, dict) and all(isinstance(document.get(key), kind) for key, kind in types.items())
    return document if is_complete else None
