"""Linear segmentation of real pictures with real labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD
from pipeline.data.index.build import build
from pipeline.data.index.filters import narrow
from pipeline.evaluation.segmentation import Segmentation
from pipeline.evaluation.settings import SegmentationSettings
from pipeline.models.eval_model import EvalModel
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.evaluation import eval_data

SIZE = 96
NAMES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_even_untrained_patches_know_more_of_streets_than_the_commonest_class(
    whole: bool, shared_data: Path, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    tower = build_tower(ModelSettings(embed_dim=96, depth=2, num_heads=3, patch_size=8, layer_scale=None), image_size=SIZE).eval()
    made = []
    for split in ("train", "val"):
        urls = [str(path) for path in sorted((shared_data / "camvid").glob(f"{split}-*.tar"))]
        manifest = build(urls, tmp_path / split)
        made.append(narrow(manifest, tmp_path / f"{split}-maps", ("segmentation",)))
    assert [manifest.total for manifest in made] == [367, 101]

    settings = SegmentationSettings(
        num_classes=11,
        ignore_index=(11,),
        class_names=NAMES,
        max_train=60,
        max_val=30,
        epochs=20,
        batch_size=8,
        sliding_window=whole,
    )
    evaluator = Segmentation(settings, eval_data(size=SIZE, class_maps=(made[0], made[1])))
    scores = evaluator(EvalModel(tower, IMAGENET_MEAN, IMAGENET_STD))
    with capsys.disabled():
        print({name: round(value, 4) for name, value in scores.items()})
    assert scores["miou"] > 1.5 * scores["majority"]
    assert scores["iou/road"] > 0.5
    assert 0.02 < scores["majority"] < 0.1
