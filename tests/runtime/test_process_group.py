"""Ranks meet, and meet again where an earlier set of them broke off; who cannot meet is told so."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.errors import LaunchError
from pipeline.runtime import process_group as distributed
from tests.helpers.limits import hang_limit


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _meet(rank: int, port: int, key: str, folder: str, leave: bool) -> None:
    torch.set_num_threads(1)
    world = distributed.join(
        rank=rank, size=2, local_rank=rank, address="127.0.0.1", port=port, key=key, backend="gloo", timeout=20
    )
    number = torch.tensor([rank + 1])
    dist.all_reduce(number, group=world.control)
    Path(folder, f"{key}-{rank}").write_text(f"{world.rank} {world.size} {world.device.type} {int(number)}")
    if not leave:
        os._exit(0)
    distributed.leave()


@pytest.mark.slow
def test_ranks_meet_and_others_meet_where_they_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # it stays, as torchrun's own does
    told_by_torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_PORT": str(port)}
    for name, value in told_by_torchrun.items():
        monkeypatch.setenv(name, value)
    for key, leave in (("job.0", False), ("job.1", True)):
        mp.start_processes(_meet, args=(port, key, str(tmp_path), leave), nprocs=2, start_method="spawn")
        for rank in range(2):
            assert (tmp_path / f"{key}-{rank}").read_text() == f"{rank} 2 cpu 3"
    del store


def _meet_as_many(rank: int, port: int, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    distributed._MESH = 1
    place = {"address": "127.0.0.1", "port": port, "key": "k", "backend": "gloo", "timeout": 60.0}
    world = distributed.join(rank=rank, size=3, local_rank=rank, **place)
    number = torch.tensor([rank + 1])
    dist.all_reduce(number, group=world.control)
    every: list[object] | None = [None] * 3 if rank == 0 else None
    dist.gather_object(rank, every, group=world.control)
    soft, lazy = resource.getrlimit(resource.RLIMIT_NOFILE)[0], os.environ["TORCH_GLOO_LAZY_INIT"]
    Path(folder, str(rank)).write_text(f"{int(number)} {every} {soft} {lazy}")
    distributed.leave()


@pytest.mark.slow
def test_many_ranks_connect_when_they_have_something_to_send_and_may_open_enough_files(tmp_path: Path) -> None:
    mp.start_processes(_meet_as_many, args=(free_port(), str(tmp_path)), nprocs=3, start_method="spawn")
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["6 [0, 1, 2] 1036 1", *["6 None 1036 1"] * 2]


def test_a_taken_port_a_missing_master_and_nccl_without_a_gpu_are_told() -> None:
    place = {"size": 2, "address": "127.0.0.1", "key": "job", "timeout": 1.5, "backend": "gloo"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match="rank 0 of 2 could not connect to the others") as caught:
            distributed.join(rank=0, local_rank=0, port=port, **place)
        assert str(port) in caught.value.where
    # Without the timeout of 1.5 s it would wait for torch's 300.
    with hang_limit(200), pytest.raises(LaunchError, match="rank 1 of 2 could not connect to the others"):
        distributed.join(rank=1, local_rank=1, port=free_port(), **place)
    if not torch.cuda.is_available():
        with pytest.raises(LaunchError, match="NCCL needs a GPU"):
            distributed.join(rank=0, local_rank=0, port=1, **{**place, "backend": "nccl"})
    assert not dist.is_initialized()


def _listeners(rank: int, port: int, folder: str) -> None:
    import psutil

    world = distributed.join(
        rank=rank, size=2, local_rank=rank, address="127.0.0.1", port=port, key="k", backend="gloo", timeout=60
    )
    dist.barrier(group=world.control)
    found = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    Path(folder, f"{rank}").write_text(" ".join(found))
    distributed.leave()


@pytest.mark.slow
def test_ranks_of_one_machine_listen_on_its_loopback_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    mp.start_processes(_listeners, args=(free_port(), str(tmp_path)), nprocs=2, start_method="spawn")
    addresses = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert addresses[0] and {address for row in addresses for address in row} == {"127.0.0.1"}
