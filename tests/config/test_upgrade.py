"""Settings that earlier versions kept are read under today's names, and those that people write are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.load import InvalidConfig, load
from pipeline.config.schema import Config
from pipeline.config.upgrade import upgrade

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
