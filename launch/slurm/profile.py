"""Cluster profiles: YAML files in ``configs/clusters/``, or the user's own."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config.layers import Branch, Problem, grown, merge, origin_of, override, read, unwrap
from pipeline.config.load import InvalidConfig, display, roots
from pipeline.config.types import Count, NonNegative, Positive, Settings, Texts
from pipeline.errors import ConfigError
from pipeline.estimate.failures import NODE_MTBF_HOURS
from pipeline.runtime.notify_settings import NotifySettings
from pipeline.untrusted import printable

_TIME = re.compile(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", re.ASCII)


class ContainerSettings(Settings):
    """Container of the ranks, started by the pyxis plugin."""

    image: str = Field(min_length=1, description="absolute path of a .sqsh file, or REGISTRY#IMAGE:TAG")
    mounts: Texts = Field(
        default=(), description="HOST:CONTAINER[:ro] for each mount; must include the run directory, the shards and the caches"
    )
    python: str = Field(default="python", description="python inside the container, with fovea's dependencies")

    @field_validator("image")
    @classmethod
    def _absolute(cls, image: str) -> str:
        if image.endswith(".sqsh") and not image.startswith("/"):
            raise ValueError("must be an absolute path: pyxis reads any other as a name on a registry")
        return image


class BudgetSettings(Settings):
    """How many attempts each cause may end before the run gives up."""

    crash: Count = Field(default=3, description="exceptions and killed ranks")
    hang: Count = Field(default=3, description="hung ranks")
    node: Count = Field(default=5, description="node failures")
    rendezvous: Count = Field(default=3, description="starts at which the ranks could not connect")
    supervisor: Count = Field(default=3, description="attempts whose supervisor was killed or failed")
    disk: Count = Field(default=12, description="attempts ended by a full disk; the next one looks for space ten minutes later")
    no_progress: Count = Field(default=3, description="consecutive attempts without a newer checkpoint")


class PreflightSettings(Settings):
    """Checks of every node before the ranks start."""

    enabled: bool = Field(default=True, description="run the checks")
    seconds: Positive = Field(default=60.0, description="time limit of the checks, seconds")
    disk_gb: NonNegative = Field(default=5.0, description="minimum free space on the run's disk and in the temporary folder, GB")
    clock_skew: Positive = Field(
        default=30.0, description="maximum difference between the clocks of a node and of the first node, seconds"
    )
    bandwidth_gbps: NonNegative = Field(
        default=0.0, description="minimum algorithm bandwidth of an all-reduce over all GPUs, GB/s; 0 skips the measurement"
    )


class ClusterProfile(Settings):
    """How jobs are submitted to a cluster, and its hardware."""

    nodes: Count = Field(default=1, description="nodes per job")
    spare_nodes: int = Field(
        default=0,
        ge=0,
        description="further nodes of the job, without ranks at first; with launch.restarts, one replaces a node that is lost or "
        "at fault",
    )
    gpus_per_node: int = Field(default=8, ge=0, description="GPUs per node; 0 for a cluster without GPUs")
    ranks_per_node: Count | None = Field(default=None, description="ranks per node; null means one per GPU, or one without GPUs")
    cpus_per_rank: Count = Field(default=12, description="CPU cores per rank")
    memory: str = Field(default="0", description="memory per node in the format of sbatch; 0 means all")
    time: str = Field(default="24:00:00", description="time limit of one attempt in the format of sbatch")
    checkpoint_lead_time: Positive = Field(
        default=300.0, description="seconds before the time limit at which the run saves a checkpoint and stops"
    )
    partition: str | None = Field(default=None, description="Slurm partition")
    account: str | None = Field(default=None, description="Slurm account to charge")
    qos: str | None = Field(default=None, description="Slurm quality of service")
    constraint: str | None = Field(default=None, description="node features required by the job")
    reservation: str | None = Field(default=None, description="Slurm reservation")
    exclusive: bool = Field(default=True, description="do not share nodes with other jobs")
    options: Texts = Field(default=(), description="further #SBATCH options, such as --mail-type=FAIL")
    requeue_mode: Literal["successor", "requeue", "chain"] = Field(
        default="successor",
        description="how a run continues: successor keeps a second job in the queue that takes over at once, however the first "
        "ends; requeue puts the same job back, where it waits for two minutes (for sites that allow no second job); chain is "
        "successor, and Slurm itself never requeues the job",
    )
    exclude_hours: Positive = Field(default=24.0, description="hours for which a node at fault is excluded")
    host_python: str = Field(default="python3", description="python 3.9 or newer on the batch script's node; needs no packages")
    python: str | None = Field(default=None, description="python of the ranks; null means the one that runs fovea submit")
    setup: Texts = Field(default=(), description="lines at the start of the batch script, such as module load cuda")
    environment: dict[str, str] = Field(default={}, description="environment variables of the ranks, such as those of NCCL")
    export_env: Texts = Field(
        default=("AWS_*", "MLFLOW_*", "FOVEA_*", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_*", "XDG_CACHE_HOME"),
        description="names of environment variables that the job inherits from the submitting shell; their values are not "
        "written to disk",
    )
    container: ContainerSettings | None = Field(default=None, description="container of the ranks; null for none")
    local_paths: Texts = Field(
        default=("/tmp", "/var/tmp", "/dev/shm", "/scratch/local"), description="directories that are not shared between nodes"
    )
    hang_timeout: Positive = Field(
        default=1800.0, description="seconds without a heartbeat from any rank after which the attempt is ended"
    )
    budgets: BudgetSettings = Field(default=BudgetSettings(), description="how many attempts each cause may end")
    preflight: PreflightSettings = Field(default=PreflightSettings(), description="checks before the ranks start")
    notify: NotifySettings = Field(
        default=NotifySettings(), description="notifications about runs; a run's own section notify takes precedence"
    )
    gpu_memory_gb: Positive = Field(default=80.0, description="memory per GPU, GB")
    gpu_tflops: Positive | None = Field(default=None, description="bf16 TFLOP/s per GPU, used in estimates")
    gpu_hour_price: NonNegative | None = Field(default=None, description="price of a GPU hour, in your currency")
    node_mtbf_hours: Positive = Field(
        default=NODE_MTBF_HOURS,
        description="mean time between two failures of a node, hours, used in estimates; by default that of the training of "
        "Llama 3 (419 interruptions in 54 days on 2,048 nodes)",
    )
    restart_seconds: Positive = Field(
        default=300.0,
        description="seconds from a failure to the first step after it, without reading the checkpoint, used in estimates",
    )
    checkpoint_gb_per_second: Positive = Field(
        default=1.0, description="GB/s at which a node writes and reads checkpoints, used in estimates"
    )

    @model_validator(mode="after")
    def _replaceable(self) -> Self:
        if self.spare_nodes and self.nodes == 1:
            raise ValueError("spare_nodes needs nodes of 2 or more: the first node, where the supervisor runs, is never replaced")
        return self

    @model_validator(mode="after")
    def _one_line_each(self) -> Self:
        """All of these become single lines of the batch script; only ``setup`` may have several."""
        single = ("memory", "partition", "account", "qos", "constraint", "reservation", "host_python", "python")
        texts = {name: (getattr(self, name),) for name in single} | {"options": self.options, "export_env": self.export_env}
        for name, values in texts.items():
            for value in values:
                if value is not None and printable(value) != value:
                    raise ValueError(f"{name} must not contain line breaks or other control characters")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
                raise ValueError(f"environment: {printable(name)!r} is not a variable name")
        return self

    @field_validator("time")
    @classmethod
    def _time(cls, text: str) -> str:
        seconds(text)
        return text

    @field_validator("time", "memory", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value

    @field_validator("environment", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        return {key: str(inner) for key, inner in value.items()} if isinstance(value, dict) else value

    @property
    def tasks_per_node(self) -> int:
        """Ranks per node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world(self) -> int:
        """Ranks per job."""
        return self.nodes * self.tasks_per_node

    @property
    def all_nodes(self) -> int:
        """Nodes per job, with those that stand by."""
        return self.nodes + self.spare_nodes

    @property
    def seconds(self) -> int:
        """The time limit in seconds."""
        return seconds(self.time)


def seconds(time: str) -> int:
    """A time limit in the format of sbatch, in seconds.

    Raises:
        ValueError: it has another format.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError("must be minutes, H:M:S or D-H:M:S")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if days or "-" in time:
        return ((days * 24 + first) * 60 + second) * 60 + third
    if time.count(":") == 2:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def available() -> dict[str, Path]:
    """Profiles that come with fovea."""
    return {file.stem: file for root in roots() for file in sorted((root / "clusters").glob("*.yaml"))}


def load(name: str, overrides: Sequence[str] = ()) -> ClusterProfile:
    """Read a profile from a file or by name.

    Args:
        name: a YAML file, or the name of a profile that comes with fovea.
        overrides: texts ``key=value``.

    Raises:
        ConfigError: no such profile, or invalid settings; lists all of them.
    """
    known = available()
    file = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else known.get(name)
    if file is None or not file.is_file():
        near = difflib.get_close_matches(name, known, 3, 0.4) or sorted(known)
        raise ConfigError(
            f"there is no cluster profile {name!r}",
            where="--cluster",
            hint=f"Give a YAML file's path, or one of {', '.join(near)}; configs/clusters/example.yaml is a template",
        )
    problems: list[Problem] = []
    return _made(read(file, problems, ()), problems, overrides, display(file))


# Keys of submissions by earlier versions.
_RENAMED = {"lead": "checkpoint_lead_time", "after": "requeue_mode", "pass_on": "export_env", "hang": "hang_timeout"}


def again(values: Any, overrides: Sequence[str] = ()) -> ClusterProfile:
    """The profile of an earlier submission, with changes.

    Args:
        values: as ``submit/job.json`` stores it.
        overrides: texts ``key=value``.

    Raises:
        ConfigError: it is not a profile, or a change is invalid.
    """
    here = "the profile of the last submission"
    if not isinstance(values, dict):
        raise ConfigError("must be a section", where=here, hint="Give --cluster")
    tree = grown({_RENAMED.get(str(name), str(name)): value for name, value in values.items()}, here)
    return _made(tree, [], overrides, here)


def _made(tree: Branch, problems: list[Problem], overrides: Sequence[str], shown: str) -> ClusterProfile:
    for text in overrides:
        merge(tree, override(text, problems))
    profile = None
    try:
        profile = ClusterProfile.model_validate(unwrap(tree))
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False):
            names = [str(part) for part in detail["loc"] if not isinstance(part, int)]
            path = ".".join(names)
            near = difflib.get_close_matches(names[-1], ClusterProfile.model_fields, 1) if names else []
            unknown = f"unknown key {path!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            message = (
                unknown
                if detail["type"] == "extra_forbidden"
                else f"{path} = {printable(repr(detail['input']), limit=80)}: {detail['msg']}"
                if path
                else detail["msg"]
            )
            problems.append(
                Problem(
                    path, message.replace("Value error, ", "").replace("Input should", "must"), origin_of(tree, names) or shown
                )
            )
    if problems or profile is None:
        raise InvalidConfig(problems)
    if profile.checkpoint_lead_time >= profile.seconds:
        raise ConfigError(
            f"{profile.checkpoint_lead_time:.0f} s is not below the time limit of {profile.seconds} s",
            where=f"{shown}: checkpoint_lead_time",
            hint="Lower checkpoint_lead_time, or raise time",
        )
    named = {"smtp_password_file": profile.notify.smtp_password_file, "webhook_file": profile.notify.webhook_file}
    files = {key: Path(os.path.abspath(os.path.expanduser(file))) for key, file in named.items() if file is not None}
    return profile.model_copy(update={"notify": profile.notify.model_copy(update=files)})  # the job works in another directory
