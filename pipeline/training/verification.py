"""Finds silent corruption: does one step in N twice on every rank, from the same state, and compares both, bit for bit.

A verified step: digests of batch, weights, moments and buffers; a copy of what the step changes; the step; the copy is put
back; the step again, which is the one that counts. What a rank computes alone is compared before what it receives from others, so
that the first difference names the rank. The state is also digested when the step before ends, so that a bit that flips in memory
between the steps is found, and compared between the ranks that hold copies of it.

Both passes draw the same random numbers and end in the same bits, so that a run is the same with and without verification. On a
GPU this takes deterministic operations.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.augment.views import Batch
from pipeline.errors import CorruptionError
from pipeline.methods.base import Method, Step
from pipeline.runtime.process_group import World
from pipeline.training.applied import Applied
from pipeline.training.engine import Engine
from pipeline.training.signatures import sample_digests
from pipeline.training.zero_layouts import piece_of

StepResult = tuple[dict[str, Tensor], Applied, dict[str, Tensor]]
TrainStep = Callable[[Step, list[Batch]], StepResult]
Digests = dict[str, int]

# In the order of cause and effect: what only one rank can have done comes before what other ranks see of it.
STAGES = (
    "pixels, tokens or masks",
    "memory between two steps",
    "copies on other ranks",
    "the copy that was put back",
    "memory during the forward and backward pass",
    "loss terms",
    "gradients of this rank",
    "gradients summed over the ranks",
    "optimizer step",
    "weights after the step",
    "teacher, buffers or other state after the step",
)
_PIXELS, _BETWEEN, _COPIES, _RESTORED, _DURING, _TERMS, _OWN, _SUMMED, _OPTIMIZER, _WEIGHTS, _REST = range(len(STAGES))
_COLUMNS = 1 << 10
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd; multiples of it modulo 2**64 are spread evenly
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 3  # tensors of a message


@dataclass(frozen=True)
class Finding:
    """What differed first on a rank.

    Attributes:
        stage: index of :data:`STAGES`.
        names: tensors, loss terms or samples that differ.
    """

    stage: int
    names: tuple[str, ...]


@dataclass
class _Pass:
    """Digests of one execution of a step: memory before the optimizer step, terms, gradients, and the state after it."""

    memory: Digests = field(default_factory=dict)
    terms: Digests = field(default_factory=dict)
    own: dict[str, list[Tensor]] = field(default_factory=dict)
    summed: Digests = field(default_factory=dict)
    after: Digests = field(default_factory=dict)


class Verification:
    """Verifies steps of one rank together with all other ranks.

    Args:
        engine: the engine.
        method: its method.
        world: this rank's position in the process group.
        every: steps from one verified step to the next.

    Attributes:
        verified: number of steps that were verified.
    """

    def __init__(self, engine: Engine, method: Method, world: World, every: int) -> None:
        self.engine, self.method, self.world, self.every = engine, method, world, every
        self.verified = 0
        self._rest: tuple[int, Digests] | None = None

    def due(self, step: int) -> bool:
        """Whether a step, by its number, is verified."""
        return (step + 1) % self.every == 0

    def digest_state(self, following: int) -> None:
        """Digests the state at the end of a step, if the ``following`` one is verified."""
        self._rest = (following, self._digests()) if self.due(following) else None

    def forget(self) -> None:
        """Called when a checkpoint has replaced the state."""
        self._rest = None

    def twice(self, step: Step, batches: list[Batch], train_step: TrainStep) -> StepResult:
        """Does a step twice and returns the second result; collective.

        Args:
            step: the step's number and schedules.
            batches: this rank's micro-batches.
            train_step: does a step on them.

        Raises:
            CorruptionError: on all ranks, if anything differed on any; names the rank and its node.
        """
        pixels, before = _samples(batches), self._digests()
        findings = []
        if self._rest is not None and self._rest[0] == step.index:
            findings += _differing(_BETWEEN, self._rest[1], before)
        self._rest = None
        findings += self._unlike_copies(before)
        saved, steps, random = self._copied(), self.engine.optimizer_steps(), _random_state(self.world.device)
        _, first = self._observed(step, batches, train_step)
        findings += _differing(_PIXELS, pixels, _samples(batches))
        self._put_back(saved, steps)
        _set_random_state(self.world.device, random)
        # Weights, which other ranks may have sent, are compared after them, before the optimizer step.
        findings += _differing(_RESTORED, _without_weights(before), _without_weights(self._digests()))
        result, second = self._observed(step, batches, train_step)
        findings += _differing(_PIXELS, pixels, _samples(batches))
        findings += [one for each in (first, second) for one in _differing(_DURING, before, each.memory, partly=True)]
        findings += _differing(_TERMS, first.terms, second.terms)
        findings += _differing(_OWN, _numbers(first.own), _numbers(second.own))
        findings += _differing(_SUMMED, first.summed, second.summed)
        findings += _differing_state(first.after, second.after)
        self._agree(step, min(findings, key=lambda one: one.stage, default=None))
        self.verified += 1
        return result

    def _observed(self, step: Step, batches: list[Batch], train_step: TrainStep) -> tuple[StepResult, _Pass]:
        seen, observer = _Pass(), self.engine.observe_gradients

        def observe(now: Step, gradients: list[tuple[str, Tensor]]) -> None:
            seen.memory = _digested(dict(self._constant()))
            names = self.engine.names_of(self.engine.layout.gradients())
            seen.summed = _digested({f"gradient/{name}": gradient for name, gradient in names})
            if observer is not None:
                observer(now, gradients)

        hooks = [
            p.register_hook(lambda gradient, name=name: seen.own.setdefault(name, []).append(digest(gradient)))
            for name, p in self.method.named_parameters()
            if p.requires_grad
        ]
        self.engine.observe_gradients = observe
        try:
            result = train_step(step, batches)
        finally:
            self.engine.observe_gradients = observer
            for hook in hooks:
                hook.remove()
        seen.terms = _digested(result[0])
        seen.after = self._digests()
        return result, seen

    # ---- the state of this rank -------------------------------------------------------------------------------------------

    def _constant(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that only the optimizer step and what follows it change, by kind and name, ``[elements]``."""
        known = set()
        for f in self.engine.held():
            known.add(f.master.data_ptr())
            yield f"master/{f.name}", f.master
            for moment, tensor in f.moments.items():
                yield f"{moment}/{f.name}", tensor
        for name, p in self.method.named_parameters():
            held = _held(p)
            if held is not None and held.data_ptr() not in known:  # in stage 0 the weights are the masters
                yield f"weight/{name}", held
        for kind, module in (("teacher", self.method.teacher), ("start", self.method.start)):
            for name, weight in module.named_parameters() if module is not None else ():
                if (own := _held(weight)) is not None:
                    yield f"{kind}/{name}", own

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that a forward pass may change: buffers, and the method's extra state."""
        yield from ((f"buffer/{name}", tensor) for name, tensor in self.method.named_buffers())
        if self.method.teacher is not None:
            yield from ((f"teacher_buffer/{name}", tensor) for name, tensor in self.method.teacher.named_buffers())
        yield from ((f"memory/{name}", tensor) for name, tensor in self.method.extra_state.items())

    def _digests(self) -> Digests:
        steps = {f"steps/{number}": int(count) for number, count in enumerate(self.engine.optimizer_steps())}
        return _digested(dict([*self._constant(), *self._changing()])) | steps

    def _copied(self) -> dict[str, Tensor]:
        """Copies of what a step changes, in host memory. Trained weights follow from the masters."""
        fixed = {f"start/{name}" for name, _ in (self.method.start.named_parameters() if self.method.start is not None else ())}
        fixed |= {
            f"weight/{name}"
            for name, p in self.method.named_parameters()
            if p.requires_grad or name in self.method.constant_names
        }
        kept = {name: tensor for name, tensor in (*self._constant(), *self._changing()) if name not in fixed}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in kept.items()}

    @torch.no_grad()
    def _put_back(self, saved: Mapping[str, Tensor], steps: list[float]) -> None:
        for name, tensor in (*self._constant(), *self._changing()):
            if (kept := saved.get(name)) is None:
                continue
            kind, _, inner = name.partition("/")
            if kind == "memory" and (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
                self.method.extra_state[inner] = kept.to(tensor.device)
            else:
                tensor.detach().copy_(kept)
        if steps:
            self.engine.set_optimizer_steps(int(steps[0]))
        self.engine.refresh()

    # ---- all ranks together -----------------------------------------------------------------------------------------------

    def _unlike_copies(self, state: Digests) -> list[Finding]:
        """Compares what several ranks hold whole; a rank whose copy is not that of most others has the difference."""
        stage = self.engine.options.zero
        kinds = {0: ("master", "exp_avg", "exp_avg_sq", "momentum_buffer", "weight", "teacher")}.get(stage, ("weight", "teacher"))
        if stage == 3 or self.world.size == 1:
            return []
        own = {name: number for name, number in state.items() if name.partition("/")[0] in kinds}
        sums: list[int] = [0] * self.world.size
        dist.all_gather_object(sums, hash(tuple(sorted(own.values()))), group=self.world.control)
        if len(set(sums)) == 1:
            return []
        every: list[Digests] = [{}] * self.world.size
        dist.all_gather_object(every, own, group=self.world.control)
        names = []
        for name, number in own.items():
            numbers = Counter(digests.get(name) for digests in every)
            if len(numbers) > 1 and numbers[number] <= self.world.size // 2:
                names.append(name)
        return [Finding(_COPIES, tuple(names))] if names else []

    def _agree(self, step: Step, finding: Finding | None) -> None:
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        gathered: list[tuple[str, Finding | None]] = [(node, None)] * self.world.size
        dist.all_gather_object(gathered, (node, finding), group=self.world.control)
        stages = [one.stage for _, one in gathered if one is not None]
        if not stages:
            return
        stage = min(stages)
        blamed = {rank: one for rank, (_, one) in enumerate(gathered) if one is not None and one.stage == stage}
        raise corruption(step.index, stage, blamed, [at for at, _ in gathered])


def corruption(step: int, stage: int, blamed: Mapping[int, Finding], nodes: list[str]) -> CorruptionError:
    """The error of a step that was not the same twice.

    Args:
        step: its number.
        stage: index of :data:`STAGES` of the first difference.
        blamed: what differed on the ranks where that stage did.
        nodes: the node of each rank.
    """
    names = next(iter(blamed.values())).names
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    where = {nodes[rank] for rank in blamed}
    ranks = ", ".join(f"{rank} on {nodes[rank]}" for rank in list(blamed)[:8]) + (", …" if len(blamed) > 8 else "")
    several = "one of the ranks" if len(blamed) > 1 else "rank"
    return CorruptionError(
        f"step {step} was not the same twice: {STAGES[stage]} differed ({', '.join(names[:_NAMED])}{more})",
        where=f"{several} {ranks}",
        hint="Check memory and accelerator of that machine; the same command resumes from the last checkpoint",
        node=where.pop() if len(where) == 1 else "",
        rank=next(iter(blamed)) if len(blamed) == 1 else None,
    )


def digest(tensor: Tensor) -> Tensor:
    """An int64 scalar of a tensor's exact bits. A single flipped bit always changes it: it adds an odd multiple of a power of 2
    modulo 2**64.
    """
    flat = tensor.detach().reshape(-1)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.element_size()])
    weights = torch.arange(_COLUMNS, device=flat.device) * 2 * _GOLDEN | 1
    each = 8 // flat.element_size()  # eight bytes at a time: ten times as fast on a CPU
    if flat.storage_offset() % each == 0:
        even = flat.numel() // each * each
        flat, tail = flat[:even].view(torch.int64), flat[even:].long()
    else:
        tail = flat[:0].long()
    rows = flat.numel() // _COLUMNS
    table = flat[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0, dtype=torch.int64)
    rest = flat[rows * _COLUMNS :].long()
    return (table * weights).sum() + (rest * weights[: len(rest)]).sum() + (tail * weights[: len(tail)]).sum()


def _digested(tensors: Mapping[str, Tensor]) -> Digests:
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    numbers: Digests = {}
    for names in by_device.values():
        numbers |= dict(zip(names, torch.stack([digest(tensors[name]) for name in names]).tolist(), strict=True))
    return numbers


def _numbers(digests: Mapping[str, list[Tensor]]) -> Digests:
    """Digests of the gradients of all micro-batches, in their order."""
    return {f"{name}, micro-batch {at}": int(one) for name, each in digests.items() for at, one in enumerate(each)}


def _samples(batches: list[Batch]) -> Digests:
    numbers = [sample_digests(batch).tolist() for batch in batches]
    keys = [f"{key} (micro-batch {at}, sample {row})" for at, batch in enumerate(batches) for row, key in enumerate(batch.keys)]
    return dict(zip(keys, [one for each in numbers for one in each], strict=True))


def _without_weights(state: Digests) -> Digests:
    return {name: number for name, number in state.items() if not name.startswith("weight/")}


def _differing(stage: int, before: Digests, now: Digests, *, partly: bool = False) -> list[Finding]:
    """``partly`` if ``before`` has further entries."""
    names = [name for name in now if before.get(name) != now[name]] + ([] if partly else [n for n in before if n not in now])
    return [Finding(stage, tuple(names))] if names else []


def _differing_state(first: Digests, second: Digests) -> list[Finding]:
    stages = {"weight": _WEIGHTS, "start": _WEIGHTS} | dict.fromkeys(("teacher", "teacher_buffer", "buffer", "memory"), _REST)
    names: dict[int, list[str]] = {}
    for name in [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]:
        names.setdefault(stages.get(name.partition("/")[0], _OPTIMIZER), []).append(name)
    return [Finding(stage, tuple(sorted(each))) for stage, each in names.items()]


def _held(parameter: Any) -> Tensor | None:
    """This rank's memory of a parameter, without padding; ``None`` if it has no part of it."""
    if not hasattr(parameter, "ds_tensor"):
        unsharded: Tensor = parameter.detach()
        return unsharded
    _, length = piece_of(parameter)
    piece: Tensor = parameter.ds_tensor.narrow(0, 0, max(length, 0))
    return piece if length > 0 else None


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
