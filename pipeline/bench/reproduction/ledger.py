"""The ledger ``configs/ledger.jsonl``: one line of JSON for each time a config was trained with several seeds and evaluated.

The first line of a config, as it is now, is its record, with which later ones are compared. Lines are only added.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config.load import flatten, identity, roots, schema
from pipeline.config.schema import METHODS, Config
from pipeline.config.types import path_marker
from pipeline.data.settings import DataSettings
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.results import baseline_metric
from pipeline.models.settings import ModelSettings
from pipeline.runtime.locks import lock
from pipeline.untrusted import parse_json, read_bytes

NAME = "ledger.jsonl"
_LARGEST = 64 << 20  # bytes
_OF_THE_PLACE = ("run.", "data.shards", "data.sources")  # where a run is and what it is called, not what it computes


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SeedResult(_Frozen):
    """Result of one seed.

    Attributes:
        seed: ``run.seed``.
        samples: samples that the network was trained on.
        minutes: of training, evaluations included.
        cpu_minutes: CPU minutes of all processes; ``None`` if the run was interrupted.
        commits: states of the code that trained it, one unless it was resumed with another.
        scores: all scores at the end of the run, by full name, baselines included.
        curve: samples seen and the metric, at each evaluation of the run; none in entries from before it was recorded.
    """

    seed: int
    samples: int = Field(ge=0)
    minutes: float = Field(ge=0)
    cpu_minutes: float | None = Field(default=None, ge=0)
    commits: tuple[str, ...] = ()
    scores: dict[str, float]
    curve: tuple[tuple[int, float], ...] = ()


class Entry(_Frozen):
    """A line of the ledger.

    Attributes:
        id: of the reproduction, so that one that is repeated after a crash adds no second line.
        config: name of the config, or its file's.
        config_hash: of its settings, see :func:`config_hash`.
        metric: the score that is compared.
        data_fingerprint: of the training shards' index.
        data_samples: number of training samples.
        date: of the last seed's end, ``YYYY-MM-DD``.
        versions: of the packages that compute.
        machine: processor, cores and system.
        ranks: number of processes.
        seeds: results by seed.
        agreement: of the comparison with the record, see :mod:`pipeline.bench.reproduction.agreement`.
    """

    id: str
    config: str
    config_hash: str
    metric: str
    data_fingerprint: str
    data_samples: int = Field(ge=0)
    date: str
    versions: dict[str, str]
    machine: dict[str, str]
    ranks: int = Field(ge=1)
    seeds: tuple[SeedResult, ...] = Field(min_length=1)
    agreement: str = ""

    def values(self, metric: str | None = None) -> list[float]:
        """The metric of each seed, or another one; seeds without it are left out."""
        return [result.scores[metric or self.metric] for result in self.seeds if (metric or self.metric) in result.scores]

    def baseline(self, name: str) -> float | None:
        """Mean of the metric of a baseline, ``random_init`` or ``pixels``; ``None`` if it was not evaluated."""
        values = self.values(baseline_metric(name, self.metric))
        return statistics.fmean(values) if values else None

    @property
    def minutes(self) -> float:
        """Mean minutes of a seed."""
        return statistics.fmean(result.minutes for result in self.seeds)


def config_hash(config: Config) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the settings that determine results.

    They are those that differ from their defaults, of what a run computes and of its evaluations. A new setting whose default
    keeps the behaviour therefore changes no hash; neither do paths, names, the seed and what may change on resume.
    """
    defaults = Config(
        method=METHODS[config.method.name](name=config.method.name),
        model=ModelSettings(),
        data=DataSettings(shards=("none.tar",)),
    )
    usual, fields = flatten(defaults), schema(config.method.name)
    settings = identity(config) | {k: v for k, v in flatten(config).items() if k.startswith("evaluation.")}
    own = {
        key: value
        for key, value in settings.items()
        if value != usual.get(key) and not key.startswith(_OF_THE_PLACE) and not (key in fields and path_marker(fields[key]))
    }
    return hashlib.sha256(json.dumps(own, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def main_metric(config: Config) -> str:
    """The score by which a config is compared: k-NN with the most neighbours, or else its first evaluation's first.

    Raises:
        ConfigError: the config evaluates nothing.
    """
    if config.evaluation.knn.enabled:
        return f"knn/k{max(config.evaluation.knn.k)}"
    if not config.evaluation.scores:
        raise ConfigError("evaluates nothing that could be compared", where="evaluation", hint="Set evaluation.knn.enabled=true")
    return config.evaluation.scores[0]


def default_file() -> Path:
    """The ledger beside the configs."""
    return roots()[0] / NAME


def read(file: Path) -> list[Entry]:
    """All entries, oldest first; none if there is no such file.

    Raises:
        DataError: a line that is not an entry.
    """
    if not file.exists():
        return []
    entries = []
    for number, line in enumerate(read_bytes(file, limit=_LARGEST).decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entries.append(Entry.model_validate(parse_json(line)))
        except (ValidationError, ValueError) as error:
            first = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise DataError(
                f"is not a result ({first})", where=f"{file}:{number}", hint="Restore the line, or name another --ledger"
            ) from None
    return entries


def append(file: Path, entry: Entry) -> bool:
    """Adds a line, synced; returns false if the ledger has an entry with this id."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", encoding="utf-8") as stream:
        lock(stream.fileno(), file)
        if any(one.id == entry.id for one in read(file)):
            return False
        stream.write(entry.model_dump_json() + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return True


def record(entries: Sequence[Entry], name: str, digest: str) -> Entry | None:
    """The first entry of a config with these settings; ``None`` if there is none."""
    return next((entry for entry in entries if entry.config == name and entry.config_hash == digest), None)


def result_of(outcome: Mapping[str, Any], **about: Any) -> SeedResult:
    """The result of a seed from its run's ``outcome.json``.

    Raises:
        DataError: the file is not that of a finished run with scores.
    """
    try:
        return SeedResult(samples=outcome["samples_seen"], minutes=outcome["seconds"] / 60, scores=outcome["scores"], **about)
    except (KeyError, TypeError, ValidationError) as error:
        raise DataError(
            f"has no result of a finished run ({type(error).__name__})", where="outcome.json", hint="Remove the run and repeat it"
        ) from None
