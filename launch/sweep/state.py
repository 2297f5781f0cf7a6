"""The directory of a sweep.

<sweep>/sweep.json       the config, the settings of every member, the rule of early stopping; written once
<sweep>/000, 001, …      the members: a run directory each
<sweep>/decisions.json   after each rung: which scores at which steps were compared, who continues
<sweep>/stop             request to start no further member
<sweep>/tracking/        the MLflow run that is the parent of the members'
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from launch.sweep import halving
from pipeline.errors import ConfigError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import journal
from pipeline.untrusted import printable, read_json

RECORD, DECISIONS, STOP = "sweep.json", "decisions.json", "stop"


class _Written(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Halving(_Written):
    """The rule of early stopping, see :mod:`launch.sweep.halving`.

    Attributes:
        metric: full name of the score, such as ``knn/k20``.
        higher: whether a higher one is better.
        eta: the factor between rungs.
        steps: each member's steps in total.
    """

    metric: str
    higher: bool
    eta: int = Field(ge=2, le=100)
    steps: tuple[int, ...]


class Record(_Written):
    """Content of ``sweep.json``.

    Attributes:
        format: of this file.
        id: of the sweep.
        config: file or name of the config, as given.
        members: settings of each member, texts ``KEY=VALUE``.
        fingerprints: of each member's settings, without its name.
        halving: the rule of early stopping, if any.
    """

    format: Literal[1] = 1
    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    config: str
    members: tuple[tuple[str, ...], ...]
    fingerprints: tuple[str, ...]
    halving: Halving | None = None


class Comparison(_Written):
    """What was compared at a rung.

    Attributes:
        rung: from 0.
        metric: the score's name.
        steps: step of each member's score, by number.
        scores: the score at that step; ``None`` for a member without one.
        continued: members that continue, best first.
    """

    rung: int
    metric: str
    steps: dict[str, int]
    scores: dict[str, float | None]
    continued: tuple[int, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps.keys() != self.scores.keys() or not {str(number) for number in self.continued} <= self.steps.keys():
            raise ValueError("must name the same members throughout")
        return self


@dataclass(frozen=True)
class Sweep:
    """A sweep on disk.

    Attributes:
        path: its directory.
        record: what it consists of.
    """

    path: Path
    record: Record

    def run(self, number: int) -> RunDirectory:
        """A member's run directory."""
        return RunDirectory(self.path / f"{number:03d}")

    def own(self, number: int) -> list[str]:
        """Settings that the sweep gives a member, besides its own."""
        return [f"run.directory={self.run(number).path}", f"run.name={self.path.name}-{number:03d}"]

    def settings(self, number: int) -> str:
        """A member's settings that are not those of all members, in one line."""
        common = set.intersection(*map(set, self.record.members)) if len(self.record.members) > 1 else set()
        return printable(" ".join(text for text in self.record.members[number] if text not in common))

    @property
    def numbers(self) -> range:
        """Numbers of the members."""
        return range(len(self.record.members))

    @property
    def stopped(self) -> bool:
        """Whether a user asked that no further member starts."""
        return (self.path / STOP).exists()

    def comparisons(self) -> list[Comparison]:
        """What was compared so far, by rung.

        Raises:
            ConfigError: the file is damaged.
        """
        file = self.path / DECISIONS
        if not file.exists():
            return []
        try:
            return [Comparison.model_validate_json(_json(row)) for row in read_json(file, error=ConfigError)]
        except (ValidationError, TypeError) as error:
            raise _damaged(file) from error

    def left(self) -> list[int]:
        """Members that no comparison has stopped."""
        done = self.comparisons()
        return sorted(done[-1].continued) if done else list(self.numbers)

    def stopped_at(self, number: int) -> Comparison | None:
        """The comparison after which a member did not continue."""
        return next((one for one in self.comparisons() if str(number) in one.scores and number not in one.continued), None)

    def compare(self, rung: int) -> Comparison:
        """Compare the members that are left, and record who continues.

        Raises:
            ConfigError: no member has a score, or ``decisions.json`` is damaged.
        """
        rule = self.record.halving
        assert rule is not None
        count, left = halving.rungs(len(self.record.members), rule.eta), self.left()
        steps = {number: halving.rung_step(rule.steps[number], rung, count, rule.eta) for number in left}
        scores = {number: score_at(self.run(number), rule.metric, steps[number]) for number in left}
        if all(score is None for score in scores.values()):
            raise ConfigError(
                f"no member has {rule.metric} at its step", where=str(self.path), hint="See the members with `fovea sweep status`"
            )
        continued = halving.survivors(scores, len(self.record.members), rung, rule.eta, higher=rule.higher)
        comparison = Comparison(
            rung=rung,
            metric=rule.metric,
            steps={str(number): step for number, step in steps.items()},
            scores={str(number): score for number, score in scores.items()},
            continued=tuple(continued),
        )
        rows = [one.model_dump(mode="json") for one in (*self.comparisons(), comparison)]
        RunDirectory(self.path).write(DECISIONS, rows)
        return comparison


def create(path: Path, record: Record) -> Sweep:
    """Write a sweep's record, or continue the sweep that is there.

    Raises:
        ConfigError: another sweep, or something else, is there.
    """
    hint = "Choose another --name, or repeat the settings with which it began"
    if (path / RECORD).exists():
        sweep = read(path)
        old = sweep.record
        if old.members != record.members or old.halving != record.halving:
            raise ConfigError(
                f"is a sweep with other members ({len(old.members)}; now {len(record.members)})"
                if old.members != record.members
                else "is a sweep with another rule of early stopping",
                where=str(path),
                hint=hint,
            )
        if old.fingerprints != record.fingerprints:
            number = next(
                n for n, pair in enumerate(zip(old.fingerprints, record.fingerprints, strict=True)) if pair[0] != pair[1]
            )
            raise ConfigError(
                f"the config has changed since the sweep began (member {number:03d})", where=record.config, hint=hint
            )
        return sweep
    if path.exists() and any(child.name != ".lock" for child in path.iterdir()):
        raise ConfigError("exists and is not a sweep", where=str(path), hint="Choose another --name")
    path.mkdir(parents=True, exist_ok=True)
    RunDirectory(path).write(RECORD, record.model_dump(mode="json"))
    return Sweep(path, record)


def find(name: str) -> Sweep:
    """Find a sweep by its directory, or by its name below ``runs``.

    Raises:
        ConfigError: no such sweep.
    """
    for path in (Path(name), Path("runs") / name):
        if (path / RECORD).is_file():
            return read(path.absolute())
    raise ConfigError(f"{name} is not a sweep", hint="Give its directory, or its name below runs/")


def read(path: Path) -> Sweep:
    """Read a sweep's record.

    Raises:
        ConfigError: it is damaged.
    """
    file = path / RECORD
    try:
        record = Record.model_validate_json(_json(read_json(file, error=ConfigError)))
    except ValidationError as error:
        raise _damaged(file) from error
    rule, number = record.halving, len(record.members)
    if not number or len(record.fingerprints) != number or (rule is not None and len(rule.steps) != number):
        raise _damaged(file)
    return Sweep(path, record)


def score_at(run: RunDirectory, metric: str, step: int) -> float | None:
    """A score that was measured at exactly one step, from the run's journals; of several attempts, the last.

    Args:
        run: the run directory.
        metric: full name.
        step: the step.
    """
    value = None
    for path in sorted(run.tracking.glob("journal-*.jsonl")):
        for _, row in journal.read(path, 0):
            if row["kind"] == "metrics" and row["step"] == step and metric in row["values"]:
                value = float(row["values"][metric])
    return value if value is not None and math.isfinite(value) else None


def swept(members: Sequence[Sequence[str]]) -> list[str]:
    """Keys whose values differ between members, in order."""
    keys = list(dict.fromkeys(text.partition("=")[0] for member in members for text in member))
    return [key for key in keys if len({_value(member, key) for member in members}) > 1]


def _value(member: Sequence[str], key: str) -> str:
    return next((text.partition("=")[2] for text in member if text.partition("=")[0] == key), "")


def _json(document: object) -> str:
    return json.dumps(document)


def _damaged(file: Path) -> ConfigError:
    return ConfigError("is damaged, or of another version of fovea", where=str(file), hint="Restore the file")
