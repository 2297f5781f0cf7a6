"""Limits of accounts and QOS, as ``sacctmgr`` of Slurm 22.05.8 shows them. On a real slurmdbd: test_accounts."""

from __future__ import annotations

import os
import pwd
from typing import Any

import pytest

from launch.slurm import account_limits, site
from launch.slurm import slurm_commands as tools
from launch.slurm.account_limits import Accounts, check, most_jobs, never_runs, read
from launch.slurm.limits import Partition
from launch.slurm.profile import ClusterProfile
from pipeline.errors import LaunchError

SMALL: dict[str, Any] = {"nodes": 2, "gpus_per_node": 4, "cpus_per_rank": 4, "memory": "8G", "time": "60"}


def association(account: str, **more: str) -> dict[str, str]:
    return {**dict.fromkeys(account_limits._ASSOCIATION, ""), "Account": account, "User": "me", "QOS": "normal,long", **more}


def quality(name: str, **more: str) -> dict[str, str]:
    return {**dict.fromkeys(account_limits._QOS, ""), "Name": name, **more}


def accounts(
    own: list[dict[str, str]] | None = None,
    qualities: list[dict[str, str]] | None = None,
    every: list[dict[str, str]] | None = None,
) -> Accounts:
    return read(own or [association("lab")], [{"DefaultAccount": "lab"}], every or [], qualities or [quality("normal")])


@pytest.mark.parametrize(
    ("profile", "found", "reasons"),
    [
        ({}, accounts(), []),
        ({"account": "LAB"}, accounts(), []),  # Slurm's names have no capitals
        ({"account": "other"}, accounts(), ["account other is not one of yours (lab)"]),
        ({}, read([], [], [], []), ["you may use no account of this cluster"]),
        ({}, read([association("lab")], [{"DefaultAccount": ""}], [], []), ["you have no default account (lab)"]),
        ({"qos": "short"}, accounts(), ["QOS short is not one of yours with account lab (long, normal)"]),
        ({"qos": "Long"}, accounts(), []),
        ({}, accounts([association("lab", Partition="cpu")]), ["you have no default account (lab)"]),
        ({}, accounts([association("lab", Partition="gpu")]), []),
        ({}, accounts([association("lab", MaxWall="00:30:00")]), ["time 60 exceeds the limit of 30:00 of your association"]),
        ({}, accounts([association("lab", MaxWall="1-00:00:00")]), []),
        ({}, accounts(qualities=[quality("normal", MaxWall="30:00")]), ["time 60 exceeds the limit of 30:00 of QOS normal"]),
        # The QOS comes before the association, and that of the partition before that of the job.
        ({}, accounts([association("lab", MaxWall="10:00")], [quality("normal", MaxWall="2:00:00")]), []),
        ({}, accounts(qualities=[quality("normal", MaxWall="10:00"), quality("part", MaxWall="2:00:00")]), []),
        (
            {},
            accounts(qualities=[quality("normal", MaxWall="10:00", Flags="OverPartQOS"), quality("part", MaxWall="2:00:00")]),
            ["time 60 exceeds the limit of 10:00 of QOS normal"],
        ),
        (
            {},
            accounts([association("lab", DefaultQOS="long")], [quality("long", MaxTRES="node=1")]),
            ["2 nodes exceed the limit of 1"],
        ),
        # A limit hides the same one of later levels, and no other.
        ({}, accounts([association("lab", MaxTRES="node=1")], [quality("normal", MaxTRES="node=9")]), []),
        (
            {},
            accounts([association("lab", MaxTRES="node=1")], [quality("normal", MaxTRESPU="node=9", MaxTRES="cpu=99")]),
            ["2 nodes exceed the limit of 1 of your association"],
        ),
        (
            {},
            accounts(qualities=[quality("normal", MaxTRES="node=9"), quality("part", GrpTRES="node=1")]),
            ["2 nodes exceed the limit of 1 of QOS part"],
        ),
        ({}, accounts(qualities=[quality("normal", MaxTRESPU="cpu=31,gres/gpu=8")]), ["32 CPUs exceed the limit of 31"]),
        ({}, accounts(qualities=[quality("normal", GrpTRES="gres/gpu=7,gres/gpu:a100=2")]), ["8 GPUs exceed the limit of 7"]),
        ({}, accounts(qualities=[quality("normal", MaxTRES="mem=15G", MaxTRESPA="mem=1T")]), ["16384 MB of memory exceed"]),
        ({}, accounts(every=[association("lab", User="", GrpTRES="node=1")]), ["2 nodes exceed the limit of 1 of account lab"]),
        ({}, accounts(qualities=[quality("normal", MaxTRES="billing=1,node=x", MaxWall="never")]), []),
    ],
)
def test_each_limit_is_that_of_the_level_that_counts(profile: dict[str, Any], found: Accounts, reasons: list[str]) -> None:
    given = never_runs(ClusterProfile(**{**SMALL, **profile}), found, "gpu", "part")
    assert len(given) == len(reasons) and all(a.startswith(b) for a, b in zip(given, reasons, strict=True)), given


def test_limits_that_are_not_enforced_refuse_nothing() -> None:
    strict = read([association("lab", MaxWall="1", MaxSubmit="1")], [{"DefaultAccount": "lab"}], [], [], limited=False)
    profile = ClusterProfile(**SMALL)
    assert never_runs(profile, strict, "gpu") == [] and most_jobs(profile, strict, "gpu") is None
    assert never_runs(profile.model_copy(update={"account": "x"}), strict, "gpu")


def test_a_qos_that_is_not_enforced_is_refused_for_its_limits_only() -> None:
    qualities = [quality("normal"), quality("short", MaxWall="10:00")]
    own, default = [association("lab")], [{"DefaultAccount": "lab"}]
    free = read(own, default, [], qualities, qos_enforced=False)
    assert never_runs(ClusterProfile(**SMALL, qos="other"), free, "gpu") == []
    assert never_runs(ClusterProfile(**SMALL, qos="short"), free, "gpu") == ["time 60 exceeds the limit of 10:00 of QOS short"]


def test_the_least_number_of_jobs_counts_that_no_earlier_level_replaces() -> None:
    profile, own = ClusterProfile(**SMALL), [association("lab", MaxSubmit="1")]
    assert most_jobs(profile, accounts(own, [quality("normal", MaxSubmitPU="9")]), "gpu") == (9, "QOS normal")
    least = most_jobs(profile, accounts(own, [quality("normal", MaxSubmitPA="9")]), "gpu")
    assert least == (1, "your association with account lab")


def test_a_limit_of_one_job_in_the_queue_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_limits, "ask", lambda: accounts([association("lab", MaxSubmit="1", GrpSubmit="5")]))
    gpu = Partition("gpu")
    reasons, note = check(ClusterProfile(**SMALL), gpu)
    assert not reasons and note.startswith("your association with account lab admits one job in the queue")
    assert check(ClusterProfile(**SMALL, requeue_mode="requeue"), gpu) == ([], "")
    assert check(ClusterProfile(**SMALL, options=("--account=other",)), gpu) == ([], ""), "Slurm decides"
    monkeypatch.setenv("SBATCH_QOS", "long")
    assert check(ClusterProfile(**SMALL), gpu) == ([], "")


@pytest.mark.parametrize(
    ("settings", "asks"),
    [
        ({"AccountingStorageType": "(null)", "AccountingStorageEnforce": "limits"}, False),
        ({"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageEnforce": "none"}, False),
        ({"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageEnforce": "nojobs,nosteps"}, False),
        ({"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageEnforce": "associations"}, True),
    ],
)
def test_accounts_are_asked_for_where_they_are_enforced(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], asks: bool
) -> None:
    asked: list[str] = []

    def answer(*words: str, **_: object) -> str:
        asked.append(words[4])
        return "lab|me||normal|||||||\n" if words[4] == "associations" else "lab\n"

    monkeypatch.setattr(tools, "settings", lambda: {"ClusterName": "c", **settings})
    monkeypatch.setattr(tools, "call", answer)
    found = account_limits.ask()
    assert (found is not None) is asks is bool(asked)
    assert found is None or (found.default == "lab" and not found.limited)


@pytest.mark.parametrize(
    ("words", "limited", "qos"),
    [
        ("associations", False, False),
        ("wckeys,nosteps", False, False),
        ("associations,limits", True, False),
        ("safe", True, False),
        ("associations,qos", False, True),
        ("all", True, True),
    ],
)
def test_what_is_enforced_follows_from_the_words_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, words: str, limited: bool, qos: bool
) -> None:
    kept = {"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageEnforce": words}
    monkeypatch.setattr(tools, "settings", lambda: kept)
    monkeypatch.setattr(tools, "call", lambda *_, **__: "")
    found = account_limits.ask()
    assert found is not None and (found.limited, found.qos_enforced) == (limited, qos)


def test_the_user_is_the_one_whose_id_slurm_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageEnforce": "limits"}
    asked: list[str] = []
    monkeypatch.setattr(tools, "settings", lambda: kept)
    monkeypatch.setattr(tools, "call", lambda *words, **_: asked.extend(words) or "")
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "somebody")
    account_limits.ask()
    site._accounts()
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert asked.count(f"user={me}") == 2 and "user=somebody" not in asked
    monkeypatch.setattr(os, "geteuid", lambda: 54321)  # without an entry
    assert account_limits.ask() is None and site._accounts() == {}


def test_an_accounting_that_does_not_answer_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: str, **__: object) -> str:
        raise LaunchError("Connection refused")

    kept = {"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageEnforce": "limits"}
    monkeypatch.setattr(tools, "settings", lambda: kept)
    monkeypatch.setattr(tools, "call", silent)
    assert account_limits.ask() is None
