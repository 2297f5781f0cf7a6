"""One rank of several that do not exist: torch's ``fake`` process group in place of NCCL and gloo, its collectives counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg

from tests.helpers.standin.recorder import Recorder

_COUNTED = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "reduce", "broadcast"),
    *("all_gather_single", "reduce_scatter_single", "all_to_all_single", "all_gather_coalesced", "barrier"),
)


class _Done:
    """A collective that has already ended."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _Store(dist.Store):
    """What other ranks would have written: they use NCCL, and each has a GPU of its own."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        return b"nccl" if "backends" in key else b"another GPU"


def install(recorder: Recorder) -> None:
    """Makes later process groups fake ones, whatever their backend: collectives leave their tensors as they are.

    Objects are gathered as if every rank had this one's. To be called before anything is imported from ``torch.distributed``.
    """
    from pipeline.runtime import process_group

    init, new_group = dist.init_process_group, dist.new_group

    def fake_init(backend: str, *, rank: int, world_size: int, **_: Any) -> None:
        init("fake", rank=rank, world_size=world_size, store=fake_pg.FakeStore())

    def fake_group(*arguments: Any, **options: Any) -> Any:
        return new_group(*arguments, **{name: value for name, value in options.items() if name not in ("backend", "timeout")})

    def gather_objects(everyone: list[Any], own: Any, group: Any = None) -> None:
        everyone[:] = [own] * len(everyone)

    def gather(everyone: list[torch.Tensor], own: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if own.device.type == "cpu":  # numbers that the host decides on
            for tensor in everyone:
                tensor.copy_(own)
            return None
        return original_gather(everyone, own, group=group, async_op=async_op)

    def gather_flat(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        return _Done() if async_op else None  # the fake one copies this rank's part once for every rank, with a launch each

    original_gather = dist.all_gather
    replaced: dict[str, Any] = {
        "init_process_group": fake_init,
        "new_group": fake_group,
        "all_gather_object": gather_objects,
        "broadcast_object_list": lambda *_, **__: None,
        "all_gather": gather,
        "all_gather_into_tensor": gather_flat,
        "all_gather_single": gather_flat,
    }
    for name, function in replaced.items():
        setattr(dist, name, function)
    for name in _COUNTED:
        if hasattr(dist, name):
            setattr(dist, name, _counted(recorder, name, getattr(dist, name)))
    process_group._meet = lambda *_, **__: _Store()  # type: ignore[assignment]


def _counted(recorder: Recorder, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
        own = tensors[-1] if tensors else None  # of gathers the last is this rank's
        dtype, device, size = ("", "", 0) if own is None else (str(own.dtype), own.device.type, own.nbytes)
        recorder.collective(name, dtype.removeprefix("torch."), device, size)
        return function(*arguments, **options)

    return wrapped
