"""What can never run in a partition, as Slurm 22.05.8 describes it."""

from __future__ import annotations

import pytest

from launch.slurm import limits
from launch.slurm import slurm_commands as tools
from launch.slurm.limits import Node, Partition, never_runs
from launch.slurm.profile import ClusterProfile
from pipeline.errors import LaunchError

SMALL = {"nodes": 2, "gpus_per_node": 2, "cpus_per_rank": 4, "memory": "4G", "time": "60"}
GPU = Partition("gpu", 7200, None, (Node(8, 8000, 2), Node(8, 8000, 2), Node(8, 8000, 0)))


@pytest.mark.parametrize(
    ("changes", "available", "reasons"),
    [
        ({}, GPU, []),
        ({"time": "120"}, GPU, []),
        ({"time": "121"}, GPU, ["time 121 exceeds the limit of"]),
        ({"time": "30-00:00:00"}, Partition("gpu", None, None, GPU.nodes), []),
        ({"nodes": 4, "gpus_per_node": 0}, GPU, ["nodes 4 exceeds 3"]),
        ({"nodes": 2}, Partition("gpu", 7200, 1, GPU.nodes), ["nodes 2 exceeds 1"]),
        ({"nodes": 3}, GPU, ["2 GPUs per node are available on 2 of 3 nodes"]),
        ({"cpus_per_rank": 5}, GPU, ["10 CPUs per node are available on 0 of 2 nodes"]),
        ({"memory": "9G"}, GPU, ["9216 MB of memory per node are available on 0 of 2 nodes"]),
        ({"memory": "8000M"}, GPU, []),
        ({"memory": "0"}, GPU, []),
        ({"gpus_per_node": 8, "time": "3:00:00"}, GPU, ["time 3:00:00", "32 CPUs", "8 GPUs"]),
    ],
)
def test_every_reason_is_given(changes: dict[str, object], available: Partition, reasons: list[str]) -> None:
    found = never_runs(ClusterProfile(**{**SMALL, **changes}), available)  # type: ignore[arg-type]
    assert len(found) == len(reasons) and all(one.startswith(text) for one, text in zip(found, reasons, strict=True)), found


def answers(monkeypatch: pytest.MonkeyPatch, partitions: str, nodes: str) -> None:
    monkeypatch.setattr(tools, "call", lambda name, *_, **__: partitions if name == "scontrol" else nodes)


def test_a_partition_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(
        monkeypatch,
        "PartitionName=main Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED TotalNodes=2\n"
        "PartitionName=gpu Default=YES MaxNodes=4 MaxTime=1-00:00:00 TotalNodes=3\n",
        "96|515000|gpu:a100:8(S:0-1)\n128+|1031000+|gpu:4,nvme:2\n64|257000|(null)\n",
    )
    gpu = Partition("gpu", 86400, 4, (Node(96, 515000, 8), Node(128, 1031000, 4), Node(64, 257000, 0)))
    assert limits.partition("gpu") == gpu
    assert limits.partition(None) == gpu
    assert limits.partition("main") == Partition("main", None, None, gpu.nodes)
    assert str(gpu) == "partition gpu: 3 nodes, 64 to 128 CPUs, 257000 to 1031000 MB and 0 to 8 GPUs each, time 24:00:00"
    with pytest.raises(LaunchError, match=r"there is no partition gpuu\. Choose one of gpu, main"):
        limits.partition("gpuu")


def test_a_slurm_without_a_default_partition_is_left_to_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "PartitionName=main Default=NO MaxTime=UNLIMITED\n", "")
    assert limits.partition(None) is None


@pytest.mark.parametrize(
    ("kind", "keeps"),
    [("accounting_storage/none", False), ("(null)", False), (None, False), ("accounting_storage/slurmdbd", True)],
)
def test_whether_slurm_has_an_accounting_is_read_as_old_and_new_versions_write_it(kind: str | None, keeps: bool) -> None:
    assert tools.keeps_accounts({"AccountingStorageType": kind} if kind is not None else {}) is keeps
