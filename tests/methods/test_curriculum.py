"""A resolution curriculum of every method that has one: its views, a step at each size, costs, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli.config import config_check
from launch.cli.estimate import bill, measure
from launch.slurm.profile import ClusterProfile
from pipeline.config.load import difference
from pipeline.config.schema import METHODS, Config
from pipeline.data.augment.curriculum import curriculum_text
from pipeline.data.augment.settings import MultiCropSettings
from pipeline.data.inputs import check_curriculum
from pipeline.errors import ConfigError
from pipeline.estimate.flops import counted, counted_run, counted_stages
from pipeline.methods.registry import build_method
from tests.helpers.tiny_methods import LOCAL, MODEL, PATCH, SIDE, STEP, TINY, batch_at, config, make_method

STAGES = [{"until": "2 steps", "global_size": SIDE // 2}, {"until": "1 epochs", "global_size": 3 * SIDE // 4}]
RESIZABLE = sorted(name for name, settings in METHODS.items() if settings.resizable)


def staged(name: str, **changes: Any) -> dict[str, Any]:
    stages = changes.pop("stages", STAGES)
    return {"method": {"views": {**TINY[name]["views"], "curriculum": stages}, **changes}}


def test_the_methods_of_views_in_the_usual_form_have_it() -> None:
    assert set(METHODS) - set(RESIZABLE) == {"detailclip"}


@pytest.mark.parametrize("name", RESIZABLE)
def test_a_method_takes_a_step_of_every_stage_and_keeps_its_own_views(name: str) -> None:
    made = make_method(name, **staged(name))
    assert made.views == make_method(name).views  # previews, evaluations and exports have the full size
    assert [stage.views[0].size for stage in made.curriculum] == [SIDE // 2, 3 * SIDE // 4]
    for stage in made.curriculum:
        assert [replace(one, size=0, augment=()) for one in stage.views] == [
            replace(one, size=0, augment=()) for one in made.views
        ]
        assert {one.size for one in stage.views if one.name == "local"} <= {LOCAL}
    for index, one in enumerate(made.all_view_sets):
        views, made.views = made.views, one.views
        batch = batch_at(made, index)
        made.views = views
        made.before_accumulation([batch], STEP)
        total = torch.stack(list(made(batch, STEP).values())).sum()
        total.backward()
        assert bool(total.isfinite())
        made.after_step(STEP)


def test_local_crops_and_rectangles_have_stages_of_their_own_sizes() -> None:
    views = {"global_size": [16, 32], "local_size": LOCAL, "local_count": 2}
    stages = [{"until": 8, "global_size": [8, 16], "local_size": 16}]
    made = build_method(config("byol", method={"views": {**views, "curriculum": stages}}))
    assert [(one.name, one.size) for one in made.curriculum[0].views] == [("global", (8, 16)), ("local", 16)]
    settings = MultiCropSettings.model_validate({**views, "curriculum": stages})
    assert curriculum_text(settings) == "8 x 16 and 16 px until 8, then 16 x 32 and 8 px"


@pytest.mark.parametrize(
    ("name", "stages", "message"),
    [
        ("detailclip", STAGES, "the views of detailclip have one size; leave it empty, or choose byol"),
        ("simclr", [{"until": "2 steps", "global_size": 10}], f"is not divisible by the patch side {PATCH}; 8 or 12 would"),
        ("simclr", [{"until": "2 steps", "local_size": 8}], "local_size: has no effect while method.views.local_count = 0"),
        ("clip", [{"until": "2 steps", "local_size": 8}], "curriculum"),
        ("simclr", [{"global_size": 8}], "until"),
        ("simclr", [{"until": "0 steps", "global_size": 8}], "must be longer than 0"),
        ("simclr", [{"until": "2 steps"}], "has the full sizes; set another global_size"),
        ("simclr", [{"until": "2 steps", "global_size": [8, 16]}], "has another aspect ratio than method.views.global_size"),
        (
            "simclr",
            [STAGES[0], {"until": "2 steps", "global_size": 12}],
            "must be later than the end of the stage before, 2 steps",
        ),
        ("simclr", [{"until": "125000 steps", "global_size": 8}], "leaves no step of the full size in train.duration"),
        ("dinov2", [{"until": "2 steps", "global_size": 4}], "8 to 4096"),
    ],
)
def test_stages_that_cannot_be_are_refused(name: str, stages: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(name, **staged(name, stages=stages))
    assert message in str(caught.value)


def test_a_grid_of_one_patch_has_nothing_to_mask() -> None:
    with pytest.raises(ConfigError, match="an image of a single patch leaves nothing to mask"):
        config("dinov2", **staged("dinov2", stages=[{"until": "2 steps", "global_size": 8}]), model={**MODEL, "patch_size": 8})


DROPPING = sorted(name for name, settings in METHODS.items() if settings.drops_patches)


def test_the_methods_that_drop_patches_have_no_use_for_them_all() -> None:
    assert DROPPING == ["byol", "clip", "dino", "lejepa", "mocov2", "mocov3", "simclr"]


@pytest.mark.parametrize("name", DROPPING)
def test_only_the_students_global_views_lose_patches(name: str) -> None:
    stages = [{"until": "2 steps", "patch_dropout": 0.75}]
    made = make_method(name, **staged(name, stages=stages))
    seen: dict[str, list[int]] = {"student": [], "teacher": []}
    towers = {"student": made.get_submodule("backbone")}
    if made.teacher is not None:
        towers["teacher"] = made.teacher.modules["backbone"]
    for role, tower in towers.items():
        block: Any = tower.get_submodule("vit.blocks.0")
        block.register_forward_pre_hook(lambda _, given, role=role: seen[role].append(given[0].shape[1]))
    made.views = made.curriculum[0].views
    batch, patches = batch_at(made, 0), (SIDE // PATCH) ** 2
    made.before_accumulation([batch], STEP)
    total = torch.stack(list(made(batch, STEP).values())).sum()
    total.backward()
    assert bool(total.isfinite())
    local = {1 + (LOCAL // PATCH) ** 2} if "local" in batch.views else set()
    assert set(seen["student"]) == {1 + patches // 4} | local and set(seen["teacher"]) <= {1 + patches}
    whole, fewer = (batch_at(make_method(name, **staged(name, stages=stages)), 0), batch)
    assert whole.layout != fewer.layout and whole.sides == fewer.sides
    assert any(fewer.kept["global" if name != "clip" else "image"] is one for one in fewer.tensors())


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("dinov2", MODEL, "patch_dropout: dinov2 uses all patches; set it to 0, or choose byol"),
        ("coca", MODEL, "patch_dropout: coca uses all patches"),
        ("byol", {"timm_name": "resnet18"}, "patch_dropout: a ResNet has no patches"),
    ],
)
def test_patches_are_not_dropped_where_they_are_needed_or_absent(name: str, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(name, **staged(name, stages=[{"until": "2 steps", "patch_dropout": 0.5}]), model=model)
    assert message in str(caught.value)


def test_dropped_patches_cost_nothing() -> None:
    settings = config("simclr", **staged("simclr", stages=[{"until": "2 steps", "patch_dropout": 0.5}]))
    fewer, full = counted_stages(settings)
    assert fewer < 0.65 * full
    assert curriculum_text(settings.method.views) == "16 px without 50% of the patches until 2 steps, then 16 px"


def test_stages_are_checked_against_the_size_of_an_epoch() -> None:
    settings = config("simclr", **staged("simclr"), train={"global_batch_size": 8, "precision": "fp32", "duration": "10 steps"})
    check_curriculum(settings, 40)
    with pytest.raises(ConfigError, match="ends at step 2 and begins at step 2"):
        check_curriculum(settings, 16)
    with pytest.raises(ConfigError, match="ends at step 10 in a run of 10"):
        check_curriculum(settings, 80)


def test_the_command_that_checks_a_config_prints_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    stages = "method.views.curriculum=[{until: 3 epochs, global_size: 16}]"
    config_check("simclr/cifar10_small", ["data.shards=none.tar", stages])
    assert "views: 16 px until 3 epochs, then 32 px" in capsys.readouterr().out


def test_another_curriculum_is_another_run() -> None:
    plain, staged_ = config("simclr"), config("simclr", **staged("simclr"))
    assert difference(plain, staged_) and not difference(staged_, Config.model_validate(staged_.model_dump(mode="json")))
    later = [{**STAGES[0], "until": "3 steps"}, STAGES[1]]
    assert difference(staged_, config("simclr", **staged("simclr", stages=later)))


def test_costs_are_those_of_each_stage_and_memory_is_the_largest() -> None:
    plain = config("dinov2", train={"global_batch_size": 8, "precision": "fp32", "duration": "10 steps"})
    settings = plain.replace(method=config("dinov2", **staged("dinov2")).method)
    stages = counted_stages(settings)
    sizes = (SIDE // 2, 3 * SIDE // 4, SIDE)
    alone = [counted(config("dinov2", method={"views": {**TINY["dinov2"]["views"], "global_size": size}})) for size in sizes]
    assert stages == alone and stages == sorted(set(stages))
    assert counted(settings) == counted(plain) == alone[-1]
    assert counted_run(settings, 40) == pytest.approx((2 * alone[0] + 3 * alone[1] + 5 * alone[2]) / 10)
    assert counted_run(plain, 40) == alone[-1]
    site = ClusterProfile(gpus_per_node=1, gpu_tflops=1.0)
    assert bill(settings, site, ranks=1, efficiency=0.5, samples=40).gflop == pytest.approx(counted_run(settings, 40) / 1e9)
    assert measure(settings).live.each == measure(plain).live.each and measure(settings).views == measure(plain).views
    larger = plain.replace(method=config("dinov2", **staged("dinov2", stages=[{"until": "1 steps", "global_size": 32}])).method)
    assert measure(larger).live.each > measure(plain).live.each and measure(larger).views > measure(plain).views


def test_known_flops_are_read_by_the_sizes_of_the_steps(tmp_path: Path) -> None:
    from tests.helpers.rank_pool import pool

    assert pool(1).run(timed, folder=str(tmp_path)) == [pytest.approx((3 * 100.0 + 500.0) / 4)]


def timed(folder: str) -> float:
    """On a rank: FLOPs of a mean step, of three of one size and one of another."""
    from pipeline.runtime.process_group import World
    from pipeline.runtime.watchdog import COMPUTE, DATA, END, STEP, Watchdog
    from pipeline.training.timing import Phases

    now = [0.0]
    watchdog = Watchdog(Path(folder), 0, 1, clock=lambda: now[0])
    world = World(0, 1, 0, torch.device("cpu"), None)
    phases = Phases(world, watchdog, count=False, flops={(8,): 100.0, (16,): 500.0}, clock=lambda: now[0])
    for step in range(4):
        phases.enter(DATA, step)
        phases.enter(COMPUTE)
        size = (16,) if step == 3 else (8,)
        for part in (first, second):
            phases.counted(part, 1, size)()
        now[0] += 1.0
        phases.enter(STEP)
    phases.enter(END)
    values = phases.read()
    return float(values["tflops_per_rank"] * values["step_seconds"] * 1e12)


def first() -> None:
    """A part of a step."""


def second() -> None:
    """Another."""
