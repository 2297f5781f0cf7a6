"""Limits of accounts and of qualities of service (QOS): what Slurm would keep waiting for ever is refused before.

Slurm accepts such a job and shows it as pending with a reason such as ``QOSMaxWallDurationPerJobLimit``. Of the levels that set
the same limit only the first counts: the partition's QOS, the job's QOS, the association of user and account, and the account's
own (https://slurm.schedmd.com/resource_limits.html).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.slurm import limits
from launch.slurm import slurm_commands as tools
from launch.slurm.profile import ClusterProfile, seconds
from pipeline.errors import LaunchError
from pipeline.runtime.clock import clock

_QOS = ("Name", "Flags", "MaxWall", "MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES", "MaxSubmitPU", "MaxSubmitPA", "GrpSubmit")
_ASSOCIATION = ("Account", "User", "Partition", "QOS", "DefaultQOS", "MaxWall", "MaxTRES", "GrpTRES", "MaxSubmit", "GrpSubmit")
_JOB_LIMITS = {"MaxSubmit": "MaxSubmit", "MaxSubmitPU": "MaxSubmit", "MaxSubmitPA": "MaxSubmitPA", "GrpSubmit": "GrpSubmit"}
_CHOICES = ("--account", "-A", "--qos", "-q")  # of sbatch
_VARIABLES = {"SBATCH_ACCOUNT", "SBATCH_QOS"}
_UNITS = {"cpu": "CPUs", "node": "nodes", "gres/gpu": "GPUs", "mem": "MB of memory"}


@dataclass(frozen=True)
class Level:
    """What one level limits; a limit that it does not set is missing.

    Attributes:
        name: as shown to users, such as ``QOS short``.
        wall: seconds of a job.
        tres: largest amounts by limit (``MaxTRES`` of a job; ``MaxTRESPU``, ``MaxTRESPA`` and ``GrpTRES`` of all jobs of a user,
            of an account and of the level at the same time) and by kind (``cpu``, ``node``, ``gres/gpu``, ``mem`` in MB).
        jobs: jobs in the queue at the same time by limit: ``MaxSubmit`` of the user, ``MaxSubmitPA`` and ``GrpSubmit`` as above.
        over_partition: whether a QOS comes before that of the partition when it is the job's (flag ``OverPartQOS``).
    """

    name: str
    wall: int | None = None
    tres: Mapping[tuple[str, str], int] = field(default_factory=dict)
    jobs: Mapping[str, int] = field(default_factory=dict)
    over_partition: bool = False


@dataclass(frozen=True)
class Association:
    """A user's right to use an account.

    Attributes:
        account: the account.
        partition: the only partition in which it holds; empty for all.
        qos: what its jobs may use.
        default_qos: what they use by default; empty where none is set.
        level: its limits.
    """

    account: str
    partition: str = ""
    qos: frozenset[str] = frozenset()
    default_qos: str = ""
    level: Level = field(default_factory=lambda: Level(""))


@dataclass(frozen=True)
class Accounts:
    """What Slurm's accounting admits for this user.

    Attributes:
        associations: the user's, on this cluster.
        default: the user's default account; empty where none is set.
        qos: limits by name.
        of_account: limits of the accounts themselves, by name.
        limited: whether limits are enforced, and not the accounts only.
        qos_enforced: whether a job's QOS must be one of its association; otherwise Slurm takes any.
    """

    associations: Sequence[Association] = ()
    default: str = ""
    qos: Mapping[str, Level] = field(default_factory=dict)
    of_account: Mapping[str, Level] = field(default_factory=dict)
    limited: bool = True
    qos_enforced: bool = True

    def choose(self, profile: ClusterProfile, partition: str | None) -> Association | None:
        """The association that a job would use; ``None`` if the user has none for it."""
        account = (profile.account or self.default).lower()  # Slurm's names have no capitals
        fitting = [one for one in self.associations if one.account == account and one.partition in ("", partition or "")]
        return max(fitting, key=lambda one: one.partition, default=None)


def ask() -> Accounts | None:
    """Ask Slurm; ``None`` where accounts are not enforced, the accounting does not answer, or the user has no name.

    Then Slurm itself decides.

    Raises:
        LaunchError: the controller does not answer.
    """
    settings = tools.settings()
    enforced, user = tools.enforced(settings), tools.user()
    if not tools.keeps_accounts(settings) or not enforced or user is None:
        return None
    cluster = settings.get("ClusterName", "")
    try:
        own = _rows("associations", _ASSOCIATION, f"user={user}", f"cluster={cluster}")
        default = _rows("user", ("DefaultAccount",), user)
        every = _rows("associations", _ASSOCIATION, f"cluster={cluster}", "user=", "WOPLimits")
        qualities = _rows("qos", _QOS)
    except LaunchError:
        return None
    return read(own, default, every, qualities, limited="limits" in enforced, qos_enforced="qos" in enforced)


def read(
    own: Sequence[Mapping[str, str]],
    default: Sequence[Mapping[str, str]],
    every: Sequence[Mapping[str, str]],
    qualities: Sequence[Mapping[str, str]],
    *,
    limited: bool = True,
    qos_enforced: bool = True,
) -> Accounts:
    """Reads rows of ``sacctmgr show``.

    Args:
        own: associations of the user.
        default: the user's entry.
        every: associations of all accounts.
        qualities: all QOS.
        limited: whether limits are enforced.
        qos_enforced: whether a QOS must be one of the association.
    """
    return Accounts(
        tuple(
            Association(
                row["Account"],
                row["Partition"],
                frozenset(filter(None, row["QOS"].split(","))),
                row["DefaultQOS"],
                _level(
                    f"your association with account {row['Account']}", row, ("MaxTRES", "GrpTRES"), ("MaxSubmit", "GrpSubmit")
                ),
            )
            for row in own
        ),
        next((row["DefaultAccount"] for row in default), ""),
        {
            row["Name"]: _level(
                f"QOS {row['Name']}",
                row,
                ("MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES"),
                ("MaxSubmitPU", "MaxSubmitPA", "GrpSubmit"),
            )
            for row in qualities
        },
        {
            row["Account"]: _level(f"account {row['Account']}", row, ("GrpTRES",), ("GrpSubmit",))
            for row in every
            if not row["User"]
        },
        limited,
        qos_enforced,
    )


def check(profile: ClusterProfile, partition: limits.Partition | None, *, membership: bool = True) -> tuple[list[str], str]:
    """Ask Slurm why a job is refused or would wait for ever, and whether no second job may wait for its end.

    Args:
        profile: the cluster profile.
        partition: the job's partition; ``None`` where Slurm chooses it.
        membership: whether to name an account or a QOS that is not the user's; their limits are not known then.

    Returns:
        One sentence per reason, none if the job can run; and a sentence about the second job, or nothing.

    Raises:
        LaunchError: the controller does not answer.
    """
    chosen_elsewhere = any(option.startswith(_CHOICES) for option in profile.options) or _VARIABLES & os.environ.keys()
    if chosen_elsewhere or (accounts := ask()) is None:
        return [], ""
    name, qos = (partition.name, partition.qos) if partition is not None else (None, "")
    if refusal := not_admitted(profile, accounts, name):
        return [refusal] if membership else [], ""
    if reasons := never_runs(profile, accounts, name, qos):
        return reasons, ""
    most = most_jobs(profile, accounts, name, qos)
    if most is None or most[0] > 1 or profile.requeue_mode == "requeue":
        return [], ""
    return [], f"{most[1]} admits one job in the queue: the run has no successor, and each return waits for Slurm's two minutes"


def never_runs(profile: ClusterProfile, accounts: Accounts, partition: str | None, partition_qos: str = "") -> list[str]:
    """Why a job is refused, or would wait for ever, one sentence per reason; empty if it can run.

    Args:
        profile: the cluster profile.
        accounts: what the accounting admits.
        partition: the job's partition.
        partition_qos: the partition's QOS, if it has one.
    """
    if refusal := not_admitted(profile, accounts, partition):
        return [refusal]
    if not accounts.limited:
        return []
    levels = levels_of(profile, accounts, partition, partition_qos)
    reasons = []
    wall = next((level for level in levels if level.wall is not None), None)
    if wall is not None and wall.wall is not None and profile.seconds > wall.wall:
        reasons.append(f"time {profile.time} exceeds the limit of {clock(wall.wall)} of {wall.name}")
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for level in levels:
        for key, most in level.tres.items():
            first.setdefault(key, (most, level.name))
    for kind, needed in _needed(profile).items():
        least = min((limit for (_, of), limit in first.items() if of == kind), default=None)
        if least is not None and needed > least[0]:
            reasons.append(f"{needed} {_UNITS[kind]} exceed the limit of {least[0]} of {least[1]}")
    return reasons


def not_admitted(profile: ClusterProfile, accounts: Accounts, partition: str | None) -> str:
    """Why the user may not use the job's account or QOS; empty if they may. Arguments as above."""
    association = accounts.choose(profile, partition)
    if association is None:
        known = ", ".join(sorted({one.account for one in accounts.associations}))
        what = f"account {profile.account} is not one of yours" if profile.account else "you have no default account"
        return f"{what} ({known})" if known else "you may use no account of this cluster"
    unknown = profile.qos is not None and association.qos and profile.qos.lower() not in association.qos
    if accounts.qos_enforced and unknown:
        return f"QOS {profile.qos} is not one of yours with account {association.account} ({', '.join(sorted(association.qos))})"
    return ""


def most_jobs(
    profile: ClusterProfile, accounts: Accounts, partition: str | None, partition_qos: str = ""
) -> tuple[int, str] | None:
    """The largest number of jobs in the queue and what limits it; ``None`` if nothing does. Arguments as above."""
    levels = levels_of(profile, accounts, partition, partition_qos) if accounts.limited else []
    first: dict[str, tuple[int, str]] = {}
    for level in levels:
        for limit, most in level.jobs.items():
            first.setdefault(limit, (most, level.name))
    return min(first.values(), default=None)


def levels_of(profile: ClusterProfile, accounts: Accounts, partition: str | None, partition_qos: str) -> list[Level]:
    """The levels whose limits hold for a job, the one that counts first. Arguments as above."""
    association = accounts.choose(profile, partition)
    if association is None:
        return []
    # Without a default, Slurm takes the only QOS, or else the one that every database has.
    only = next(iter(association.qos)) if len(association.qos) == 1 else "normal"
    own = accounts.qos.get((profile.qos or association.default_qos or only).lower())
    both = [accounts.qos.get(partition_qos), own]
    if own is not None and own.over_partition:
        both.reverse()
    return [level for level in (*both, association.level, accounts.of_account.get(association.account)) if level is not None]


def _needed(profile: ClusterProfile) -> dict[str, int]:
    nodes = profile.all_nodes
    return {
        "node": nodes,
        "cpu": nodes * profile.tasks_per_node * profile.cpus_per_rank,
        "gres/gpu": nodes * profile.gpus_per_node,
        "mem": nodes * limits.megabytes(profile.memory),
    }


def _level(name: str, row: Mapping[str, str], resources: Sequence[str], jobs: Sequence[str]) -> Level:
    amounts: dict[tuple[str, str], int] = {}
    for key in resources:
        for pair in row.get(key, "").split(","):
            kind, equals, text = pair.partition("=")
            if equals and kind in _UNITS and (amount := _amount(kind, text)) is not None:
                amounts[key, kind] = amount
    numbers = {_JOB_LIMITS[key]: int(row[key]) for key in jobs if row.get(key, "").isdecimal()}
    wall = None
    if text := row.get("MaxWall", ""):
        try:
            wall = seconds(text)
        except ValueError:
            wall = None
    return Level(name, wall, amounts, numbers, "OverPartQOS" in row.get("Flags", ""))


def _amount(kind: str, text: str) -> int | None:
    if kind == "mem":
        return limits.megabytes(text) if re.fullmatch(r"\d+[KMGT]?", text) else None
    return int(text) if text.isdecimal() else None


def _rows(what: str, keys: Sequence[str], *conditions: str) -> list[dict[str, str]]:
    text = tools.call("sacctmgr", "--noheader", "--parsable2", "show", what, *conditions, f"format={','.join(keys)}", limit=20)
    rows = [line.split("|") for line in text.splitlines()]
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]
