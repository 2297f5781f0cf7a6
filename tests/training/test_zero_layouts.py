"""DeepSpeed's memory by ZeRO stage: fragments, pieces, gradients and purposes of memory on two real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.training.zero_layouts import Zero0Layout
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import Toy, advance, batch_at, build, step_at

STAGES = [0, 1, 2, 3]


def _look(zero: int) -> dict[str, Any]:
    """What a layout says of an engine after a backward pass, by its parts."""
    method, engine = build(zero=zero)
    layout, names = engine.layout, engine._names
    engine.forward_backward(batch_at(0, slice(0, 4)), step_at(0))
    flats = {id(flat): flat for flat in layout.flats()}
    order = [names[id(p)] for p in layout.order()]
    pieces = {}
    for flat, segments in layout.segments().items():
        for s in segments:
            pieces.setdefault(order[s.number], []).append(flats[flat].detach().view(-1).narrow(0, s.offset, s.length).clone())
    made: dict[str, Any] = {
        "order": order,
        "pieces": pieces,
        "held": {f.name: (f.start, f.master.clone(), f.gradient) for _, f in layout.held()},
        "owned": {f.name: (f.start, tuple(f.shape), f.master.clone(), f.gradient) for _, f in layout.owned()},
        "gradients": {f.name: (f.start, f.gradient.clone()) for _, f in layout.owned(gradients=True)},
        "shares": {names[id(p)]: gradient.clone() for p, gradient in layout.gradient_shares()},
        "scaled": {names[id(p)]: gradient.numel() for p, gradient in layout.gradients()},
        "parts": {name: sum(tensor.numel() for tensor in tensors) for name, tensors in layout.parts().items()},
    }
    with torch.no_grad():
        for _, fragment in layout.held():
            fragment.master.fill_(0.5)
    layout.refresh()
    with engine.gathered():
        made["refreshed"] = {name: p.detach().clone() for name, p in method.named_parameters() if p.requires_grad}
    engine.close()
    return made


@pytest.fixture(scope="module", params=STAGES)
def stage(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    return request.param, pool(2).run(_look, zero=request.param)


def sizes() -> dict[str, int]:
    return {name: p.numel() for name, p in Toy().named_parameters() if p.requires_grad}


def expected_gradients() -> dict[str, torch.Tensor]:
    """Torch's own, of the batch that both ranks were given."""
    method = Toy()
    sum(method(batch_at(0, slice(0, 4)), step_at(0)).values(), torch.zeros(())).backward()
    return {name: p.grad.view(-1) for name, p in method.named_parameters() if p.grad is not None}


def test_fragments_are_equal_shares_and_segments_point_at_them(stage: tuple[int, list[dict[str, Any]]]) -> None:
    zero, ranks = stage
    weights = {name: p.detach() for name, p in Toy().named_parameters() if p.requires_grad}
    assert ranks[0]["order"] == ranks[1]["order"] and sorted(ranks[0]["order"]) == sorted(weights)
    for rank, made in enumerate(ranks):
        for name, (start, shape, master, gradient) in made["owned"].items():
            assert gradient is None and shape == tuple(weights[name].shape)
            assert torch.equal(master, weights[name].view(-1)[start : start + len(master)])
            share = -(-weights[name].numel() // 2)
            if zero in (0, 3):  # in stages 1 and 2 the group is shared, not each parameter
                assert (start, len(master)) == (rank * share, min(share, weights[name].numel() - rank * share))
        for name, (start, master, gradient) in made["held"].items():
            assert gradient is None
            assert (start, len(master)) == (0, weights[name].numel()) or zero > 0
            (piece,) = made["pieces"][name]
            assert torch.equal(piece, master)
        assert made["pieces"].keys() == made["held"].keys()
    owned = [{name: len(master) for name, (_, _, master, _) in made["owned"].items()} for made in ranks]
    assert {name: owned[0].get(name, 0) + owned[1].get(name, 0) for name in weights} == sizes()
    assert ("scale" in owned[1]) == (zero in (1, 2) and "scale" not in owned[0])


def test_gradients_are_torchs_and_every_element_is_on_one_rank(stage: tuple[int, list[dict[str, Any]]]) -> None:
    zero, ranks = stage
    expected, counts = expected_gradients(), {name: torch.zeros(size) for name, size in sizes().items()}
    for made in ranks:
        assert made["gradients"].keys() == made["owned"].keys() == made["shares"].keys()
        for name, (start, gradient) in made["gradients"].items():
            torch.testing.assert_close(gradient, expected[name][start : start + len(gradient)])
            assert torch.equal(made["shares"][name], gradient)
            counts[name][start : start + len(gradient)] += 1
            assert made["scaled"][name] == (sizes()[name] if zero == 0 else len(gradient))
    assert all(bool((count == 1).all()) for count in counts.values())


def test_memory_is_counted_once_by_its_purpose(stage: tuple[int, list[dict[str, Any]]]) -> None:
    zero, ranks = stage
    total = sum(sizes().values())
    for made in ranks:
        parts = made["parts"]
        assert parts.keys() == {"parameters", "gradients", "masters", "moments"}
        assert parts["moments"] == 2 * (parts["masters"] if zero else total)
        assert parts["gradients"] > 0
        if zero < 3:
            assert parts["parameters"] == total
        else:
            assert total / 2 <= parts["parameters"] < total / 2 + len(sizes())
        assert parts["masters"] == 0 if zero == 0 else total / 2 <= parts["masters"] <= total / 2 + 4 * len(sizes())


def test_refreshed_weights_are_the_masters(stage: tuple[int, list[dict[str, Any]]]) -> None:
    for made in stage[1]:
        assert made["refreshed"].keys() == sizes().keys()
        assert all(bool((weight == 0.5).all()) for weight in made["refreshed"].values())


def _dropped(zero: int) -> list[bool]:
    """Whether weights changed by a dropped step, by the next one, and by a step after its gradients were cleaned."""
    method, engine = build(zero=zero)

    def changed(index: int, *, drop: bool) -> bool:
        before = [f.master.clone() for f in engine.fragments()]
        if drop:
            method.poison = "loss"
        advance(method, engine, index)
        method.poison = None
        return any(not torch.equal(old, f.master) for old, f in zip(before, engine.fragments(), strict=True))

    seen = [changed(0, drop=True), changed(1, drop=False), changed(2, drop=True), changed(3, drop=False)]
    finite = all(bool(f.master.isfinite().all()) for f in engine.fragments())
    engine.close()
    return [*seen, finite]


@pytest.mark.parametrize("zero", STAGES)
def test_a_dropped_step_changes_nothing_and_the_next_is_like_any_other(zero: int) -> None:
    assert pool(2).run(_dropped, zero=zero) == [[False, True, False, True, True]] * 2


def test_stage_0_has_zero_moments_from_the_start_and_gradients_where_there_were_none() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(1))]
    names = {id(p): name for p, name in zip(parameters, "ab", strict=True)}

    class Engine:
        optimizer = torch.optim.AdamW(parameters)

    layout = Zero0Layout(Engine(), parameters, names)
    assert [(f.name, f.start, f.shape) for _, f in layout.held()] == [("a", 0, (3, 2)), ("b", 0, (1,))]
    for p in parameters:
        state = Engine.optimizer.state[p]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and state["step"].dtype == torch.float32
        assert not any(bool(value.any()) for value in state.values())
    assert [tuple(gradient.shape) for _, gradient in layout.gradients()] == [(3, 2), (1,)]
    assert layout.parts()["gradients"] == [p.grad for p in parameters]
    layout.clean()
    assert parameters[0].grad is not None
    layout.drop()
    assert [p.grad for p in parameters] == [None, None]
    only = Zero0Layout(Engine(), parameters, names, ("momentum_buffer",))
    assert len(only.parts()["moments"]) == 2 and only.parts()["masters"] == []
