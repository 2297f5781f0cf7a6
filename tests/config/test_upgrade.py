"""Settings that earlier versions kept are read under today's names, and those that people write are not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launch.slurm.profile import again
from pipeline.config.load import InvalidConfig, difference, load
from pipeline.config.schema import Config
from pipeline.config.upgrade import upgrade
from pipeline.errors import ConfigError, TrainingError
from pipeline.reports.comparison import gather
from pipeline.training.rollback import SkippedSteps

# A run of the version before the keys were renamed, as it stands in config.json; defaults left out.
KEPT = {
    "run": {"name": "old", "seed": 3},
    "recipe": {
        "name": "dinov2",
        "targets": "centering",
        "koleo_group": 8,
        "logit_rows": 5,
        "augment": {"hue": "yiq"},
        "views": {"global_size": 32, "local_size": 16},
    },
    "model": {"width": 32, "depth": 1, "heads": 2, "patch": 8, "drop_path_mode": "rows"},
    "data": {"shards": ["/a.tar"], "lanes": 4, "damaged": "use", "storage": {"mode": "direct"}},
    "optim": {"lr": 1e-2, "lr_rule": "linear256"},
    "schedule": {"lr": {"end": 0.0}, "momentum": {"start": 0.9}},
    "train": {"global_batch": 16, "length": {"amount": 24.0, "unit": "steps"}},
    "health": {"rewind_after": 3},
    "launch": {"ranks": 2},
}


def test_every_renamed_setting_keeps_its_value() -> None:
    config = Config.model_validate({**KEPT, "train": {"global_batch": 16, "length": "24 steps"}})
    assert config.method.model_dump(include={"centering", "koleo_group_size", "prototype_chunk_size"}) == {
        "centering": "softmax_center",
        "koleo_group_size": 8,
        "prototype_chunk_size": 5,
    }
    assert config.method.augment.hue_space == "yiq"  # type: ignore[attr-defined]
    assert (config.model.embed_dim, config.model.num_heads, config.model.patch_size) == (32, 2, 8)
    assert config.model.batched_drop_path is False and config.data.on_truncated_shard == "keep-readable"
    assert (config.data.canonical_streams, config.data.storage.access) == (4, "range_read")
    assert config.optim.lr_scaling.scaled(config.schedule.lr.peak, 512) == 2e-2 and config.schedule.lr.end == 0.0
    assert config.schedule.teacher_momentum.start == 0.9 and config.train.duration.amount == 24
    assert config.watchdog.rollback_after == 3 and config.launch.num_processes == 2


def test_what_has_todays_names_is_left_alone() -> None:
    now = Config.model_validate({**KEPT, "train": {"global_batch": 16, "length": "24 steps"}}).model_dump(mode="json")
    assert upgrade(now) is now


def test_a_run_is_read_by_its_folder_and_a_persons_own_file_is_not(tmp_path: Path) -> None:
    text = json.dumps({**KEPT, "train": {"global_batch": 16, "length": "24 steps"}})
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InvalidConfig, match="recipe"):
        load(tmp_path / "config.yaml")
    (tmp_path / "config.json").write_text(text)
    assert load(tmp_path).config.method.name == "dinov2"
    assert load(tmp_path, ["method.koleo_group_size=4"]).config.method.koleo_group_size == 4  # type: ignore[attr-defined]


def old_method(**settings: Any) -> Any:
    return Config.model_validate({"recipe": settings, "data": KEPT["data"], "model": KEPT["model"]}).method


def test_views_and_augmentation_move_into_the_sections_of_all_methods() -> None:
    clip = old_method(
        name="clip", image_size=64, crop_scale=[0.5, 1.0], interpolation="bilinear", flip_probability=0.25, normalize="half"
    )
    assert (clip.views.global_size, clip.views.global_scale, clip.views.interpolation) == (64, (0.5, 1.0), "bilinear")
    assert (clip.augment.flip_probability, clip.augment.normalize, clip.augment.jitter_probability) == (0.25, "half", 0.0)
    byol = old_method(name="byol", augment={"blur_probability": [0.0, 0.0], "solarize_probability": [0.0, 0.1]})
    assert (byol.augment.blur_probability, byol.augment.solarize_probability) == ((0.0,), (0.0, 0.1))


@pytest.mark.parametrize(
    ("blur", "views", "local"), [("as_released", (0.0, 0.9), 0.5), ("paper", (1.0, 0.1), 0.5), ("off", (0.0,), 0.0)]
)
def test_dinov2s_named_blur_becomes_numbers(blur: str, views: tuple[float, ...], local: float) -> None:
    augment = old_method(name="dinov2", augment={"blur": blur, "solarize_probability": 0.3}).augment
    assert (augment.blur_probability, augment.local_blur_probability) == (views, local)
    assert augment.solarize_probability == (0.0, 0.3)  # it was the second view's alone


@pytest.mark.parametrize(
    ("augment", "blur"), [({}, 0.1), ({"blur": "off"}, 0.0), ({"blur": "as_released", "blur_probability": 0.4}, 0.4)]
)
def test_detailclips_blur_is_of_both_views(augment: dict[str, Any], blur: float) -> None:
    read = old_method(name="detailclip", image_size=64, augment={"solarize_probability": 0.3, **augment}).augment
    assert (read.blur_probability, read.solarize_probability) == ((blur,), (0.3,))


@pytest.mark.parametrize("rule", ["sqrt1024", "linear256", "none"])
def test_a_run_may_be_resumed_with_the_same_rule_for_the_learning_rate(rule: str) -> None:
    kept = {**KEPT, "optim": {"lr": 1e-2, "lr_rule": rule}, "train": {"global_batch": 16, "length": "24 steps"}}
    name = {"sqrt1024": "sqrt", "linear256": "linear"}.get(rule, rule)
    now = {**upgrade(kept), "optim": {"lr_scaling": {"rule": name}}}
    assert difference(Config.model_validate(kept), Config.model_validate(now)) == {}


def test_steps_that_an_earlier_version_skipped_are_still_skipped(tmp_path: Path) -> None:
    (tmp_path / "left_out.json").write_text('{"steps": [[3, 5]]}')
    skipped = SkippedSteps(tmp_path / "skipped_steps.json")
    assert 4 in skipped and 6 not in skipped and skipped.rollbacks == 1
    skipped.add(8, 9, write=True)
    assert 4 in SkippedSteps(tmp_path / "skipped_steps.json") and 9 in SkippedSteps(tmp_path / "skipped_steps.json")


def test_the_profile_of_an_earlier_submission_is_read() -> None:
    profile = again({"lead": 60, "after": "chain", "pass_on": ["AWS_*"], "hang": 9})
    assert (profile.checkpoint_lead_time, profile.requeue_mode, profile.export_env) == (60, "chain", ("AWS_*",))


def test_one_budget_of_an_earlier_submission_changes_without_the_others() -> None:
    profile = again({"budgets": {"crash": 7, "no_progress": 3}}, ["budgets.no_progress=8"])
    assert (profile.budgets.crash, profile.budgets.no_progress) == (7, 8)


def test_a_run_of_an_earlier_version_is_reported_with_its_method(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KEPT))
    (run,) = gather([tmp_path])
    assert run.config["method"]["name"] == "dinov2" and run.batch == 16


@pytest.mark.parametrize("name", [["a"], {"a": 1}, 5, None])
def test_a_name_of_a_wrong_type_is_refused(name: Any) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({**KEPT, "recipe": {"name": name, "augment": [], "views": "x"}})


@pytest.mark.parametrize(
    "text", ["[]", '{"steps": [1]}', '{"steps": [[1e400, 2]]}', '{"steps": ' + "[" * 300 + "]" * 300 + "}", "fifo"]
)
def test_a_damaged_list_of_skipped_steps_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "skipped_steps.json"
    if text == "fifo":
        os.mkfifo(file)
    else:
        file.write_text(text)
    with pytest.raises(TrainingError, match="skipped steps cannot be read"):
        SkippedSteps(file)


@pytest.mark.parametrize("profile", [None, [], "x", {"memory": "a\nb"}, {"time": "9" * 5000}, {"budgets": []}])
def test_a_damaged_profile_of_a_submission_is_refused(profile: Any) -> None:
    with pytest.raises(ConfigError):
        again(profile)
