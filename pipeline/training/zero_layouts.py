"""DeepSpeed's memory layout of parameters, gradients and optimizer state for each ZeRO stage.

A *fragment* is the piece of one parameter that one rank owns. Every element of every trainable parameter is in exactly one rank's
fragments, whatever the stage. DeepSpeed's private attributes are used only here and in ``engine.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from pipeline.checkpoint.fragments import Fragment
from pipeline.training.optimizers import Segment

ADAM = ("exp_avg", "exp_avg_sq")


class Layout(ABC):
    """Interface of a ZeRO stage for the engine."""

    @abstractmethod
    def owned(self, *, gradients: bool = False) -> Iterator[tuple[Tensor, Fragment]]:
        """This rank's fragments with their parameters, in the order of the parameter groups."""

    @abstractmethod
    def held(self) -> Iterator[tuple[Tensor, Fragment]]:
        """Everything this rank needs when a checkpoint is loaded: its fragments, or more."""

    @abstractmethod
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters with all gradient memory of this rank that the optimizer reads; this memory is scaled for clipping."""

    def gradient_shares(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters with the gradients of this rank's fragments only, so that every element is on one rank."""
        return self.gradients()

    def _of_fragments(self) -> list[tuple[Tensor, Tensor]]:
        return [(p, f.gradient) for p, f in self.owned(gradients=True) if f.gradient is not None]

    @abstractmethod
    def flats(self) -> list[Tensor]:
        """The tensors for which the optimizer has states."""

    def segments(self) -> dict[int, list[Segment]]:
        """For the ``id`` of each of :meth:`flats`, the pieces of parameters that it holds."""
        numbers = {id(p): number for number, p in enumerate(self.order())}
        starts = [(flat.data_ptr(), flat.data_ptr() + flat.numel() * flat.element_size(), flat) for flat in self.flats()]
        segments: dict[int, list[Segment]] = {id(flat): [] for _, _, flat in starts}
        for p, fragment in self.held():
            at, length = fragment.master.data_ptr(), fragment.master.numel()
            for low, high, flat in starts:
                if low <= at < high:
                    segments[id(flat)].append(Segment(numbers[id(p)], (at - low) // flat.element_size(), length))
        return segments

    @abstractmethod
    def order(self) -> Sequence[Tensor]:
        """All trainable parameters, in an order that is the same on all ranks."""

    @abstractmethod
    def parts(self) -> dict[str, list[Tensor]]:
        """Persistent memory of this rank by purpose: ``parameters``, ``gradients``, ``masters``, ``moments``."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the masters to the forward weights, after the masters were written."""

    @abstractmethod
    def drop(self) -> None:
        """Make the next optimizer step a no-op."""

    @abstractmethod
    def clean(self) -> None:
        """After a step, zero persistent gradient memory, so that stale gradients are not applied again."""


class Zero0Layout(Layout):
    """Stage 0: every rank has every parameter, gradient and moment; by convention it owns an equal share of each."""

    def __init__(self, engine: Any, parameters: Sequence[Tensor], names: dict[int, str], moments: tuple[str, ...] = ADAM) -> None:
        self._moments = moments
        self._engine, self._parameters, self._names = engine, parameters, names
        self._optimizer = engine.optimizer
        for p in parameters:
            self._optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
            self._optimizer.state[p].update({moment: torch.zeros_like(p) for moment in moments})

    @override
    def owned(self, *, gradients: bool = False) -> Iterator[tuple[Tensor, Fragment]]:
        rank, world = dist.get_rank(), dist.get_world_size()
        for p in self._parameters:
            share = -(-p.numel() // world)
            start = min(rank * share, p.numel())
            length = min(share, p.numel() - start)
            if length:
                yield p, self._piece(p, start, length, gradients)

    @override
    def held(self) -> Iterator[tuple[Tensor, Fragment]]:
        for p in self._parameters:
            yield p, self._piece(p, 0, p.numel(), False)

    def _piece(self, p: Tensor, start: int, length: int, gradients: bool) -> Fragment:
        state = self._optimizer.state[p]
        return Fragment(
            name=self._names[id(p)],
            start=start,
            shape=tuple(p.shape),
            master=p.detach().view(-1).narrow(0, start, length),
            moments={m: state[m].view(-1).narrow(0, start, length) for m in self._moments},
            gradient=self._gradient(p).view(-1).narrow(0, start, length) if gradients else None,
        )

    @staticmethod
    def _gradient(p: Tensor) -> Tensor:
        if p.grad is None:  # AdamW would skip the parameter, weight decay included
            p.grad = torch.zeros_like(p)
        return p.grad

    @override
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        return [(p, self._gradient(p)) for p in self._parameters]

    @override
    def gradient_shares(self) -> list[tuple[Tensor, Tensor]]:
        return self._of_fragments()

    @override
    def order(self) -> Sequence[Tensor]:
        return self._parameters

    @override
    def flats(self) -> list[Tensor]:
        return list(self._parameters)

    @override
    def parts(self) -> dict[str, list[Tensor]]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return {
            "parameters": list(self._parameters),
            "gradients": gradients,
            "masters": [],
            "moments": _held(self._optimizer, self._moments),
        }

    @override
    def refresh(self) -> None:
        pass

    @override
    def drop(self) -> None:
        for p in self._parameters:
            p.grad = None

    @override
    def clean(self) -> None:
        pass


class Zero12Layout(Layout):
    """Stages 1 and 2: parameters are whole on every rank; masters, moments, gradients are slices of a flat tensor per group."""

    def __init__(self, engine: Any, parameters: Sequence[Tensor], names: dict[int, str], moments: tuple[str, ...] = ADAM) -> None:
        self._moments = moments
        self._zero: Any = engine.optimizer
        self._normed = getattr(self._zero, "compute_grad_norm", True)
        self._parameters: Sequence[Any] = parameters
        self._names = names
        _fill(self._zero.optimizer.state, self.flats(), moments)

    @override
    def owned(self, *, gradients: bool = False) -> Iterator[tuple[Tensor, Fragment]]:
        state = self._zero.optimizer.state
        for p in self._parameters:
            mapping = p._hp_mapping
            if mapping is None:
                continue
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            where = mapping.hp_fragment_address
            fragment = Fragment(
                name=self._names[id(p)],
                start=mapping.lp_fragment_address.start,
                shape=tuple(p.shape),
                master=flat.detach().narrow(0, where.start, where.numel),
                moments={m: state[flat][m].narrow(0, where.start, where.numel) for m in self._moments},
                gradient=mapping.get_lp_grad_fragment(p._index_in_param_group) if gradients else None,
            )
            yield p, fragment

    @override
    def held(self) -> Iterator[tuple[Tensor, Fragment]]:
        return self.owned()

    @override
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        pieces = ((p, p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)) for p in self._parameters if p._hp_mapping)
        return [(p, gradient) for p, gradient in pieces if gradient is not None]

    @override
    def order(self) -> Sequence[Tensor]:
        return self._parameters

    @override
    def flats(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    @override
    def parts(self) -> dict[str, list[Tensor]]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        for pieces in self._zero.averaged_gradients.values():
            gradients += [pieces] if isinstance(pieces, Tensor) else pieces or []
        return {
            "parameters": [p.data for p in self._parameters],
            "gradients": gradients,
            "masters": self.flats(),
            "moments": _held(self._zero.optimizer, self._moments),
        }

    @override
    def refresh(self) -> None:
        self._zero.update_lp_params()

    @override
    def drop(self) -> None:
        # DeepSpeed discards a non-finite gradient together with its buffers, so that a skipped step has no effect. It detects one
        # by the gradient's norm, which is not computed otherwise.
        for _, gradient in self.gradients():
            gradient.fill_(float("nan"))
        self._zero.compute_grad_norm = True

    @override
    def clean(self) -> None:
        self._zero.compute_grad_norm = self._normed


def order_streams(zero: Any, accelerator: Any) -> None:
    """Replace DeepSpeed's wait for the whole device at the end of a backward pass by a wait of the stream that needs the result.

    With ``overlap_comm`` gradients are reduced on a stream of their own, and DeepSpeed 0.19.8 then stops the host until all
    streams of the device are idle. What follows runs on the current stream, so it is enough that this waits for the reductions
    (whose stream has waited for NCCL's). Memory is safe too: buckets belong to the current stream's pool and are released after
    its wait; pieces of gradients belong to the pool of the reductions, whose first work in the next pass is a wait for the
    current stream. Without overlap there would be no wait either, but every reduction would stop the backward pass: for
    ViT-L 1.3 GB a step, by estimate 5 ms inside a node and tens of ms between nodes.
    """
    epilogue = zero.independent_gradient_partition_epilogue

    def ordered() -> None:
        accelerator.synchronize = lambda *_: torch.cuda.current_stream().wait_stream(zero.reduction_stream)
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    zero.independent_gradient_partition_epilogue = ordered


class Zero3Layout(Layout):
    """Stage 3: parameters are partitioned too; rank ``r`` has the ``r``-th of equal pieces of each, the last ones padded."""

    def __init__(self, engine: Any, parameters: Sequence[Tensor], names: dict[int, str], moments: tuple[str, ...] = ADAM) -> None:
        self._moments = moments
        self._zero: Any = engine.optimizer
        self._parameters: Sequence[Any] = parameters
        self._names = names
        _fill(self._zero.optimizer.state, self.flats(), moments)

    @override
    def owned(self, *, gradients: bool = False) -> Iterator[tuple[Tensor, Fragment]]:
        state, z = self._zero.optimizer.state, self._zero
        for p in self._parameters:
            start, length = piece_of(p)
            if length <= 0:
                continue
            group, offset, _ = z.grad_position[z.get_param_id(p)]
            flat = z.fp32_partitioned_groups_flat[group]
            fragment = Fragment(
                name=self._names[id(p)],
                start=start,
                shape=tuple(p.ds_shape),
                master=flat.detach().narrow(0, offset, length),
                moments={m: state[flat][m].narrow(0, offset, length) for m in self._moments},
                gradient=self._buffers()[p.ds_id].narrow(0, 0, length) if gradients else None,
            )
            yield p, fragment

    @override
    def held(self) -> Iterator[tuple[Tensor, Fragment]]:
        return self.owned()

    def _buffers(self) -> dict[int, Tensor]:
        buffers: dict[int, Tensor] = self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        return buffers

    @override
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        lengths = ((p, piece_of(p)[1]) for p in self._parameters)
        buffers = self._buffers()
        return [(p, buffers[p.ds_id].narrow(0, 0, length)) for p, length in lengths if length > 0]

    @override
    def order(self) -> Sequence[Tensor]:
        return self._parameters

    @override
    def flats(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    @override
    def parts(self) -> dict[str, list[Tensor]]:
        return {
            "parameters": [p.ds_tensor for p in self._parameters],
            "gradients": list(self._buffers().values()),
            "masters": self.flats(),
            "moments": _held(self._zero.optimizer, self._moments),
        }

    @override
    def refresh(self) -> None:
        for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            self._zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
            self._zero._unflatten_partitioned_parameters(number)

    @override
    def drop(self) -> None:
        for _, gradient in self.gradients():
            gradient.fill_(float("nan"))

    @override
    def clean(self) -> None:
        for buffer in self._buffers().values():
            buffer.zero_()


def piece_of(parameter: Any) -> tuple[int, int]:
    """First element and number of elements of this rank's piece of a partitioned (stage 3) parameter, without padding."""
    size = parameter.ds_tensor.ds_numel
    start = dist.get_rank() * size
    return start, min(size, parameter.ds_numel - start)


def _held(optimizer: Any, moments: tuple[str, ...]) -> list[Tensor]:
    return [state[moment] for state in optimizer.state.values() for moment in moments if moment in state]


def _fill(state: Any, flats: list[Tensor], moments: tuple[str, ...]) -> None:
    """Initialize the moments, so that a checkpoint of step 0 has the same contents as any other."""
    for flat in flats:
        state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device)}
        state[flat].update({moment: torch.zeros_like(flat) for moment in moments})
