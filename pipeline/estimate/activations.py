"""Activation memory: bytes that a forward pass keeps for its backward pass, counted on fake tensors.

The method's own forward pass runs on fake tensors, with fused attention and a GPU's dtypes, while the storages are counted
from creation until they are freed. Two batch sizes separate what is proportional to the samples from what is constant per
step.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pipeline.config.schema import Config
from pipeline.estimate.flops import fake_batch, round_to_groups
from pipeline.methods.base import Method, Step
from pipeline.methods.registry import build_method


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations create and that are not yet freed; inputs are not counted.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in _storages((args, kwargs)):  # a view of a weight is not new memory
            self._count(argument, made=False)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._count(storage, made=True)
        return result

    def _count(self, storage: torch.UntypedStorage, *, made: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if made else 0
        self.now += self._known[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on a GPU, without the savings of ``train.compile``.

    Attributes:
        fixed: kept independently of the batch size, such as the gradient of the prototypes.
        each: kept per sample.
        passing: temporary memory on top of that before the loss is computed, such as a chunk of logits.
    """

    fixed: float
    each: float
    passing: float

    def of(self, samples: int) -> float:
        """Upper bound for this number of samples."""
        return self.fixed + self.each * samples + self.passing


_SAMPLES = 8


def counted(config: Config) -> Activations:
    """Activation memory of the method; if steps use views of several sizes, the maximum over these.

    Captions count with their maximum number of tokens. Terms quadratic in the batch size, such as logits of pairs, are left
    out.
    """
    largest = max((_counted(config, number) for number in range(len(_method(config).all_view_sets))), key=lambda one: one.each)
    if not config.train.activation_checkpointing:
        return largest
    # The block that is being recomputed holds at that time what all blocks would have held.
    unrecomputed = counted(config.replace(train=config.train.model_copy(update={"activation_checkpointing": False})))
    blocks = max(len(getattr(m, "blocks", ())) for m in _method(config).modules())
    return Activations(largest.fixed, largest.each + (unrecomputed.each - largest.each) / max(blocks, 1), largest.passing)


def _counted(config: Config, number: int) -> Activations:
    few = round_to_groups(config, _SAMPLES)
    (kept, _), (more, peak) = (alive(config, samples, number) for samples in (few, 2 * few))
    each = (more - kept) / few
    return Activations(max(kept - each * few, 0.0), each, peak - more)


def alive(config: Config, samples: int, number: int = 0) -> tuple[int, int]:
    """Bytes alive when the losses of a batch of fake tensors are computed, and the peak before, excluding weights and views."""
    method = _method(config)
    for module in (*method.modules(), *_teachers(method)):
        if hasattr(module, "checkpointing"):
            module.checkpointing = config.train.activation_checkpointing  # type: ignore[assignment]
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
    with FakeTensorMode(allow_non_fake_inputs=True), bf16:
        for network in (method, *(method.teacher.modules.values() if method.teacher is not None else ())):
            network.to_empty(device="cpu")
        method.extra_state = {name: torch.empty_like(tensor, device="cpu") for name, tensor in method.extra_state.items()}
        context = method.text.context if method.text else 0
        batch = fake_batch(method.all_view_sets[number].views, samples, context=context)
        with mock.patch.dict(os.environ, {"FOVEA_KERNELS": "torch"}), Alive() as tracker:
            with torch.no_grad():
                method.before_accumulation([batch], Step())
            terms = method(batch, Step())
            kept = tracker.now
        del terms
    return kept, tracker.peak


def _method(config: Config) -> Method:
    with torch.device("meta"):
        return build_method(config).train()


def _teachers(method: Method) -> Iterator[torch.nn.Module]:
    for network in method.teacher.modules.values() if method.teacher is not None else ():
        yield from network.modules()
