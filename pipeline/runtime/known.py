"""What this user has named in settings of their own: digests in files below ``~/.local/state/fovea``. Standard library only.

A run directory may come from another user. An address or a command that only its stored settings name is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.untrusted import read_bytes

_MOST = 1 << 20  # maximum size of a list, bytes


def add(kind: str, text: str) -> None:
    """Records what this user has named. A directory that is not writable is no error.

    Args:
        kind: name of the list.
        text: what was named; only its digest is stored.
    """
    line = digest(text)
    with contextlib.suppress(OSError, ConfigError):
        path = _list(kind)
        if line in _lines(path):
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as file:
            file.write(f"{line}\n")


def is_known(kind: str, text: str) -> bool:
    """Whether this user has named it before; ``False`` if the list cannot be read."""
    try:
        return digest(text) in _lines(_list(kind))
    except (OSError, ConfigError):
        return False


def digest(text: str) -> str:
    """The digest by which something is recorded, hexadecimal."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _list(kind: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return Path(state).expanduser() / "fovea" / kind
    except RuntimeError as error:  # no home directory
        raise ConfigError("the home directory does not exist", where=state, hint="Set HOME or XDG_STATE_HOME") from error


def _lines(path: Path) -> set[str]:
    try:
        return set(read_bytes(path, limit=_MOST, error=ConfigError).decode("ascii", "replace").split())
    except FileNotFoundError:
        return set()
