"""Exceptions with user-facing messages: what is wrong, where, and how to fix it.

Style, checked by tests/test_messages.py: the text begins in lower case or with the value and does not end with a period
("must be …", "is not a …", "does not exist"). The hint is an imperative sentence without a period at the end ("Choose one of …").
The printed form is ``where: text. Hint``.
"""

from __future__ import annotations

import errno
import os
from typing import Any, ClassVar

from pipeline.masking import shown


class FoveaError(Exception):
    """An error that the user can fix.

    Args:
        what: what is wrong, with the offending value.
        where: config key, file, shard, member or rank.
        hint: how to fix it.

    The command line prints ``str(error)`` without a traceback and exits with ``exit_code``.

    Attributes:
        retryable: whether the same command may succeed later, so that a cluster's supervisor starts another attempt.
        cause: category in the record of attempts: ``refused``, ``nonfinite``, ``rendezvous``, ``hang``, ``node``, ``disk`` or
            ``crash``.
    """

    exit_code = 2
    retryable: ClassVar[bool] = False
    cause: ClassVar[str] = "refused"

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        # The text often contains untrusted names or addresses: no message may hold a control character or a password.
        self.what, self.where, self.hint = shown(what), shown(where), shown(hint)
        text = f"{self.where}: {self.what}" if where else self.what
        super().__init__(f"{text}. {self.hint}" if hint else text)


class ConfigError(FoveaError):
    """A setting that is unknown, of the wrong type, out of range, or in conflict with another."""


class DataError(FoveaError):
    """Shards, samples or an index that cannot be used."""


class CheckpointError(FoveaError):
    """A checkpoint that is missing, damaged, or of another run."""


class CheckpointWriteError(CheckpointError):
    """Checkpoints that could not be written, mostly since a disk is full; a later attempt may find space."""

    retryable = True
    cause = "disk"


class LaunchError(FoveaError):
    """Ranks that cannot be started or cannot connect to each other."""


class RendezvousError(LaunchError):
    """Ranks that did not connect before the timeout, or whose port was in use; a retry with another port may succeed."""

    retryable = True
    cause = "rendezvous"


class TrainingError(FoveaError):
    """A run that must stop: too many bad samples, too many non-finite steps."""

    exit_code = 1


class NonFiniteError(TrainingError):
    """Too many steps with a non-finite loss or gradient; repeating the same steps would give the same result."""

    cause = "nonfinite"


class CorruptionError(TrainingError):
    """A step that was not the same when it was done again: memory or an accelerator of a machine is at fault.

    Attributes:
        node: the machine, empty if it could be several.
        rank: the rank, ``None`` if it could be several.
    """

    retryable = True
    cause = "node"

    def __init__(self, what: str, *, where: str = "", hint: str = "", node: str = "", rank: int | None = None) -> None:
        super().__init__(what, where=where, hint=hint)
        self.node, self.rank = node, rank


class SystemFault(FoveaError):
    """An operation that the operating system refused: disk full, directory not writable, name too long."""

    exit_code = 1
    retryable = True
    cause = "crash"


class DiskFullError(SystemFault):
    """A full disk, or a used-up quota; a later attempt may find space."""

    cause = "disk"


_FULL = (errno.ENOSPC, errno.EDQUOT)
_ADVICE = {
    errno.ENOSPC: "Free space there, or choose another folder",
    errno.EDQUOT: "Free space there, or choose another folder",
    errno.EROFS: "Choose a folder that can be written",
    errno.EACCES: "Choose another, or change its permissions",
    errno.EPERM: "Choose another, or change its permissions",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOTDIR: "Choose another path: a file is in the place of a folder",
    errno.EISDIR: "Choose another path: a folder is in the place of a file",
    errno.ENOENT: "Check the spelling, and that the disk is mounted",
    errno.ELOOP: "Remove the circle of symbolic links",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.EIO: "Check the disk and its connection",
    errno.ESTALE: "Start again: the network file system was remounted",
}


def of_system(error: OSError) -> FoveaError | None:
    """Converts an operating system error to a message; ``None`` for errors that a library raised itself, without a reason.

    Args:
        error: as Python raised it.
    """
    if error.errno is None or not error.strerror:
        return None
    try:
        os.getcwd()
    except OSError:
        return SystemFault(
            "the working directory does not exist anymore", hint="Change to one that exists, and repeat the command"
        )
    named = [str(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    what = error.strerror if len(error.strerror) < 300 else error.strerror[:300] + "…"
    where = " -> ".join(name if len(name) < 300 else name[:100] + "…" + name[-60:] for name in named)
    kind = DiskFullError if error.errno in _FULL else SystemFault
    return kind(what, where=where, hint=_ADVICE.get(error.errno, "Run `fovea --debug …` for the traceback"))


def failure_fields(error: BaseException) -> dict[str, Any]:
    """Returns the entries of a failure record for an exception: ``kind`` for display, ``retryable`` and ``cause`` for decisions,
    and ``node``, if another machine than this one is at fault.

    Anything but a :class:`FoveaError` and a full disk counts as a crash, which the node may have caused.
    """
    known = error if isinstance(error, FoveaError) else None
    if isinstance(error, OSError) and error.errno in _FULL:
        return {"kind": type(error).__name__, "retryable": True, "cause": DiskFullError.cause}
    fields = {
        "kind": type(error).__name__,
        "retryable": known.retryable if known else True,
        "cause": known.cause if known else "crash",
    }
    # Any rank may report it first: what counts is the machine that is at fault.
    return fields | {"node": error.node} if isinstance(error, CorruptionError) else fields
