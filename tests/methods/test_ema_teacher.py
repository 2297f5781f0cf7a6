"""The slow copy: exact in fp32, invisible to the student, aligned with it by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import CheckpointError
from pipeline.methods.ema_teacher import Teacher


def constant(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(3, 2, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


@pytest.mark.parametrize(("momentum", "expected"), [(0.992, 1.0099968), (0.999, 1.0063230)])
def test_a_thousand_small_steps_arrive(momentum: float, expected: float) -> None:
    student = constant(1.0)
    teacher = Teacher(net=student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(1.01)
    for _ in range(1000):
        teacher.update(momentum)
    for _, weight in teacher.named_parameters():
        torch.testing.assert_close(weight, torch.full_like(weight, expected), atol=1.5e-5, rtol=0)


def test_the_teacher_of_a_half_precision_student_is_fp32_and_follows_the_masters() -> None:
    student = constant(1.0, torch.bfloat16)
    teacher = Teacher(net=student)
    masters = {f"net.{name}": torch.full(p.shape, 1.01) for name, p in student.named_parameters()}
    for _ in range(1000):
        teacher.update(0.992, masters)
    for _, weight in teacher.named_parameters():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, torch.full_like(weight, 1.0099968), atol=1.5e-5, rtol=0)


def test_momentum_one_keeps_and_reset_copies_bit_for_bit() -> None:
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    teacher = Teacher(net=student)
    before = {name: tensor.clone() for name, tensor in teacher.named_parameters()}
    student(torch.randn(8, 4))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    teacher.update(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.named_parameters())
    teacher.reset()
    state = teacher.state_dict()
    assert all(torch.equal(state[f"net.{name}"], tensor) for name, tensor in student.state_dict().items())


def test_the_copy_is_frozen_still_and_its_own() -> None:
    student = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    student.train()
    teacher = Teacher(net=student)
    copied = teacher.modules["net"]
    assert not copied.training
    assert student.training
    assert not any(p.requires_grad for p in copied.parameters())
    assert {p.data_ptr() for p in copied.parameters()}.isdisjoint({p.data_ptr() for p in student.parameters()})


def test_a_module_that_holds_it_does_not_register_it() -> None:
    holder = nn.Module()
    holder.net = nn.Linear(4, 4)
    holder.teacher = Teacher(net=holder.net)
    assert [name for name, _ in holder.named_parameters()] == ["net.weight", "net.bias"]
    assert [name for name, _ in holder.teacher.named_parameters()] == ["net.weight", "net.bias"]
    twin = copy.deepcopy(holder)
    with torch.no_grad():
        twin.net.weight.zero_()
    twin.teacher.update(0.0)
    assert not dict(twin.teacher.named_parameters())["net.weight"].any()
    assert dict(holder.teacher.named_parameters())["net.weight"].any()


def test_its_state_goes_out_and_in_unchanged() -> None:
    first, second = Teacher(net=nn.Linear(4, 4)), Teacher(net=nn.Linear(4, 4))
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("other", [nn.Linear(4, 4, bias=False), nn.Linear(5, 4)])
def test_a_state_of_another_network_is_refused(other: nn.Module) -> None:
    with pytest.raises(CheckpointError, match="do not fit"):
        Teacher(net=nn.Linear(4, 4)).load_state_dict(Teacher(net=other).state_dict())


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def _deep() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(5)))


def test_an_update_is_one_call_for_all_weights_and_one_for_the_buffers_of_each_dtype() -> None:
    teacher = Teacher(net=_deep(), head=nn.Linear(4, 2))
    with _Calls() as calls:
        teacher.update(0.9)
    assert sorted(calls.names) == ["_foreach_copy_", "_foreach_copy_", "_foreach_lerp_"]


def test_updates_are_the_formula_bit_for_bit_and_copy_buffers_that_a_module_has_replaced() -> None:
    torch.manual_seed(0)
    student = _deep()
    teacher = Teacher(net=student)
    expected = {name: weight.clone() for name, weight in teacher.named_parameters()}
    for step in range(4):
        student(torch.randn(8, 4))
        student[0][1].running_mean = torch.full((4,), float(step))
        with torch.no_grad():
            for name, weight in student.named_parameters():
                weight.add_(torch.randn_like(weight))
                expected[f"net.{name}"].lerp_(weight, 1.0 - 0.99)
        teacher.update(0.99)
        assert all(torch.equal(expected[name], weight) for name, weight in teacher.named_parameters())
        buffers = dict(teacher.named_buffers())
        assert len(buffers) == 15
        assert all(torch.equal(buffers[f"net.{name}"], buffer) for name, buffer in student.named_buffers())


def _neighbours(module: nn.Module) -> None:
    """Lays a module's weights out as an engine does: views into one flat tensor, the last first."""
    parameters = list(module.parameters())[::-1]
    flat, start = torch.cat([p.detach().view(-1) for p in parameters]), 0
    for p in parameters:
        p.data = flat.narrow(0, start, p.numel()).view(p.shape)
        start += p.numel()


def test_a_teacher_laid_out_like_its_student_is_updated_as_one_tensor_with_the_same_bits() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    teacher, plain = Teacher(net=student), Teacher(net=student)
    _neighbours(student)
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    teacher.align()
    assert all(torch.equal(before[name], weight) for name, weight in teacher.named_parameters())
    for step in range(3):
        with torch.no_grad():
            for weight in student.parameters():
                weight.add_(torch.randn_like(weight))
        with _Calls() as calls:
            teacher.update(0.99, applied=torch.tensor(step != 1))
        assert calls.names.count("lerp_") == 1
        if step != 1:
            plain.update(0.99)
        expected = dict(plain.named_parameters())
        assert all(torch.equal(expected[name], weight) for name, weight in teacher.named_parameters())


def test_weights_that_are_no_neighbours_are_updated_one_by_one() -> None:
    student = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    teacher = Teacher(net=student)
    teacher.align()  # in one block, but the student's are not
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    with _Calls() as calls:
        teacher.update(0.5, applied=torch.tensor(True))
    assert calls.names.count("lerp_") == 4
    expected = dict(student.named_parameters())
    for name, weight in teacher.named_parameters():
        torch.testing.assert_close(weight, expected[name.removeprefix("net.")].detach() - 0.5)
