"""Which evaluations run when, within the time budget; and settings that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from launch.cli.eval_ranks import world_here
from pipeline.config.load import InvalidConfig, load
from pipeline.data.inputs import prepare
from pipeline.evaluation.runner import Evaluations
from pipeline.methods.registry import build_seeded_method
from tests.helpers.evaluation import toy
from tests.helpers.runs import TOY


def test_an_evaluation_that_would_cost_too_much_waits_until_there_is_time(tmp_path: Path) -> None:
    loaded = toy(tmp_path, "evaluation.max_time_percent=10", "evaluation.knn.every=2 steps", "launch.backend=gloo")
    config = loaded.config
    with world_here(config) as world:
        evaluate = Evaluations(config, prepare(config, 1), build_seeded_method(config, torch.device("cpu")), world, fresh=True)
        first = evaluate(0, 0.0)
        assert set(first) == {f"{name}knn/k{k}" for name in ("", "baseline/random_init/", "baseline/pixels/") for k in (1, 5)}
        evaluate._last_seconds["knn"], evaluate._total_seconds = 1.0, 1.0
        assert evaluate(1, 100.0) == {}  # it is not due
        assert evaluate(2, 19.0) == {}  # a tenth of 19 s, less the second that is spent, is less than one
        found = evaluate(3, 21.0)  # it waited
        assert found.keys() == {"knn/k1", "knn/k5"}
        assert found == {name: first[name] for name in found}
        evaluate._last_seconds["knn"], evaluate._total_seconds = 1.0, 1e9
        assert evaluate(4, 21.0) == {}
        assert evaluate(24, 21.0).keys() == {"knn/k1", "knn/k5"}  # the last step has its scores


def test_images_are_the_same_each_time_and_the_random_state_is_untouched(tmp_path: Path) -> None:
    config = toy(tmp_path, "launch.backend=gloo", "evaluation.knn.every=2 steps").config
    sheets: dict[tuple[int, str], NDArray[np.uint8]] = {}
    with world_here(config) as world:
        method = build_seeded_method(config, torch.device("cpu")).train()
        keep = lambda step, name, sheet: sheets.update({(step, name): sheet})  # noqa: E731
        evaluate = Evaluations(config, prepare(config, 1), method, world, fresh=True, show=keep)
        state = torch.get_rng_state()
        evaluate(0, 0.0)
        assert evaluate(1, 0.0) == {} and len(sheets) == 3  # none at steps without evaluations
        evaluate(2, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert method.training
    names = ("pca", "attention", "neighbours")
    assert set(sheets) == {(step, name) for step in (0, 2) for name in names}
    for name in names:
        assert np.array_equal(sheets[0, name], sheets[2, name]) and len(np.unique(sheets[0, name])) > 20


REFUSED = {
    "evaluation.segmentation.num_classes is required": [
        "evaluation.segmentation={enabled: true, train_shards: a, val_shards: b}"
    ],
    "names the shards": ["evaluation.segmentation={enabled: true, train_shards: a, val_shards: a, num_classes: 3}"],
    "2 names of 3 classes": [
        "evaluation.segmentation={enabled: true, train_shards: a, val_shards: b, num_classes: 3, class_names: [x, y]}",
    ],
    "class_names is required": ["evaluation.zeroshot.enabled=true"],
    "dinov2 reads no captions": ["evaluation.retrieval.enabled=true"],
    "no gradient flows into images": ["evaluation.robustness.enabled=true", "train.zero_stage=3"],
    "no evaluation of this run computes it": ["evaluation.linear.enabled=true", "checkpoint.keep_best=knn/k10"],
    "evaluation.linear.every = 0": ["evaluation.linear.every=0 steps"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_without_what_an_evaluator_needs_are_refused(message: str, tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(TOY)
    with pytest.raises(InvalidConfig, match=message):
        load(tmp_path / "toy.yaml", ["data.shards=x.tar", *REFUSED[message]])
