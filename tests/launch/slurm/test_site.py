"""``fovea doctor --write`` and the comparison of a profile with a site, on facts and on a real Slurm."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.slurm import limits, site
from launch.slurm.compare_profile import OWN, compare
from launch.slurm.profile import ClusterProfile, load
from launch.slurm.site import Interface, NodeFacts, Site
from launch.slurm.write_profile import profile_text, write
from pipeline.errors import ConfigError, LaunchError
from tests.helpers.runs import ROOT, TOY
from tests.helpers.slurm import NEEDS_SLURM, Cluster, cluster

GPU_NODES = tuple(
    NodeFacts(f"g{n}", 96, 1_000_000, 1_800_000, 8, frozenset({"h100"}), frozenset({"ib", "h100"}), frozenset({"gpu", "all"}))
    for n in range(4)
)
LAB = Site(
    settings={
        **{"SLURM_VERSION": "23.11.1", "ClusterName": "lab", "PreemptMode": "REQUEUE", "TmpFS": "/scratch"},
        "AccountingStorageEnforce": "associations,qos",
    },
    partitions={
        "gpu": {"Default": "YES", "MaxTime": "12:00:00", "MaxNodes": "3", "State": "UP", "AllowAccounts": "vision,nlp"},
        "all": {"MaxTime": "UNLIMITED", "State": "UP", "PreemptMode": "CANCEL", "AllowQos": "low"},
        "empty": {"MaxTime": "1:00:00"},
    },
    nodes=(*GPU_NODES, NodeFacts("c0", 32, 64_000, 0, 0, partitions=frozenset({"all"}))),
    accounts={"vision": frozenset({"normal", "high"}), "bio": frozenset({"normal"})},
    reservations=frozenset({"course"}),
    interfaces=(Interface("eth0", True, False), Interface("ib0", True, True), Interface("ib1", False, True)),
)


def read(tmp_path: Path, text: str) -> ClusterProfile:
    (tmp_path / "site.yaml").write_text(text)
    return load(str(tmp_path / "site.yaml"))


def test_a_profile_of_a_gpu_partition_takes_all_of_a_node_and_its_limit(tmp_path: Path) -> None:
    text = profile_text(LAB, None)
    profile = read(tmp_path, text)
    assert (profile.nodes, profile.gpus_per_node, profile.cpus_per_rank, profile.memory) == (1, 8, 12, "0")
    assert (profile.time, profile.seconds, profile.partition) == ("12:00:00", 12 * 3600, "gpu")
    assert "/scratch" in profile.local_paths and profile.preflight.disk_gb == 50
    assert "# at most 3" in text and "# h100" in text and "# Other partitions: all (5 nodes), empty (0 nodes)." in text
    unknown = [line for line in text.splitlines() if line.startswith("# ") and ":" in line]
    for name in ("account: bio", "qos: high", "constraint: h100", "  NCCL_SOCKET_IFNAME: ib0", "container:", "gpu_tflops: 989"):
        assert any(line.startswith(f"# {name}") for line in unknown), name
    uncommented = text.replace("# account: bio ", "account: bio #").replace("# gpu_hour_price", "gpu_hour_price")
    assert read(tmp_path, uncommented).account == "bio", "a line is used by removing its #"


def test_a_profile_of_a_mixed_partition_is_that_of_most_of_its_nodes(tmp_path: Path) -> None:
    text = profile_text(LAB, "all")
    profile = read(tmp_path, text)
    assert profile.gpus_per_node == 8 and profile.seconds == 24 * 3600 and "1 of its nodes have another number of GPUs" in text
    for name in ("nowhere", "empty"):
        with pytest.raises(LaunchError):
            profile_text(LAB, name)
    with pytest.raises(LaunchError, match="there are no partitions"):
        profile_text(Site({}, {}, ()), None)
    file = tmp_path / "new" / "site.yaml"
    assert "fovea doctor -c" in write(LAB, file, None)
    with pytest.raises(ConfigError, match="exists already"):
        write(LAB, file, None)
    with pytest.raises(ConfigError, match=r"must end with \.yaml"):
        write(LAB, tmp_path / "without_suffix", None)


@pytest.mark.parametrize("limit", ["0:30", "1", "00:10:00", "365-00:00:00"])
def test_any_limit_gives_a_profile_that_is_accepted(tmp_path: Path, limit: str) -> None:
    short = dataclasses.replace(LAB, partitions={"gpu": {"Default": "YES", "MaxTime": limit}})
    profile = read(tmp_path, profile_text(short, None))
    assert profile.checkpoint_lead_time < profile.seconds <= 24 * 3600


def states(profile: ClusterProfile, here: Site = LAB) -> dict[str, tuple[str, str]]:
    return {what.partition(":")[0]: (state, f"{what} {advice}") for state, what, advice in compare(profile, here)}


def test_every_field_is_compared_or_named_as_unknown_to_slurm() -> None:
    fields = states(ClusterProfile(partition="gpu", time="10:00:00"))
    assert set(fields) - {"not known to Slurm"} | set(OWN) == set(ClusterProfile.model_fields)
    assert not [name for name, (state, _) in fields.items() if state == "bad"]
    assert all(name in fields["not known to Slurm"][1] for name in OWN)


@pytest.mark.parametrize(
    ("changes", "field", "state", "text"),
    [
        ({"nodes": 4}, "nodes", "bad", "4 of at most 3"),
        ({"gpus_per_node": 9}, "gpus_per_node", "bad", "0 of 4 nodes have them (each has 8)"),
        ({"gpus_per_node": 4}, "gpus_per_node", "note", "the others are not used"),
        ({"gpus_per_node": 8, "ranks_per_node": 4}, "ranks_per_node", "note", "4, on 8 GPUs"),
        ({"cpus_per_rank": 13}, "cpus_per_rank", "bad", "104 CPUs per node; 0 of 4"),
        ({"cpus_per_rank": 2}, "cpus_per_rank", "note", "the nodes have 12 per rank"),
        ({"memory": "2T"}, "memory", "bad", "2097152 MB per node; 0 of 4"),
        ({"time": "1-00:00:00"}, "time", "bad", "of at most 12:00:00"),
        ({"checkpoint_lead_time": 20000}, "checkpoint_lead_time", "note", "%"),
        ({"partition": "gpus"}, "partition", "bad", "choose one of all, empty, gpu"),
        ({"account": "nobody"}, "account", "bad", "it admits vision,nlp"),
        ({"account": "nlp"}, "account", "bad", "not an account of yours"),
        ({"account": "vision"}, "account", "ok", "vision"),
        ({"account": "Vision"}, "account", "ok", "Vision"),  # Slurm's names have no capitals
        ({"qos": "huge"}, "qos", "bad", "choose one of high, normal"),
        ({"partition": "all", "qos": "high"}, "qos", "bad", "it admits low"),
        ({"constraint": "ib&a100"}, "constraint", "bad", "a100: no node has it"),
        ({"constraint": "ib&h100"}, "constraint", "ok", "ib&h100"),
        ({"reservation": "exam"}, "reservation", "bad", "choose one of course"),
        ({"partition": "all", "requeue_mode": "requeue"}, "requeue_mode", "bad", "set requeue_mode: successor"),
        ({"environment": {"NCCL_SOCKET_IFNAME": "eth9"}}, "environment", "note", "this machine has eth0, ib0, ib1"),
        ({"environment": {"NCCL_SOCKET_IFNAME": "ib"}}, "environment", "ok", "ib"),
        ({"nodes": 2, "local_paths": ("/tmp",)}, "local_paths", "note", "TmpFS /scratch is not one"),
        ({"preflight": {"disk_gb": 4000}}, "preflight", "bad", "the nodes have 1758 GB"),
        ({"hang_timeout": 90000}, "hang_timeout", "note", "90000 s"),
        ({"notify": {"webhook_env": "NO_SUCH_VARIABLE"}}, "notify", "note", "not set in this shell"),
        ({"host_python": "/no/such/python"}, "host_python", "note", "not on this machine"),
        ({"container": {"image": "/no/such.sqsh"}}, "container", "note", "not on this machine"),
        ({"gpu_tflops": None}, "gpu_tflops", "note", "h100"),
    ],
)
def test_a_field_that_does_not_fit_is_named(changes: dict[str, Any], field: str, state: str, text: str) -> None:
    profile = ClusterProfile.model_validate({"partition": "gpu", "time": "10:00:00", **changes})
    found = states(profile)[field]
    assert found[0] == state and text in found[1], found


def test_a_site_without_accounts_or_facts_gives_no_error() -> None:
    bare = Site({}, {"p": {}}, ())
    fields = states(ClusterProfile(account="x", qos="y"), bare)
    assert fields["account"][0] == "note" and fields["partition"][0] == "bad"


@pytest.mark.parametrize(
    ("enforced", "states_of"), [("none", ("note", "note")), ("limits", ("bad", "note")), ("qos", ("bad", "bad"))]
)
def test_only_what_slurm_enforces_is_required(enforced: str, states_of: tuple[str, str]) -> None:
    here = dataclasses.replace(LAB, settings={**LAB.settings, "AccountingStorageEnforce": enforced})
    fields = states(ClusterProfile(partition="gpu", account="nlp", qos="huge"), here)
    assert (fields["account"][0], fields["qos"][0]) == states_of, fields
    silent = states(ClusterProfile(partition="gpu", account="nlp", qos="huge"), dataclasses.replace(here, accounts={}))
    assert (silent["account"][0], silent["qos"][0]) == ("note", "note"), "sacctmgr did not answer"


def test_gpus_and_interfaces_are_read_as_slurm_and_linux_write_them(tmp_path: Path) -> None:
    assert limits.gpus_of("gpu:a100:4(S:0-1),gpu:v100:2,shard:8") == 6 and limits.gpus_of("(null)") == 0
    assert limits.gpu_types_of("gpu:a100:4(S:0-1),gpu:v100:2,gpu:1") == ["a100", "v100"]
    for name, state, kind in (("ib0", "up", "32"), ("eth0", "down", "1"), ("lo", "unknown", "772"), ("veth1", "up", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(f"{state}\n")
        (tmp_path / name / "type").write_text(f"{kind}\n")
    assert site.interfaces(tmp_path) == (Interface("eth0", False, False), Interface("ib0", True, True))
    assert site.interfaces(tmp_path / "missing") == ()


# ---- on a real Slurm -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    partitions = [
        "PartitionName=main Nodes=ALL Default=YES MaxTime=2:00:00 State=UP",
        "PartitionName=single Nodes=n1 MaxTime=INFINITE State=UP",
    ]
    with cluster(tmp_path_factory.mktemp("slurm") / "c", partitions=partitions) as made:
        yield made


class TestRealSlurm:
    pytestmark = NEEDS_SLURM

    def test_a_written_profile_is_compared_and_accepted_by_slurm(
        self, slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in slurm.environment.items():
            monkeypatch.setenv(name, value)
        here = site.ask()
        assert [node.name for node in here.nodes] == ["n1", "n2"] and here.default() == "main"
        assert {(node.cpus, node.memory, node.gpus) for node in here.nodes} == {(8, 4000, 0)} and here.accounts is None
        assert [node.name for node in here.of("single")] == ["n1"]

        def fovea(*words: str) -> str:
            command = [sys.executable, "-m", "launch.cli.main", *words]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert "Traceback" not in done.stderr
            return done.stdout + done.stderr

        file = tmp_path / "site.yaml"
        assert "wrote " in fovea("doctor", "--write", str(file))
        profile = load(str(file))
        assert (profile.partition, profile.time, profile.gpus_per_node, profile.cpus_per_rank) == ("main", "2:00:00", 0, 8)
        assert not limits.never_runs(profile, limits.partition(profile.partition))  # type: ignore[arg-type]
        answer = fovea("doctor", "-c", str(file))
        assert "bad  " not in answer.replace("bad  torch", "") and "time: 2:00:00 of at most 2:00:00" in answer
        (tmp_path / "toy.yaml").write_text(TOY)
        words = ["submit", str(tmp_path / "toy.yaml"), "-c", str(file), "--dry-run", "--check", "data.shards=/nowhere/x.tar"]
        answer = fovea(*words)
        assert "Job " in answer and "to start at" in answer and "#SBATCH --partition=main" in answer, answer
        wrong = {**yaml.safe_load(file.read_text()), "constraint": "a100", "time": "3:00:00", "memory": "64G", "reservation": "x"}
        file.write_text(yaml.safe_dump(wrong))
        answer = fovea("doctor", "-c", str(file))
        for text in (
            "time: 3:00:00 of at most",
            "constraint: a100: no node has it",
            "memory: 65536 MB per node; 0 of 2",
            "reservation: x does not exist",
        ):
            assert f"bad  {text}" in answer, answer
        assert "exists already" in fovea("doctor", "--write", str(file))
        assert "there is no partition x" in fovea("doctor", "--write", str(tmp_path / "y.yaml"), "--partition", "x")
