"""ZeRO layouts with the optimizer offloaded to host memory.

DeepSpeed averages gradients on the device as usual and copies this rank's share into the ``grad`` of its flat fp32 tensors, which
are in host memory with masters and moments. It checks for overflow during the copy, not in the step, so a step is dropped by
setting its overflow flag.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from pipeline.checkpoint.fragments import Fragment
from pipeline.training.zero_layouts import Zero3Layout, Zero12Layout


def _gradient(flat: Tensor, fragment: Fragment) -> Tensor:
    assert flat.grad is not None  # DeepSpeed's own, for its whole lifetime
    at = (fragment.master.data_ptr() - flat.data_ptr()) // flat.element_size()
    return flat.grad.view(-1).narrow(0, at, fragment.master.numel())


class OffloadedZero12Layout(Zero12Layout):
    """Stages 1 and 2 in host memory."""

    @override
    def owned(self, *, gradients: bool = False) -> Iterator[tuple[Tensor, Fragment]]:
        if gradients:
            self._zero._wait_for_offload_copies()  # DeepSpeed waits only in its own step
        for p, fragment in super().owned():
            if gradients:
                flat = self._zero.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]  # type: ignore[attr-defined]
                fragment = replace(fragment, gradient=_gradient(flat, fragment))
            yield p, fragment

    @override
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        return self._of_fragments()

    @override
    def parts(self) -> dict[str, list[Tensor]]:
        return super().parts() | {"gradients": [flat.grad for flat in self.flats() if flat.grad is not None]}

    @override
    def drop(self) -> None:
        self._zero.local_overflow = True

    @override
    def clean(self) -> None:
        for flat in self.flats():
            if flat.grad is not None:
                flat.grad.zero_()


class OffloadedZero3Layout(Zero3Layout):
    """Stage 3 in host memory; DeepSpeed gathers its pieces of gradients beside the flat ones."""

    @override
    def owned(self, *, gradients: bool = False) -> Iterator[tuple[Tensor, Fragment]]:
        for p, fragment in super().owned():
            if gradients:
                group, _, _ = self._zero.grad_position[self._zero.get_param_id(p)]
                fragment = replace(fragment, gradient=_gradient(self._zero.fp32_partitioned_groups_flat[group], fragment))
            yield p, fragment

    @override
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        return self._of_fragments()

    @override
    def parts(self) -> dict[str, list[Tensor]]:
        parts = super().parts()
        parts["gradients"] = parts["gradients"] + [flat.grad for flat in self.flats() if flat.grad is not None]
        return parts

    @override
    def drop(self) -> None:
        first = self._zero.fp16_groups[0][0]
        self._zero.norm_for_param_grads[self._zero.get_param_id(first)] = float("nan")

    @override
    def clean(self) -> None:
        super().clean()
        for flat in self.flats():
            if flat.grad is not None:
                flat.grad.zero_()
