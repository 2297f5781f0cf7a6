"""Signatures of steps: any change of a sample's input changes its digest, and the sums do not depend on the number of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.data.augment.views import Batch, Masks
from pipeline.methods.base import Step
from pipeline.runtime.process_group import World
from pipeline.training.signature_file import Signature, sketched
from pipeline.training.signatures import Signatures, code_digest, sample_digests, signature_of

SAMPLES = 8
NORMS = {"backbone": torch.tensor(2.5)}


def batch(count: int = SAMPLES, *, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = {
        "global": [torch.randn(SAMPLES, 3, 8, 8, generator=generator)[first : first + count].clone() for _ in range(2)],
        "local": [torch.randn(SAMPLES, 3, 4, 4, generator=generator)[first : first + count].clone()],
    }
    tokens = torch.randint(1, 99, (SAMPLES, 6), generator=generator)[first : first + count].clone()
    grid = (torch.rand(2, SAMPLES, 4, generator=generator) < 0.5)[:, first : first + count].reshape(2 * count, 4).clone()
    masks = {"global": Masks(grid, grid.flatten().nonzero().flatten(), torch.ones(int(grid.sum())))}
    ids = list(range(100 + first, 100 + first + count))
    return Batch(views, torch.zeros(count), [str(number) for number in ids], ids, 0, masks=masks, tokens=tokens)


def taken(batches: list[Batch], rank: int = 0, size: int = 1, step: int = 4) -> Signature:
    """The signature of a step of a rank."""
    signatures = Signatures(None, World(rank, size, 0, torch.device("cpu"), None))  # type: ignore[arg-type]
    terms = {"dino": torch.tensor(1.25), "koleo": torch.tensor(float("nan"))}
    return signature_of(signatures.take(Step(index=step, lr=0.5), batches, terms, NORMS), rank)


def changed(where: str) -> Batch:
    """The batch with a small change of its sample 5."""
    one = batch()
    if where == "pixel":
        one.views["global"][1][5, 2, 7, 7] += 1e-6
    if where == "flip":
        one.views["local"][0][5] = one.views["local"][0][5].flip(-1)
    if where == "swapped views":
        first, second = one.views["global"]
        first[5], second[5] = second[5].clone(), first[5].clone()
    if where == "token":
        assert one.tokens is not None
        one.tokens[5, 3] += 1
    if where == "swapped tokens":
        assert one.tokens is not None
        one.tokens[5] = one.tokens[5].flip(0)
    if where == "mask":
        one.masks["global"].grid[SAMPLES + 5] ^= True
    return one


@pytest.mark.parametrize("where", ["pixel", "flip", "swapped views", "token", "swapped tokens", "mask"])
def test_a_change_of_a_sample_changes_its_digest_and_no_other(where: str) -> None:
    before, after = sample_digests(batch()), sample_digests(changed(where))
    assert (before != after).nonzero().flatten().tolist() == [5]
    ours, theirs = taken([batch()]), taken([changed(where)])
    assert ours.inputs != theirs.inputs and ours.samples == theirs.samples
    assert [place for place in range(SAMPLES) if ours.sketches[place] != theirs.sketches[place]] == [5]


def test_another_sample_changes_the_digest_of_samples() -> None:
    other = replace(batch(), ids=[*range(100, 105), 999, 106, 107])
    assert taken([other]).samples != taken([batch()]).samples
    assert taken([other]).inputs == taken([batch()]).inputs


def test_two_samples_that_change_places_change_the_digest() -> None:
    ids = list(range(100, 108))
    ids[0], ids[1] = ids[1], ids[0]
    assert taken([replace(batch(), ids=ids)]).samples != taken([batch()]).samples


def test_sums_over_ranks_are_those_of_one() -> None:
    one = taken([batch()])
    parts = [taken([batch(2, first=4 * rank), batch(2, first=4 * rank + 2)], rank, 2) for rank in (0, 1)]
    assert sum(part.samples for part in parts) % 2**64 == one.samples
    assert sum(part.inputs for part in parts) % 2**64 == one.inputs
    assert b"".join(part.sketches for part in parts) != b"" and len(parts[0].sketches) == 4


def test_values_are_exact_and_norms_only_on_the_first_rank() -> None:
    first, second = taken([batch()]), taken([batch()], rank=1, size=2)
    assert first.values["term/dino"] == 1.25 and first.values["term/koleo"] != first.values["term/koleo"]
    assert first.values["norm/backbone"] == 2.5 and first.schedules[0] == 0.5
    assert not second.schedules and not [name for name in second.values if name.startswith("norm/")]


def test_of_many_samples_a_group_is_named() -> None:
    views = {"global": [torch.zeros(100, 3, 4, 4)]}
    ids = list(range(100))
    plain = Batch(views, torch.zeros(100), ids=ids, keys=[], position=0)
    other = Batch({"global": [views["global"][0].clone()]}, torch.zeros(100), ids=ids, keys=[], position=0)
    other.views["global"][0][57, 0, 0, 0] = 1
    differing = [
        place
        for place, pair in enumerate(zip(taken([plain]).sketches, taken([other]).sketches, strict=True))
        if len(set(pair)) > 1
    ]
    assert len(differing) == 1 and 57 in sketched(100)[differing[0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_views_of_any_type_have_digests(dtype: torch.dtype) -> None:
    view = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).to(dtype)
    one = Batch({"global": [view]}, torch.zeros(2), keys=[], ids=[0, 1], position=0)
    digests = sample_digests(one)
    assert digests.dtype == torch.int64 and len(set(digests.tolist())) == 2


def test_a_step_whose_numbers_have_not_arrived_is_written_later_and_in_order() -> None:
    class Event:
        arrived = False
        waited = 0

        def query(self) -> bool:
            return self.arrived

        def synchronize(self) -> None:
            self.waited, self.arrived = self.waited + 1, True

    class File:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def step(self, signature: Signature) -> None:
            self.steps.append(signature.step)

        def close(self) -> None: ...

    file = File()
    signatures = Signatures(file, World(0, 1, 0, torch.device("cpu"), None))  # type: ignore[arg-type]
    terms, late = {"dino": torch.tensor(1.0)}, Event()
    each = [signatures.take(Step(index=step), [batch()], terms, {}) for step in range(4)]
    each[1].ready = late  # type: ignore[assignment]
    for one in each[:3]:
        signatures.settle(one, applied=True)
    assert file.steps == [0] and late.waited == 0
    signatures.close()
    assert file.steps == [0] and late.waited == 0  # closing does not wait, for another rank may have died
    each[3].ready = last = Event()  # type: ignore[assignment]
    late.arrived = True
    signatures.settle(each[3], applied=True, wait=True)
    assert file.steps == [0, 1, 2, 3] and late.waited == 0 and last.waited == 1


def test_the_source_has_a_digest() -> None:
    assert len(code_digest()) == 16
