"""Submits ``fovea embed`` to Slurm: the job is watched and requeued like a run, with its records in the folder ``job``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.slurm import excluded_nodes, render
from launch.slurm import profile as profiles
from launch.slurm.profile import ClusterProfile
from launch.slurm.submit import hand_in, possible, refuse_living
from pipeline.config.schema import Config
from pipeline.data.embeddings.work import clear
from pipeline.errors import ConfigError, LaunchError
from pipeline.masking import shown
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import read_json

if TYPE_CHECKING:
    from pipeline.evaluation.embedding import EmbedRequest

JOB = "job"  # folder of the job's records, in the folder of embeddings
_REQUEST = "request.json"


@dataclass(frozen=True)
class EmbedJob:
    """A submitted job.

    Attributes:
        job: its number.
        folder: its records: ``fovea status``, ``fovea logs``, ``fovea stop`` and ``fovea cancel`` take it.
    """

    job: int
    folder: Path


def submit(
    request: EmbedRequest, config: Config, cluster: str, overrides: Sequence[str] = (), *, overwrite: bool = False
) -> EmbedJob:
    """Submit a job that embeds; a job that was stopped or gave up continues.

    Args:
        request: what to embed, with absolute paths; of a run, with its checkpoint.
        config: the settings, with ``data.shards``.
        cluster: name or file of the cluster profile.
        overrides: ``KEY=VALUE`` settings of the profile.
        overwrite: remove embeddings that are in the folder, once no job of it is pending or running.

    Raises:
        ConfigError, LaunchError: any problem that can be detected before the job runs.
    """
    profile = profiles.load(cluster, list(overrides))
    run = RunDirectory(request.directory / JOB)
    _check(request.directory, profile)
    refuse_living(run)
    available = possible(profile)
    config = config.replace(run=config.run.model_copy(update={"name": _job_name(request.directory)}))
    facts = {
        **render.facts(config, profile, run.path),
        "kind": "embed",
        "srun": render.step(profile, request.directory, ["launch.cli.embed_ranks", str(run.path)], "rank-%t.log"),
    }
    typed = shown(" ".join(["fovea", *sys.argv[1:]]))
    text = render.script(config, profile, run.path, command=typed, code_state=render.code_state())
    away, forgiven = excluded_nodes.avoid(run, facts)
    if forgiven:
        print(f"fovea: not excluded, since too few nodes would be left: {', '.join(forgiven)}", file=sys.stderr)
    options = [f"--exclude={','.join(away)}"] if away else []
    if overwrite:
        clear(request.directory)

    def write_settings(target: RunDirectory) -> None:
        target.write_settings(config)
        target.write(
            _REQUEST, {name: str(value) if isinstance(value, Path) else value for name, value in asdict(request).items()}
        )

    try:
        return EmbedJob(hand_in(run, facts, text, typed, options, write_settings), run.path)
    except OSError as error:
        reason = error.strerror or "some files could not be copied; is the disk full?"
        raise LaunchError(
            f"the job's records cannot be written ({reason})", where=str(run.path), hint="Free space, or choose another --out"
        ) from error
    except LaunchError as error:
        hint = f"Change the cluster profile; available is {available}" if available is not None else error.hint
        raise LaunchError(error.what, where=error.where, hint=error.hint if "status" in error.hint else hint) from error


def read_request(folder: Path) -> tuple[EmbedRequest, Config]:
    """What a submitted job embeds, and its settings.

    Args:
        folder: the job's records.

    Raises:
        ConfigError: they are missing or damaged.
    """
    from pipeline.evaluation.embedding import EmbedRequest

    path = folder / _REQUEST
    try:
        values: Any = read_json(path, error=ConfigError)
        paths = {name: Path(values[name]) for name in ("directory", "run", "checkpoint") if values[name] is not None}
        size = tuple(values["size"]) if isinstance(values["size"], list) else values["size"]
        request = replace(EmbedRequest(**{**values, **paths, "size": size}), directory=folder.parent)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ConfigError("is damaged", where=str(path), hint="Submit the job again") from error
    return request, RunDirectory(folder).settings()


def _check(folder: Path, profile: ClusterProfile) -> None:
    if "\\" in str(folder):
        hint = "Choose another: with a backslash, Slurm leaves the job number out of the log's name"
        raise ConfigError(f"{folder} must not contain a backslash", where="--out", hint=hint)
    local = [path for path in profile.local_paths if folder.is_relative_to(path)]
    if profile.nodes > 1 and local:
        raise ConfigError(
            f"{folder} is on a disk of one machine only",
            where="--out",
            hint=f"Choose a folder on shared storage; {local[0]} is among local_paths of the cluster profile",
        )


def _job_name(folder: Path) -> str:
    return f"embed-{re.sub(r'[^A-Za-z0-9._-]', '_', folder.name)[:60]}"
