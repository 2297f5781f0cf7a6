"""Who this process is among the ranks, where they meet, how many are started, and on which GPUs."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import rank_environment as module
from launch.hostlist import hosts
from launch.rank_environment import RankEnvironment, ranks_to_start
from pipeline.errors import LaunchError
from pipeline.runtime.gpus import gpus, visible
from pipeline.runtime.process_group import check_backends, check_gpus, gpu_of, join

STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def step(tasks: int, **more: str) -> dict[str, str]:
    return {**STEP, "SLURM_STEP_NUM_TASKS": str(tasks), **more}


# ---- lists of nodes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n1", "n1"),
        ("a[1-3,5]", "a1 a2 a3 a5"),
        ("a[1-3,5],b07-[01-02]", "a1 a2 a3 a5 b07-01 b07-02"),
        ("gpu[008-011]", "gpu008 gpu009 gpu010 gpu011"),
        ("gpu[9-10]", "gpu9 gpu10"),
        ("n[1-2].cluster.example", "n1.cluster.example n2.cluster.example"),
        ("rack[1-2]n[01-02]-ib", "rack1n01-ib rack1n02-ib rack2n01-ib rack2n02-ib"),
        ("login, n[3]", "login n3"),
        ("ip-10-0-0-[4,7]", "ip-10-0-0-4 ip-10-0-0-7"),
        ("[1-2]", "1 2"),
        ("", ""),
    ],
)
def test_slurms_lists_of_nodes_are_taken_apart(text: str, expected: str) -> None:
    assert list(hosts(text)) == expected.split()


@pytest.mark.parametrize("text", ["n[1", "n1]", "n[1-]", "n[a-b]", "n[3-1]", "n[[1]]", "n[]", "n]1["])
def test_what_is_no_list_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a Slurm node list"):
        list(hosts(text))


NAME = st.from_regex(r"[a-z][a-z0-9-]{0,6}[a-z-]", fullmatch=True)


@given(
    st.lists(st.tuples(NAME, st.lists(st.integers(0, 999), min_size=1, max_size=4), st.integers(1, 4)), min_size=1, max_size=4)
)
def test_a_list_that_is_put_together_comes_apart_again(groups: list[tuple[str, list[int], int]]) -> None:
    text = ",".join(f"{name}[{','.join(f'{n:0{width}d}' for n in numbers)}]" for name, numbers, width in groups)
    assert list(hosts(text)) == [f"{name}{n:0{width}d}" for name, numbers, width in groups for n in numbers]


@given(NAME, st.integers(0, 2000), st.integers(0, 50), st.integers(1, 5))
def test_a_range_holds_every_number_at_its_width(name: str, first: int, more: int, width: int) -> None:
    low = f"{first:0{width}d}"
    assert list(hosts(f"{name}[{low}-{first + more:0{width}d}]")) == [
        f"{name}{n:0{len(low)}d}" for n in range(first, first + more + 1)
    ]


# ---- where ranks meet -------------------------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that begin with ``n`` resolve."""

    def resolve(name: str, *_: Any) -> list[int]:
        if not name.startswith("n"):
            raise socket.gaierror("unknown")
        return [1]

    monkeypatch.setattr(module.socket, "getaddrinfo", resolve)


@pytest.mark.usefixtures("names")
def test_rank_0_is_on_the_first_node_of_the_step_and_not_where_srun_was_typed() -> None:
    login = {"SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1"}
    several = {"SLURM_STEP_NODELIST": "n[07-09]", "SLURM_STEP_NUM_NODES": "3", **login}
    assert RankEnvironment.read(step(6, **several)).address == "n07"
    one = {"SLURM_STEP_NODELIST": "n07", "SLURM_STEP_NUM_NODES": "1", **login}
    assert RankEnvironment.read(step(2, **one)).address == "127.0.0.1"
    assert RankEnvironment.read(step(2, SLURM_STEP_NODELIST="n07", **login)).address == "127.0.0.1"
    assert RankEnvironment.read(step(6, **several, MASTER_ADDR="10.1.1.1")).address == "10.1.1.1"
    unresolved = {"SLURM_STEP_NODELIST": "x[1-2]", "SLURM_STEP_NUM_NODES": "2", **login}
    assert RankEnvironment.read(step(2, **unresolved)).address == "192.0.2.1"
    assert RankEnvironment.read(step(6, **several, FOVEA_ATTEMPT="0")).address == "192.0.2.1"  # srun was typed by the attendant
    with pytest.raises(LaunchError, match="the address of rank 0 is unknown"):
        RankEnvironment.read(step(2, SLURM_STEP_NUM_NODES="2"))


def test_each_step_has_a_port_of_its_own_that_all_its_ranks_know() -> None:
    def port(**more: str) -> int:
        return RankEnvironment.read(step(2, SLURM_STEP_NUM_NODES="1", **more)).port

    ports = {port(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(number)) for job in range(10) for number in range(4)}
    assert len(ports) > 35 and all(61001 <= one <= 65535 for one in ports)
    assert port() == port(SLURM_PROCID="1", SLURM_LOCALID="1")
    assert port() != port(SLURM_RESTART_COUNT="1")
    assert port(MASTER_PORT="29501") == 29501


def test_a_single_task_meets_itself_without_any_address() -> None:
    place = RankEnvironment.read(step(1, SLURM_LAUNCH_NODE_IPADDR="192.0.2.1", SLURM_STEP_NODELIST="away[1"))
    assert (place.address, place.port) == ("127.0.0.1", 0)
    world = join(rank=0, size=1, local_rank=0, address="192.0.2.1", port=0, key="k", backend="gloo", timeout=20)
    try:
        assert world.size == 1
    finally:
        import torch.distributed as dist

        dist.destroy_process_group()


# ---- how many are started ---------------------------------------------------------------------------------------------------


def start(environment: dict[str, str], wanted: int | None, **more: Any) -> int:
    return ranks_to_start(
        RankEnvironment.read(environment), wanted, where="launch.num_processes", environment=environment, **more
    )


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpus", lambda env: visible(8, env.get("CUDA_VISIBLE_DEVICES")))


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456"}


@pytest.mark.usefixtures("eight")
def test_alone_a_rank_is_started_on_each_visible_gpu_and_never_more() -> None:
    assert start({}, None) == 8
    assert start({}, 3) == 3
    assert start({"CUDA_VISIBLE_DEVICES": "2,5"}, None) == 2
    assert start({"CUDA_VISIBLE_DEVICES": ""}, None) == 1
    assert start({"CUDA_VISIBLE_DEVICES": ""}, 4) == 4  # on the CPU as many as one likes
    assert start({}, 12, on_cpu=True) == 12
    assert start({}, None, on_cpu=True) == 1
    with pytest.raises(LaunchError, match=r"launch.num_processes = 3, but 2 GPUs are visible \(CUDA_VISIBLE_DEVICES='2,5'\)"):
        start({"CUDA_VISIBLE_DEVICES": "2,5"}, 3)


@pytest.mark.parametrize(
    ("environment", "wanted", "names"),
    [
        (step(1), 2, "SLURM_STEP_NUM_TASKS=1"),
        (step(4, SLURM_STEP_NUM_NODES="1"), 2, "SLURM_STEP_NUM_TASKS=4"),
        (TORCHRUN, 2, "WORLD_SIZE=1"),
        ({**TORCHRUN, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 8, "WORLD_SIZE=4"),
    ],
)
def test_a_contradiction_between_launcher_and_settings_is_refused_with_both(
    environment: dict[str, str], wanted: int, names: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        start(environment, wanted)
    assert f"launch.num_processes = {wanted}" in str(caught.value) and names in str(caught.value)
    assert "launch.num_processes=null" in caught.value.hint
    size = int(environment.get("WORLD_SIZE") or environment["SLURM_STEP_NUM_TASKS"])
    assert start(environment, size) == start(environment, None) == 0
    assert start({**environment, "FOVEA_ATTEMPT": "0"}, wanted) == 0  # the cluster's profile has decided


def test_a_number_that_comes_with_fovea_gives_way_to_a_launcher_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    four = {**TORCHRUN, "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    for environment, who in ((four, "torchrun"), (step(4, SLURM_STEP_NUM_NODES="1"), "slurm")):
        assert start(environment, 2, default="configs/a.yaml:5:3") == 0
        told = capsys.readouterr().err
        assert (
            told
            == f"fovea: {who} started 4 ranks; launch.num_processes = 2 of configs/a.yaml:5:3 is for starts without a launcher\n"
        )
        with pytest.raises(LaunchError):
            start(environment, 2)
    assert start({**four, "RANK": "1", "LOCAL_RANK": "1"}, 2, default="x") == 0
    assert capsys.readouterr().err == ""  # one rank says it
    with pytest.raises(LaunchError, match="rank 0 of 8"):  # what an old job left in a shell is no launcher
        start({**TORCHRUN, "WORLD_SIZE": "8"}, 2, default="x")


def test_a_number_that_comes_with_fovea_gives_way_to_fewer_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "gpus", lambda env: 1)
    assert start({}, 2, default="configs/a.yaml:5:3") == 1
    assert "1 rank, one a visible GPU, instead of launch.num_processes = 2 of configs/a.yaml:5:3" in capsys.readouterr().err
    with pytest.raises(LaunchError, match="1 GPU is visible"):
        start({}, 2)


def test_a_shell_of_slurm_on_a_node_without_gpus_starts_the_ranks() -> None:
    assert start(step(1, SLURM_PTY_PORT="40000"), 2, on_cpu=True) == 2


@pytest.mark.usefixtures("eight")
def test_one_task_of_slurm_with_several_gpus_starts_a_rank_on_each() -> None:
    assert start(step(1), None) == 8
    assert start(step(1), 8) == 8
    assert start(step(1), 4) == 4
    assert start(step(1), 1) == 0
    assert start(step(1, CUDA_VISIBLE_DEVICES="3"), None) == 0
    with pytest.raises(LaunchError, match=r"launch\.num_processes = 9"):
        start(step(1), 9)


@pytest.mark.usefixtures("eight")
def test_one_process_of_torchrun_leaves_gpus_idle_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert start(TORCHRUN, None) == 0
    assert "7 of 8 GPUs stay idle" in capsys.readouterr().err
    assert start({**TORCHRUN, "CUDA_VISIBLE_DEVICES": "1"}, None) == 0
    assert capsys.readouterr().err == ""


def test_an_interactive_step_of_several_tasks_and_mpi_are_refused() -> None:
    with pytest.raises(LaunchError, match="task 0 of 2 of an interactive step"):
        start(step(2, SLURM_PTY_PORT="40000", SLURM_STEP_NUM_NODES="1"), None)
    assert start(step(1, SLURM_PTY_PORT="40000"), None) == 0
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        with pytest.raises(LaunchError, match=f"4 processes were started by MPI \\({name}\\)"):
            start({name: "4"}, None)
        assert start({name: "1"}, None) >= 1
    assert start({**TORCHRUN, "PMI_SIZE": "4"}, None) == 0


# ---- GPUs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        (None, 8),
        ("0", 1),
        ("0,1", 2),
        (" 3 , 1", 2),
        ("7", 1),
        ("8", 0),
        ("0,8,1", 1),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("0,0", 0),
        ("NoDevFiles", 0),
        ("GPU-1234", 1),
        ("GPU-12,GPU-34", 2),
        ("GPU-12,GPU-12", 0),
        ("GPU-12,1", 1),
        ("MIG-aa", 1),
        ("MIG-aa,MIG-bb", 1),
        ("MIG-GPU-aa/1/0", 1),
        ("NoDevFiles", 0),
        (",".join(map(str, range(8))), 8),
    ],
)
def test_gpus_are_counted_as_cuda_shows_them(chosen: str | None, count: int) -> None:
    assert visible(8, chosen) == count
    assert visible(0, chosen) == 0
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


@given(st.lists(st.integers(0, 7), unique=True, max_size=8))
def test_numbers_are_counted(numbers: list[int]) -> None:
    assert visible(8, ",".join(map(str, numbers))) == len(numbers)


def test_a_rank_has_a_gpu_of_its_own() -> None:
    assert [gpu_of(rank, 4, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_of(rank, 4, 1) for rank in range(4)] == [0] * 4  # each is shown another one
    with pytest.raises(LaunchError, match="local rank 2 has no GPU of its own: 4 ranks run on this node, but 2 GPUs are visible"):
        gpu_of(2, 4, 2)


def test_a_rank_that_sees_no_gpu_where_rank_0_does_is_refused() -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    for rank in (0, 1):
        check_backends(store, "nccl", rank)
    with pytest.raises(LaunchError, match="rank 2 would use gloo and rank 0 nccl: only one of them sees GPUs"):
        check_backends(store, "gloo", 2)


def test_ranks_that_share_a_gpu_are_refused() -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    for rank, own in enumerate(("a 0 GPU-1", "a 0 GPU-2", "b 0 GPU-1", "b 0 GPU-1")):
        store.set(str(rank), own)
    check_gpus(store, "a 0 GPU-1", 0, range(2))
    check_gpus(store, "a 0 GPU-2", 1, range(2))
    with pytest.raises(LaunchError, match=r"ranks 2 and 3 would share a GPU \(b 0 GPU-1\)"):
        check_gpus(store, "b 0 GPU-1", 3, range(2, 4))


def test_ranks_of_torchrun_without_a_port_are_refused_at_once() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "0"}
    with pytest.raises(LaunchError, match="MASTER_PORT is 0"):
        RankEnvironment.read(given)
