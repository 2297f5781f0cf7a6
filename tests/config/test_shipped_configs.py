"""Every config is what its header says: it loads, its method is built without memory, its networks have the published sizes."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import timm
import torch

from pipeline.config.load import available, load
from pipeline.methods.base import Method
from pipeline.methods.registry import build_method
from pipeline.training.schedules import Schedules
from pipeline.weights import init_from as initial

# Parameters of the tower as spelled out by the reference's own models, with its mask token.
TOWERS = {
    "dinov2/vitl16_short": 303_351_808,
    "dinov2/vitl14_long": 303_655_168,
    "dinov2/vitg14": 1_134_771_200,
    "dinov2/vits16_node": 21_675_264,
    "dinov2/vits16_evening": 21_675_264,
    "dinov2/vitb16_node": 85_817_856,
    "dinov2/distill_vits14": 22_056_576 - (37 * 37 - 16 * 16) * 384,
    "dinov2/vitl14_hires": 303_655_168 + (37 * 37 - 16 * 16) * 1024,  # positions of a grid of 37
}
# Parameters of its heads, the class tokens' first.
HEADS = {
    "dinov2/vitl16_short": [23_662_848],
    "dinov2/vitl14_long": [57_545_088, 40_505_600],
    "dinov2/vitl14_hires": [57_545_088, 40_505_600],
    "dinov2/vitg14": [58_593_664, 41_554_176],
    "dinov2/dinov3_vitl16": [23_662_848 - 65_536] * 2,  # no gain
}
PEAKS = {
    "dinov2/vitl16_short": 5.65685425e-3,
    "dinov2/dinov3_vitl16": 5.65685425e-3,
    "dinov2/dinov3_mixed": 4 * 1.25e-5 * 2**0.5,
    "dinov2/vitl14_long": 3.46410162e-4,
    "dinov2/vitg14": 3.46410162e-4,
}


@cache
def built(name: str) -> Method:
    config = load(name).config
    with torch.device("meta"):
        return build_method(config)


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", sorted(available()))
def test_it_is_built_and_every_weight_is_in_one_group(name: str) -> None:
    method = built(name)
    grouped = sorted(itertools.chain.from_iterable(group.names for group in method.parameter_groups()))
    assert grouped == sorted(n for n, p in method.named_parameters() if p.requires_grad) and grouped
    assert method.views and method.export()


@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_has_the_parameters_of_the_reference(name: str) -> None:
    assert size(initial.student_tower(built(name))[1]) == TOWERS[name]


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_have_the_parameters_of_the_reference(name: str) -> None:
    networks = built(name).networks()
    assert [size(module) for part, module in networks.items() if part.endswith("head")] == HEADS[name]


def test_the_frozen_teacher_of_distillation_is_the_giant_with_its_heads() -> None:
    frozen = dict(built("dinov2/distill_vits14").named_children())["judge"]
    assert {name: size(network) for name, network in frozen.named_children()} == {
        "backbone": TOWERS["dinov2/vitg14"],
        "dino_head": HEADS["dinov2/vitg14"][0],
        "ibot_head": HEADS["dinov2/vitg14"][1],
    }


def test_dinov3s_tower_is_timms_without_registers() -> None:
    with torch.device("meta"):
        released = timm.create_model("vit_large_patch16_dinov3_qkvb", num_classes=0)
    tower = initial.student_tower(built("dinov2/dinov3_vitl16"))[1]
    assert size(tower.vit) == size(released) - 4 * 1024
    assert tower.vit.state_dict().keys() == released.state_dict().keys() - {"reg_token"}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_rate_is_that_of_the_reference(name: str) -> None:
    config = load(name).config
    assert config.optim.lr_scaling.scaled(config.schedule.lr.peak, config.train.global_batch_size) == pytest.approx(
        PEAKS[name], rel=1e-8
    )


@pytest.mark.parametrize(
    ("name", "step", "lr"),
    [
        ("dinov2/vitl16_short", 6250, 0.00282865342),
        ("dinov2/vitl16_short", 62_500, 0.00331999152),
        ("dinov2/dinov3_vitl16", 37_499, 0.00499529574),
        ("dinov2/vitl14_long", 50_000, 1.73206813e-4),
        ("dinov2/vitl14_long", 362_500, 1.73705081e-4),
        ("dinov2/vitg14", 624_999, 1.000000003e-6),
        ("dinov2/dinov3_gram", 30_000, 3e-5 * 4 * 2**0.5),  # constant
    ],
)
def test_rates_on_the_way_are_those_of_the_reference(name: str, step: int, lr: float) -> None:
    config = load(name).config
    batch = config.train.global_batch_size
    at = Schedules.from_config(config, epoch_samples=1250 * batch).at(step * batch)
    assert at.lr == pytest.approx(lr, rel=3e-8)
    expected = {"dinov2/vitl16_short": 0.07 if step > 37_500 else 0.0450001333, "dinov2/dinov3_gram": 0.07}
    assert at.teacher_temperature == pytest.approx(expected.get(name, at.teacher_temperature), rel=1e-8)
    if name == "dinov2/dinov3_gram":
        assert (at.momentum, at.weight_decay) == (0.999, 0.04)


@pytest.mark.parametrize("name", sorted(available()))
def test_the_header_tells_result_cost_source_and_a_command_with_this_name(name: str) -> None:
    head = [line for line in available()[name].read_text().splitlines() if line.startswith("#")]
    told = {line[1:].split()[0]: line for line in head if line.startswith("#   ") and line[4] != " "}
    assert {"command", "reached", "source"} <= told.keys()
    assert f"fovea train {name} " in told["command"] or "launch/demo.sh" in told["command"]
