"""The run directory: everything a run writes, and the identity that its attempts share.

<run>/config.json            the resolved settings of the last attempt
<run>/checkpoints/           see checkpoint.py
<run>/tracking/              journals, and how far MLflow has them; eval-.../ of evaluations by hand (tracking/aside.py)
<run>/evaluations/           scores of checkpoints that were judged by hand
<run>/pictures/              sheets of pictures, by step
<run>/logs/attempt-0000/     output of each rank, its pulse, its stacks if it stalled, the first failure
<run>/skipped_steps.json          steps that are not trained on since the run went back (rewind.py)
<run>/batches/               every step's keys, if asked for
<run>/bad_samples/rank-0.jsonl    samples that could not be used
<run>/data/<fingerprint>/    manifest of the data trained on, for telling what has changed
<run>/attempts.jsonl         one line when an attempt starts, one when it ends
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
from pipeline.untrusted import printable, read_bytes, read_json

if TYPE_CHECKING:
    from pipeline.config.schema import Config

_ATTEMPTS = 64 << 20  # bytes, most of attempts.jsonl


@dataclass(frozen=True)
class RunDirectory:
    """Paths and small records of one run.

    Attributes:
        path: the directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Resolved settings of the run."""
        return self.path / "config.json"

    def settings_document(self) -> dict[str, Any]:
        """What ``config.json`` holds, under today's names, unchecked.

        Raises:
            ConfigError: it cannot be read, or holds no settings.
        """
        hint = "name the directory that a training wrote"
        try:
            document = read_json(self.config, error=ConfigError)
        except OSError as error:
            raise ConfigError(f"cannot be read ({error.strerror})", where=printable(str(self.config)), hint=hint) from None
        if not isinstance(document, dict):
            raise ConfigError("must hold settings", where=printable(str(self.config)), hint=hint)
        return upgrade(document)

    def settings(self) -> Config:
        """The settings of the last attempt.

        Raises:
            ConfigError: ``config.json`` cannot be read, or its settings are of another version of fovea.
        """
        from pydantic import ValidationError  # a job's supervisor imports this module without packages

        from pipeline.config.schema import Config

        try:
            return Config.model_validate(self.settings_document())
        except (ValidationError, RecursionError) as error:
            first = "nested too deeply"
            if isinstance(error, ValidationError):
                one = error.errors(include_url=False)[0]
                first = f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
            raise ConfigError(
                printable(first, limit=200), where=printable(str(self.config)), hint="use the version of fovea that wrote it"
            ) from None

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tracking(self) -> Path:
        """Directory of journals."""
        return self.path / "tracking"

    def journal(self, attempt: int) -> Path:
        """Journal of an attempt."""
        return self.tracking / f"journal-{attempt:04d}.jsonl"

    def bad_samples(self, rank: int) -> Path:
        """Ledger of bad samples of a rank."""
        return self.path / "bad_samples" / f"rank-{rank}.jsonl"

    @property
    def data(self) -> Path:
        """Manifests of the data that attempts were trained on, each in a folder of its fingerprint."""
        return self.path / "data"

    def batches(self, attempt: int, rank: int) -> Path:
        """Record of every batch's keys, if asked for."""
        return self.path / "batches" / f"attempt-{attempt:04d}-rank-{rank}.jsonl"

    def logs(self, attempt: int) -> Path:
        """Directory of the ranks' output."""
        return self.path / "logs" / f"attempt-{attempt:04d}"

    def attempts(self) -> list[dict[str, Any]]:
        """All lines of ``attempts.jsonl`` that are whole."""
        try:
            content = read_bytes(self.path / "attempts.jsonl", limit=_ATTEMPTS)
        except (OSError, DataError):
            return []
        found = []
        for line in content.decode("utf-8", "replace").split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # torn by a crash of the machine
                continue
            if isinstance(row, dict) and isinstance(row.get("event"), str):
                found.append(row)
        return found

    def next_attempt(self) -> int:
        """Number of the attempt that starts now."""
        return sum(row["event"] == "start" for row in self.attempts())

    def note(self, event: str, **facts: Any) -> None:
        """Append a line about this attempt, synced."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "attempts.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, "t": round(time.time(), 3), **facts}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file of the run in one act."""
        self._replace(self.path / name, json.dumps(value, indent=1))

    def write_settings(self, config: Config, text: str | None = None) -> None:
        """Keep the settings as ``config.json``, and as ``config.yaml`` if its text is given.

        Both must keep signed links, with which a later attempt reads; then nobody but the user can read the files.

        Args:
            config: the settings.
            text: the same as YAML.
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
