"""The errors a user can meet. Each message says what is wrong, where, and how to fix it."""

from __future__ import annotations

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
