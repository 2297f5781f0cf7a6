"""The engine on two real ranks, held against torch alone in one process: the contract with DeepSpeed's private parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import TrainingError
from pipeline.models.groups import ParameterGroup
from pipeline.training.engine import check_accelerator
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import SAMPLES, Toy, advance, assembled, batch_at, build, by_torch, options, snapshot, step_at

STEPS = 6
# What processors may differ by: their products of other sizes add in other orders. A teacher is a mean of weights.
LOSS, WEIGHT, TEACHER, ULP = 4e-6, 1e-6, 5e-7, 1.2e-7


def _train(steps: int = STEPS, headless: tuple[int, ...] = (), **chosen: Any) -> dict[str, Any]:
    method, engine = build(**chosen)
    start = snapshot(method, engine)
    done = []
    for index in range(steps):
        method.without_head = index in headless
        done.append(advance(method, engine, index))
    end = snapshot(method, engine)
    engine.close()
    return {"start": start, "steps": done, **end}


def train(**chosen: Any) -> list[dict[str, Any]]:
    return pool(2).run(_train, **chosen)


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def plain(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Six steps without clipping, by ZeRO stage."""
    return train(zero=request.param)


def compare(ranks: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    masters = assembled(ranks)
    for name, weight in masters.items():
        torch.testing.assert_close(weight, reference["weights"][name], atol=WEIGHT, rtol=ULP)
    for rank in ranks:
        for name, weight in masters.items():
            assert torch.equal(rank["weights"][name], weight), f"{name} is not what the masters say"
        for kind in ("teacher", "memory", "buffers"):
            assert rank[kind].keys() == reference[kind].keys()
            for name, tensor in reference[kind].items():
                torch.testing.assert_close(rank[kind][name], tensor, atol=TEACHER, rtol=ULP)
    for name in masters.keys() & ranks[0]["teacher"].keys():
        assert torch.equal(ranks[0]["teacher"][name], ranks[1]["teacher"][name])


def mean_terms(ranks: list[dict[str, Any]], index: int) -> dict[str, float]:
    both = [rank["steps"][index]["terms"] for rank in ranks]
    return {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}


def test_the_pieces_cover_every_trainable_parameter_once_and_their_ends_lie_inside(plain: list[dict[str, Any]]) -> None:
    method = Toy()
    trainable = {name: p.detach() for name, p in method.named_parameters() if p.requires_grad}
    masters = assembled([rank["start"] for rank in plain])
    assert masters.keys() == trainable.keys()
    for name, weight in trainable.items():
        assert torch.equal(masters[name], weight), "a master differs from the initial weight"
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not any(tensor.any() for tensor in assembled([rank["start"] for rank in plain], moment).values())
    assert any(f.start > 0 for rank in plain for f in rank["fragments"]), "no parameter is split: the test is too easy"


def test_six_steps_are_those_of_torch_alone(plain: list[dict[str, Any]]) -> None:
    reference = by_torch(STEPS, clip=None, scope="network")
    for index in range(STEPS):
        for name, value in mean_terms(plain, index).items():
            assert value == pytest.approx(reference["terms"][index][name], abs=LOSS)
        for rank in plain:
            assert rank["steps"][index]["applied"]
            assert rank["steps"][index]["norms"] == pytest.approx(reference["norms"][index], rel=1e-5)
    compare(plain, reference)
    assert all(set(rank["adam"]) == {STEPS} for rank in plain)


def test_the_last_layer_stands_still_while_its_rate_is_zero_and_moves_after(plain: list[dict[str, Any]]) -> None:
    still = assembled(train(zero=2, steps=2))["head.weight"]
    assert torch.equal(still, Toy().head.weight.detach())
    assert not torch.equal(assembled(plain)["head.weight"], still)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_micro_batches_are_one_batch(zero: int) -> None:
    compare(train(zero=zero, accumulation=2), by_torch(STEPS, clip=None, scope="network"))


@pytest.mark.parametrize(
    ("zero", "scope", "clip"),
    [
        (0, "network", 0.05),
        (1, "network", 0.05),
        (2, "network", 0.05),
        (2, "global", 0.05),
        (3, "network", 0.05),
        (3, "global", 0.05),
        (0, "parameter", 0.02),
        (1, "parameter", 0.02),
        (2, "parameter", 0.02),
        (3, "parameter", 0.02),
    ],
)
def test_clipping_is_torchs_for_each_network_for_all_or_for_each_parameter(zero: int, scope: str, clip: float) -> None:
    reference = by_torch(STEPS, clip=clip, scope=scope)
    ranks = train(zero=zero, scope=scope, clip=clip)
    assert all(norm > clip for norm in (reference["norms"][0]["backbone"], reference["norms"][0]["head"])), "nothing is clipped"
    for index in range(STEPS):
        assert ranks[1]["steps"][index]["norms"] == pytest.approx(reference["norms"][index], rel=1e-4)
    compare(ranks, reference)
    other = by_torch(STEPS, clip=clip, scope="network" if scope == "global" else "global")
    assert (other["weights"]["head.weight"] - reference["weights"]["head.weight"]).abs().max() > 20 * WEIGHT


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_network_without_gradient_in_a_step_is_like_one_with_zeroes(zero: int) -> None:
    compare(train(zero=zero, headless=(3,)), by_torch(STEPS, clip=None, scope="network", headless=frozenset({3})))


def _with_poison(kind: str, zero: int, **chosen: Any) -> dict[str, Any]:
    method, engine = build(zero=zero, **chosen)
    seen = []
    for index in range(STEPS):
        method.poison = kind if index == 3 and dist.get_rank() == 1 else None
        before = snapshot(method, engine)
        done = advance(method, engine, index)
        after = snapshot(method, engine)
        seen.append((done["applied"], _same(before, after)))
    end = snapshot(method, engine)
    engine.close()
    return {"seen": seen, **end}


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors = [
        (first[kind][name], second[kind][name]) for kind in ("weights", "teacher", "memory", "buffers") for name in first[kind]
    ]
    for a, b in zip(first["fragments"], second["fragments"], strict=True):
        tensors += [(a.master, b.master), *((a.moments[name], b.moments[name]) for name in a.moments)]
    return all(torch.equal(a, b) for a, b in tensors) and first["adam"] == second["adam"]


@pytest.mark.parametrize(
    ("kind", "zero", "accumulation"),
    [
        ("loss", 2, 1),
        ("term", 2, 1),
        ("gradient", 2, 1),
        ("loss", 1, 2),
        ("gradient", 1, 1),
        ("loss", 0, 1),
        ("gradient", 3, 1),
        ("loss", 3, 2),
    ],
)
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all_and_leaves_no_trace(
    kind: str, zero: int, accumulation: int
) -> None:
    ranks = pool(2).run(_with_poison, kind=kind, zero=zero, accumulation=accumulation, clip=0.5)
    for rank in ranks:
        assert [applied for applied, _ in rank["seen"]] == [True, True, True, False, True, True]
        assert [same for _, same in rank["seen"]] == [False, False, False, True, False, False]
        assert set(rank["adam"]) == {STEPS - 1}
    compare(ranks, by_torch(STEPS, clip=0.5, scope="network", skipped=frozenset({3})))


def _timed() -> bool:
    _, engine = build(zero=2)
    enabled: bool = engine._engine.tput_timer.config.enabled
    engine.close()
    return enabled


def test_deepspeeds_throughput_timer_which_waits_for_the_device_is_off() -> None:
    assert not any(pool(2).run(_timed))


class ZeroDimensional(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.head.temperature = nn.Parameter(torch.tensor(1.0))


class NotContiguous(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.randn(7, 5).t())


class Forgetful(Toy):
    def parameter_groups(self) -> list[ParameterGroup]:
        return super().parameter_groups()[:-1]


class Doubling(Toy):
    def parameter_groups(self) -> list[ParameterGroup]:
        return [*super().parameter_groups(), super().parameter_groups()[-1]]


class Thawing(Toy):
    def parameter_groups(self) -> list[ParameterGroup]:
        return [*super().parameter_groups(), ParameterGroup((self.fixed,), ("fixed",), 1.0, 1.0, False)]


def _refused(kind: type[Toy]) -> str:
    from pipeline.training.engine import Engine

    try:
        Engine(kind(), options(), torch.device("cpu"))
    except TrainingError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (ZeroDimensional, "parameter head.temperature: a parameter is 0-dimensional"),
        (NotContiguous, "parameter head.weight: a parameter is 0-dimensional or not contiguous"),
        (Forgetful, "parameter head.weight: a trainable parameter is in 0 parameter groups"),
        (Doubling, "parameter head.weight: a trainable parameter is in 2 parameter groups"),
        (Thawing, "parameter fixed: a frozen parameter is in 1 parameter groups"),
    ],
)
def test_methods_that_deepspeed_would_break_on_are_refused_by_name(kind: type[Toy], sentence: str) -> None:
    for told in pool(2).run(_refused, kind=kind):
        assert told.startswith(sentence)


def _in_bf16() -> dict[str, Any]:
    method, engine = build(zero=2, precision="bf16", clip=3.0)
    start = snapshot(method, engine)
    kinds = []
    hook = method.backbone[0].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    done = [advance(method, engine, index) for index in range(STEPS)]
    hook.remove()
    gradients = []
    engine.forward_backward(batch_at(9, slice(0, SAMPLES // 2)), step_at(9))
    gradients = [f.gradient.dtype for _, f in engine.layout.owned(gradients=True)]
    engine.step(step_at(9), torch.tensor(True))
    end = snapshot(method, engine)
    engine.close()
    return {"start": start, "steps": done, "compute": set(kinds), "gradients": set(gradients), **end}


def test_bf16_computes_in_bf16_and_keeps_everything_else_in_fp32() -> None:
    ranks = pool(2).run(_in_bf16)
    initial = {name: p.detach() for name, p in Toy().named_parameters()}
    for name, weight in assembled([rank["start"] for rank in ranks]).items():
        assert torch.equal(weight, initial[name]), "the initial weights were rounded"
    reference = by_torch(STEPS, clip=3.0, scope="network", bf16=True)
    for rank in ranks:
        assert rank["compute"] == {torch.bfloat16}
        assert rank["gradients"] == {torch.float32}
        assert {t.dtype for t in (*rank["teacher"].values(), *rank["memory"].values(), *rank["weights"].values())} == {
            torch.float32
        }
        assert {f.master.dtype for f in rank["fragments"]} == {torch.float32}
    for index in range(STEPS):
        for name, value in mean_terms(ranks, index).items():
            assert value == pytest.approx(reference["terms"][index][name], abs=0.01)


def test_a_gpu_with_deepspeeds_accelerator_for_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(TrainingError, match=r"DeepSpeed computes on cpu, but this rank on cuda") as caught:
        check_accelerator("cuda", "cpu")
    assert "DS_ACCELERATOR=cpu" in str(caught.value) and caught.value.hint.startswith("Unset")
    check_accelerator("cuda", "cuda")
    check_accelerator("cpu", "cpu")
