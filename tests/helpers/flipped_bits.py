"""Steps that are verified on real ranks, with a bit that is flipped at a random place: imported by the ranks themselves."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.augment.views import Batch
from pipeline.errors import CorruptionError
from pipeline.methods.base import Step
from pipeline.runtime.process_group import World
from pipeline.training.verification import Verification
from tests.helpers import tiny_methods as tiny

INTEGERS = {1: torch.uint8, 4: torch.int32, 8: torch.int64}
PLACES = ("weight", "moment", "pixel", "gradient")


@dataclass(frozen=True)
class Flip:
    """A bit of a tensor, drawn alike on all ranks.

    Attributes:
        place: one of ``PLACES``.
        rank: on which rank.
        when: 0 between two steps, 1 in the first pass, 2 in the second.
        tensor, element, bit: draws from 0 to 1.
        summed: of a gradient, whether it is flipped after the sum over the ranks.
    """

    place: str
    rank: int
    when: int
    tensor: float
    element: float
    bit: float
    summed: bool

    @classmethod
    def draw(cls, place: str, ranks: int, random: random.Random) -> Flip:
        when = random.randint(0 if place in ("weight", "moment") else 1, 2)
        draws = random.random(), random.random(), random.random()
        return cls(place, random.randrange(ranks), when, *draws, random.random() < 0.5)

    def of(self, tensors: list[Tensor]) -> None:
        """Flip it in one of some tensors."""
        tensor = tensors[int(self.tensor * len(tensors))].detach().view(-1)
        bits = tensor.view(INTEGERS[tensor.element_size()])
        width = 8 * tensor.element_size()
        bit = int(self.bit * width)
        bits[int(self.element * len(bits))] ^= 1 << bit if bit < width - 1 or width == 8 else -(1 << bit)


class Verified:
    """A method, its engine and their verification on this rank."""

    def __init__(
        self, name: str, zero: Any, accumulation: int, every: int | None, *, draws: bool = False, **changes: Any
    ) -> None:
        self.made = tiny.make_method(name, **changes)
        if draws:
            self.draw()
        self.engine = tiny.engine_of(self.made, zero, accumulation)
        self.accumulation = accumulation
        world = World(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), None)  # type: ignore[arg-type]
        self.verification = Verification(self.engine, self.made, world, every) if every else None
        self.flip: Flip | None = None
        self.passes = 0

    def draw(self) -> None:
        """Scale the terms of a step by a random number that is drawn outside of the forward pass, where torch is not seeded."""
        before, factors = self.made.before_accumulation, [torch.ones(())]

        def drawing(batches: list[Batch], step: Step) -> None:
            factors[0] = torch.rand(())
            before(batches, step)

        self.made.before_accumulation = drawing  # type: ignore[method-assign, assignment]
        self.made.register_forward_hook(lambda *given: {key: term * factors[0] for key, term in given[-1].items()})

    def now(self, place: str) -> bool:
        """Whether the bit of this place is due."""
        flip = self.flip
        return flip is not None and (flip.place, flip.rank, flip.when) == (place, dist.get_rank(), self.passes)

    def tensors(self, place: str) -> list[Tensor]:
        assert self.verification is not None
        kinds = ("weight", "master", "teacher") if place == "weight" else ("exp_avg", "exp_avg_sq", "momentum_buffer")
        return [t for name, t in self.verification._constant() if name.partition("/")[0] in kinds and t.numel()]

    def spoil(self) -> None:
        for place in ("weight", "moment"):
            if self.now(place):
                assert self.flip is not None
                self.flip.of(self.tensors(place))

    def train_step(self, step: Step, batches: list[Batch]) -> Any:
        """A step as the trainer does it."""
        self.passes += 1
        self.spoil()
        if self.now("pixel"):
            assert self.flip is not None
            self.flip.of([view for batch in batches for views in batch.views.values() for view in views])
        self.engine.before_accumulation(batches, step)
        each = [self.engine.forward_backward(batch, step) for batch in batches]
        terms = {name: torch.stack([one[name] for one in each]).mean() for name in each[0]}
        if self.now("gradient") and self.flip is not None and self.flip.summed:
            self.flip.of([gradient for _, gradient in self.engine.layout.gradients() if gradient.numel()])
        applied, norms = self.engine.step(step, torch.stack(list(terms.values())).isfinite().all())
        if applied:
            self.made.after_step(step)
        else:
            self.made.on_step_skipped()
        return terms, applied, norms

    def advance(self, index: int) -> dict[str, Tensor]:
        """The next step; its terms."""
        share = tiny.SAMPLES // dist.get_world_size()
        micro, begin = share // self.accumulation, dist.get_rank() * share
        parts = [tiny.batch_at(self.made, index, slice(low, low + micro)) for low in range(begin, begin + share, micro)]
        step = replace(tiny.STEP, index=index)
        if self.verification is None:
            return self.train_step(step, parts)[0]  # type: ignore[no-any-return]
        due = self.verification.due(index)
        self.passes = 0
        self.spoil()
        result = self.verification.twice(step, parts, self.train_step) if due else self.train_step(step, parts)
        self.verification.digest_state(index + 1)
        return result[0]  # type: ignore[no-any-return]


def trained(name: str, zero: Any, accumulation: int, every: int | None, steps: int = 4, **changes: Any) -> dict[str, Tensor]:
    """On a rank: terms of all steps, and everything after them."""
    one = Verified(name, zero, accumulation, every, **changes)
    terms = [one.advance(index) for index in range(steps)]
    found = {f"term {index} {name}": term for index, each in enumerate(terms) for name, term in each.items()}
    found |= tiny.state(one.made, one.engine)
    found |= {f"moment {f.name} {kind}": m.clone() for f in one.engine.fragments() for kind, m in f.moments.items()}
    found["random"] = torch.get_rng_state()
    if one.verification is not None:
        assert one.verification.verified == steps // (every or 1)
    one.engine.close()
    return found


def flipped(
    name: str, zero: Any, accumulation: int, places: tuple[str, ...], count: int, seed: int, **changes: Any
) -> list[tuple[Flip, str, int | None]]:
    """On a rank: what is reported of some flipped bits, one after another in the same state."""
    one = Verified(name, zero, accumulation, 1, **changes)
    check = one.verification
    assert check is not None
    one.advance(0)
    draws = random.Random(seed)
    trainable = [p for p in one.made.parameters() if p.requires_grad]
    reports: list[tuple[Flip, str, int | None]] = []
    for number in range(count):
        flip = one.flip = Flip.draw(places[number % len(places)], dist.get_world_size(), draws)
        whole = {key: tensor.clone() for key, tensor in (*check._constant(), *check._changing())}
        steps = one.engine.optimizer_steps()
        chosen = trainable[int(flip.tensor * len(trainable))]
        hook = chosen.register_hook(lambda gradient: _spoiled(one, gradient))
        try:
            one.advance(1)
            reports.append((flip, "", None))
        except CorruptionError as error:
            reports.append((flip, str(error), error.rank))
        hook.remove()
        one.flip = None
        check._put_back(whole, steps)
        for key, tensor in (*check._constant(), *check._changing()):
            tensor.detach().copy_(whole[key])
        check.digest_state(1)
    one.advance(1)  # nothing is flipped: nothing is found
    one.engine.close()
    return reports


def _spoiled(one: Verified, gradient: Tensor) -> Tensor:
    """The gradient of a rank, with its bit flipped in the first micro-batch that has one."""
    flip = one.flip
    if flip is None or flip.summed or not one.now("gradient"):
        return gradient
    one.flip = replace(flip, place="done")
    changed = gradient.clone(memory_format=torch.contiguous_format)
    flip.of([changed])
    return changed
