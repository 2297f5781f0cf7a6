"""The run directory: all files of a run, and the settings that its attempts share.

<run>/config.json            the resolved settings of the last attempt
<run>/checkpoints/           see checkpoint/writer.py
<run>/tracking/              journals and MLflow cursors; eval-.../ of standalone evaluations (tracking/eval_journal.py)
<run>/evaluations/           scores of standalone evaluations
<run>/pictures/              grids of images, by step
<run>/logs/attempt-0000/     output and heartbeat of each rank, its stack traces after a hang, the first failure,
                             and where its start spent its time (runtime/startup_phases.py)
<run>/skipped_steps.json     steps that are skipped after a rollback (training/rollback.py)
<run>/batches/               the sample keys of every step, if enabled
<run>/signatures/            signatures of every step, by attempt and rank (training/signature_file.py)
<run>/bad_samples/rank-0.jsonl    samples that could not be used
<run>/data/<fingerprint>/    manifest of the training data, to report later changes
<run>/attempts.jsonl         one line at the start and one at the end of each attempt
<run>/outcome.json           how the last attempt ended
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.upgrade import upgrade
from pipeline.errors import ConfigError, DataError
from pipeline.masking import masked
from pipeline.untrusted import parse_json, printable, read_bytes, read_json

if TYPE_CHECKING:
    from pipeline.config.schema import Config

_ATTEMPTS = 64 << 20  # maximum size of attempts.jsonl, bytes
_MAX_TIME = 1 << 40  # seconds since 1970; the platform's calendar functions reject much later times


@dataclass(frozen=True)
class RunDirectory:
    """Paths and small records of one run.

    Attributes:
        path: the run directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """File with the resolved settings."""
        return self.path / "config.json"

    def settings_document(self) -> dict[str, Any]:
        """Returns the content of ``config.json`` under the current keys, not validated.

        Raises:
            ConfigError: the file cannot be read, or holds no settings.
        """
        hint = "Name the directory that `fovea train` wrote"
        try:
            document = read_json(self.config, error=ConfigError)
        except OSError as error:
            raise ConfigError(f"cannot be read ({error.strerror})", where=printable(str(self.config)), hint=hint) from None
        if not isinstance(document, dict):
            raise ConfigError("must contain settings", where=printable(str(self.config)), hint=hint)
        return upgrade(document)

    def settings(self) -> Config:
        """Returns the settings of the last attempt.

        Raises:
            ConfigError: ``config.json`` cannot be read, or its settings are of another version of fovea.
        """
        from pydantic import ValidationError  # a job's supervisor imports this module without third-party packages

        from pipeline.config.schema import Config

        try:
            return Config.model_validate(self.settings_document())
        except (ValidationError, RecursionError) as error:
            first = "nested too deeply"
            if isinstance(error, ValidationError):
                one = error.errors(include_url=False)[0]
                first = f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
            raise ConfigError(
                printable(first, limit=200), where=printable(str(self.config)), hint="Use the version of fovea that wrote it"
            ) from None

    @property
    def sweep(self) -> Path | None:
        """Directory of the sweep that the run is a member of, if any."""
        above = self.path.absolute().parent
        return above if (above / "sweep.json").is_file() else None

    @property
    def sweep_size(self) -> int:
        """Number of members of the sweep whose directory this is; 0 where that is not known."""
        try:
            document = read_json(self.path / "sweep.json")
        except (OSError, DataError):
            return 0
        members = document.get("members") if isinstance(document, dict) else None
        return len(members) if isinstance(members, list) else 0

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tracking(self) -> Path:
        """Directory of journals."""
        return self.path / "tracking"

    def journal(self, attempt: int) -> Path:
        """Journal file of an attempt."""
        return self.tracking / f"journal-{attempt:04d}.jsonl"

    def bad_samples(self, rank: int) -> Path:
        """Log of a rank's bad samples."""
        return self.path / "bad_samples" / f"rank-{rank}.jsonl"

    @property
    def data(self) -> Path:
        """Manifests of the training data of all attempts, each in a directory named after its fingerprint."""
        return self.path / "data"

    def batches(self, attempt: int, rank: int) -> Path:
        """Record of every batch's sample keys, if enabled."""
        return self.path / "batches" / f"attempt-{attempt:04d}-rank-{rank}.jsonl"

    @property
    def signature_folder(self) -> Path:
        """Directory of the signatures of steps."""
        return self.path / "signatures"

    def signatures(self, attempt: int, rank: int) -> Path:
        """Signatures of a rank's steps in an attempt."""
        return self.signature_folder / f"attempt-{attempt:04d}-rank-{rank}.bin"

    def logs(self, attempt: int) -> Path:
        """Directory of the ranks' output."""
        return self.path / "logs" / f"attempt-{attempt:04d}"

    def attempts(self) -> list[dict[str, Any]]:
        """Returns all complete lines of ``attempts.jsonl``; lines with values of a wrong type or size are skipped."""
        try:
            content = read_bytes(self.path / "attempts.jsonl", limit=_ATTEMPTS)
        except (OSError, DataError):
            return []
        attempts = []
        for line in content.decode("utf-8", "replace").split("\n"):
            try:
                row = parse_json(line)
            except ValueError:  # incomplete after a crash of the node
                continue
            if _is_event(row):
                attempts.append(row)
        return attempts

    def next_attempt(self) -> int:
        """Returns the number of the next attempt."""
        return sum(row["event"] == "start" for row in self.attempts())

    def note(self, event: str, **facts: Any) -> None:
        """Appends a line about this attempt and syncs."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "attempts.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, "t": round(time.time(), 3), **facts}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def own_folder(self, *names: str) -> Path:
        """Creates a folder of the run, given by its parts, for results about a run that may be a stranger's.

        Raises:
            ConfigError: it is a link, so that results would be written outside the run, or a file.
        """
        folder = self.path
        for name in names:
            folder = folder / name
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise ConfigError(
                    "must be a folder of the run itself, not a link or a file",
                    where=printable(str(folder)),
                    hint="Remove it",
                )
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write(self, name: str, value: Any) -> None:
        """Replaces a JSON file of the run atomically."""
        self._replace(self.path / name, json.dumps(value, indent=1))

    def write_settings(self, config: Config, text: str | None = None) -> None:
        """Writes the settings to ``config.json``, and to ``config.yaml`` if its text is given.

        Both include the signatures of signed links, since a later attempt needs them; the files are then readable by the user
        only.

        Args:
            config: the settings.
            text: the same settings as YAML.
        """
        document = config.model_dump(mode="json")
        private = masked(document) != document
        self._replace(self.config, json.dumps(document, indent=1), private=private)
        if text is not None:
            self._replace(self.path / "config.yaml", text, private=private)

    def _replace(self, target: Path, text: str, *, private: bool = False) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666), "w") as file:
            file.write(text)
        temporary.replace(target)


def _is_event(row: Any) -> bool:
    """Whether a line of ``attempts.jsonl`` has the types that :meth:`RunDirectory.note` writes."""
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        return False
    numbers = [row[name] for name in ("attempt", "resumed_from") if row.get(name) is not None]
    in_range = all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
    return in_range and type(row.get("t", 0)) in (int, float) and 0 <= row.get("t", 0) < _MAX_TIME
