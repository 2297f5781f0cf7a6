"""Verified steps: the run is the same with them and without; one flipped bit anywhere is found, and its rank is named."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.slurm.decide import AttemptResult, Budgets, decide
from pipeline.config.schema import METHODS
from pipeline.errors import CorruptionError, failure_fields
from pipeline.runtime import failure_claim as claims
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import read
from pipeline.training.verification import _PIXELS, _TERMS, Finding, corruption, digest
from tests.helpers import flipped_bits as flips
from tests.helpers.matrix import matrix
from tests.helpers.rank_pool import pool
from tests.helpers.runs import train, weights
from tests.test_health import broken

# Buffers of batch norm, own statistics of a teacher, a queue, a centre that moves, dropped paths, a Gram anchor.
BLOCK = {**flips.tiny.MODEL, "depth": 1}  # what is digested is listed tensor by tensor; a second block adds time only
SETTINGS: dict[str, dict[str, Any]] = {
    "dinov2": {
        "method": {"centering": "softmax_center", "gram_weight": 1.0, "gram_update_every": 2},
        "model": {**flips.tiny.MODEL, "drop_path": 0.3},
    }
}
# ZeRO stage 3 takes five times what the others take: every run tries it with two methods, full runs with all.
PARTITIONED = ("dinov2", "clip")
PARTS = {"byol": 1, "mocov2": 2}
OTHERS = [(name, i % 3, PARTS.get(name, 1 + i % 2)) for i, name in enumerate(sorted(METHODS)) if name not in PARTITIONED]
CASES = matrix(sorted(METHODS), [0, 1, 2, 3], [1, 2], together=1, always=[("dinov2", 3, 2), ("clip", 3, 1), *OTHERS])


@pytest.mark.parametrize(("name", "zero", "accumulation"), CASES)
def test_a_run_is_the_same_bit_for_bit_with_and_without_verification(name: str, zero: int, accumulation: int) -> None:
    given = {"name": name, "zero": zero, "accumulation": accumulation, **SETTINGS.get(name, {"model": BLOCK})}
    verified, plain = (pool(2).run(flips.trained, every=every, steps=3, **given) for every in (2, None))
    for ours, theirs in zip(verified, plain, strict=True):
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_random_numbers_that_a_method_draws_outside_of_its_forward_pass_are_the_same_in_both() -> None:
    given = {"name": "simclr", "zero": 1, "accumulation": 1, "model": BLOCK, "draws": True}
    verified, plain = (pool(2).run(flips.trained, every=every, steps=3, **given) for every in (2, None))
    assert all(torch.equal(verified[0][key], plain[0][key]) for key in plain[0])


def assert_found(zero: int, accumulation: int, places: tuple[str, ...], count: int, seed: int) -> None:
    given = {"name": "dinov2", "zero": zero, "accumulation": accumulation, "model": BLOCK}
    reports = pool(2).run(flips.flipped, places=places, count=count, seed=seed, **given)
    assert reports[0] == reports[1]  # all ranks say the same
    missed = [(flip, text) for flip, text, rank in reports[0] if rank != flip.rank]
    assert len(reports[0]) == count and not missed, missed[:3]


@pytest.mark.parametrize(("zero", "accumulation"), [(0, 2), (2, 1), (3, 2)])
def test_a_flipped_bit_is_found_with_its_rank(zero: int, accumulation: int) -> None:
    assert_found(zero, accumulation, flips.PLACES, 8, seed=zero)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "count"), [(0, 100), (3, 24), *(pytest.param(n, 100, marks=pytest.mark.full) for n in (1, 2, 3))]
)
def test_100_of_100_flipped_bits_are_found_with_their_rank(zero: int, count: int) -> None:
    """A quarter each in weights or teacher, moments, pixels, and gradients before or after their sum over the ranks."""
    assert_found(zero, 2, flips.PLACES, count, seed=100 + zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [1, 1023, 1024, 5000])
def test_every_bit_and_every_place_changes_a_digest(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).mul(9).to(dtype)
    before = int(digest(tensor))
    assert int(digest(tensor.clone())) == before
    bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    for bit in range(1 if dtype == torch.bool else 8 * tensor.element_size() - 1):
        bits[size // 2] ^= 1 << bit
        assert int(digest(tensor)) != before
        bits[size // 2] ^= 1 << bit
    if size > 1 and dtype != torch.bool:
        assert int(digest(tensor.roll(1))) != before
    assert int(digest(tensor[1:])) != int(digest(tensor[:-1])) or size < 3  # memory that does not begin at eight bytes


def test_an_error_names_one_rank_and_its_node_or_says_that_it_could_be_several() -> None:
    nodes, found = ["n1", "n2", "n2"], Finding(_TERMS, ("dino",))
    one = corruption(7, _PIXELS, {1: Finding(_PIXELS, ("a", "b", "c", "d"))}, nodes)
    assert (one.rank, one.node) == (1, "n2")
    assert one.where == "rank 1 on n2"
    assert one.what == "step 7 was not the same twice: pixels, tokens or masks differed (a, b, c and 1 more)"
    two = corruption(7, _TERMS, {1: found, 2: found}, nodes)
    assert (two.rank, two.node, two.where) == (None, "n2", "one of the ranks 1 on n2, 2 on n2")
    assert corruption(7, _TERMS, {0: found, 2: found}, nodes).node == ""


@pytest.mark.slow
def test_a_flipped_bit_ends_the_attempt_and_the_run_ends_with_the_bits_of_an_undisturbed_one(
    shards: str, config: Path, tmp_path: Path
) -> None:
    length = ("train.duration=9 steps", "checkpoint.every=3 steps", "train.record_batches=false")
    assert train(config, shards, tmp_path / "plain", *length).returncode == 0
    run, verified = tmp_path / "run", (*length, "train.verify_every=2")
    done = broken(config, shards, run, "1 5 forward flip", *verified)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"rank 1 on \S+: step 5 was not the same twice: memory during the forward and backward", done.stderr)
    failure = claims.claimed(run / "logs" / "attempt-0000")
    assert failure is not None and (failure["cause"], failure["node"]) == ("node", socket.gethostname())
    tags = [row["values"] for _, row in read(RunDirectory(run).journal(0)) if row["kind"] == "tags"]
    assert any("step 5 was not the same twice" in each.get("alert/corruption", "") for each in tags)
    assert [path.name for path in sorted((run / "checkpoints").glob("step_*"))] == ["step_000000003"]
    done = train(config, shards, run, *verified)
    assert done.returncode == 0 and "resuming at step 3 " in done.stdout, done.stdout + done.stderr
    assert weights(run, 9) == weights(tmp_path / "plain", 9)


@pytest.mark.parametrize(("node", "excluded"), [("n2", {"n2"}), ("", set())])
def test_slurm_avoids_the_node_at_fault_and_not_the_one_that_reports_it(node: str, excluded: set[str], tmp_path: Any) -> None:
    error = CorruptionError("step 7 was not the same twice", where="rank 1", node=node, rank=1)
    assert claims.claim(tmp_path, {"rank": 0, "what": str(error), "code": 1, "step": 7, **failure_fields(error)})
    decision = decide(AttemptResult(code=1, failure=claims.claimed(tmp_path), before=2, after=4), [], Budgets())
    assert (decision.action, decision.cause) == ("requeue", "node") and set(decision.exclude) == excluded
