"""The errors a user can meet. Each message says what is wrong, where, and how to fix it."""

from __future__ import annotations

import errno
import os
from typing import Any, ClassVar

from pipeline.masking import shown


class FoveaError(Exception):
    """A mistake or a state of the world that the user can fix.

    Args:
        what: what is wrong, with the offending value.
        where: config key, file, shard, member or rank.
        hint: what to do about it.

    The command line prints ``str(error)`` without a traceback and exits with ``exit_code``.

    Attributes:
        retryable: whether the same command may succeed later, so that a cluster's supervisor starts another attempt.
        cause: one word for the account of attempts: ``refused``, ``nonfinite``, ``rendezvous``, ``hang``, ``node`` or ``crash``.
    """

    exit_code = 2
    retryable: ClassVar[bool] = False
    cause: ClassVar[str] = "refused"

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        # What is wrong is often a foreign name or an address: no message holds a control character or a password.
        self.what, self.where, self.hint = shown(what), shown(where), shown(hint)
        text = f"{self.where}: {self.what}" if where else self.what
        super().__init__(f"{text}. {self.hint}" if hint else text)


class ConfigError(FoveaError):
    """A setting that is unknown, of the wrong type, out of range or at odds with another."""


class DataError(FoveaError):
    """Shards, samples or an index that cannot be used."""


class CheckpointError(FoveaError):
    """A checkpoint that is missing, damaged, or of another run."""


class LaunchError(FoveaError):
    """Ranks that cannot be started or cannot find each other."""


class RendezvousError(LaunchError):
    """Ranks that did not meet in time, or whose port was taken: another port or another moment may do."""

    retryable = True
    cause = "rendezvous"


class TrainingError(FoveaError):
    """A run that must stop: too many bad samples, too many non-finite steps."""

    exit_code = 1


class NonFiniteError(TrainingError):
    """Too many steps whose loss or gradient is no finite number: the same steps would give the same."""

    cause = "nonfinite"


class SystemFault(FoveaError):
    """Something that the operating system refused: a full disk, a folder that cannot be written, a name that is too long."""

    exit_code = 1
    retryable = True
    cause = "crash"


_ADVICE = {
    errno.ENOSPC: "Make room there, or choose another folder",
    errno.EDQUOT: "Make room there, or choose another folder",
    errno.EROFS: "Choose a folder that can be written",
    errno.EACCES: "Choose another, or have it opened to you",
    errno.EPERM: "Choose another, or have it opened to you",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOTDIR: "A file lies where a folder is wanted",
    errno.EISDIR: "A folder lies where a file is wanted",
    errno.ENOENT: "Is it spelled right, and mounted?",
    errno.ELOOP: "Its symbolic links lead in a circle",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.EIO: "The disk or its connection fails",
    errno.ESTALE: "The network drive was mounted anew; start again",
}


def of_system(error: OSError) -> FoveaError | None:
    """What the operating system refused, in a sentence; ``None`` for errors that are a library's own and name no reason.

    Args:
        error: as Python raised it.
    """
    if error.errno is None or not error.strerror:
        return None
    try:
        os.getcwd()
    except OSError:
        return SystemFault("the working directory does not exist any more", hint="cd to one that does, and type it again")
    named = [str(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    what = error.strerror if len(error.strerror) < 300 else error.strerror[:300] + "…"
    where = " -> ".join(name if len(name) < 300 else name[:100] + "…" + name[-60:] for name in named)
    return SystemFault(what, where=where, hint=_ADVICE.get(error.errno, "`fovea --debug …` shows where in the program"))


def verdict(error: BaseException) -> dict[str, Any]:
    """What a failure record says of an exception: ``kind`` for people, ``retryable`` and ``cause`` for whoever decides.

    Anything but a :class:`FoveaError` is a crash, which may be the machine's.
    """
    known = error if isinstance(error, FoveaError) else None
    return {
        "kind": type(error).__name__,
        "retryable": known.retryable if known else True,
        "cause": known.cause if known else "crash",
    }
