"""Whole runs of CLIP and DetailCLIP: stopped and resumed like one that was not, then evaluated by their captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import ConfigError
from pipeline.evaluation.results import by_network
from pipeline.evaluation.zeroshot import read_lines
from tests.helpers.runs import TOY, recorded, train, weights

TEXT = "text: {architecture: null, width: 16, depth: 1, num_heads: 2, context_length: 16}"
METHODS = {
    "clip": f"""
method:
  name: clip
  views: {{global_size: 32}}
  embed_dim: 16
  patch_dropout: 0.25
  {TEXT}
""",
    "detailclip": f"""
method:
  name: detailclip
  views: {{global_size: 32}}
  embed_dim: 16
  augment: {{hue_space: yiq}}
  prototypes: 32
  head_hidden: 32
  head_bottleneck: 16
  decoder_heads: 2
  text_teacher: false
  {TEXT}
""",
}


@pytest.fixture(scope="module", params=sorted(METHODS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished toy run in micro-batches."""
    folder = tmp_path_factory.mktemp(request.param)
    scenes.write(folder / "scenes", train=40, val=20, size=32, seed=3)
    head, _, rest = TOY.partition("method:")
    (folder / "toy.yaml").write_text(head + METHODS[request.param] + "model:" + rest.partition("model:")[2])
    done = train(
        folder / "toy.yaml",
        f"{folder}/scenes/*train-*.tar",
        folder / "run",
        "train.duration=12 steps",
        "train.micro_batch_size=4",
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run: Path) -> None:
    middle = run / "run" / "checkpoints" / "step_000000006"
    words = ("train.duration=12 steps", "train.micro_batch_size=4", f"checkpoint.resume={middle}")
    done = train(run / "toy.yaml", f"{run}/scenes/*train-*.tar", run / "next", *words)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        late = {step: row for step, row in recorded(run / "run", rank).items() if step >= 6}
        assert recorded(run / "next", rank) == late
    both = [weights(run / name, 12) for name in ("next", "run")]  # towers, moments, slow copies, centres
    assert both[0] == both[1] and "whole.safetensors" in both[0]


@pytest.mark.slow
def test_its_captions_are_evaluated_beside_the_network_with_random_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = run / "classes.txt"
    classes.write_text("\n".join(scenes.CLASS_NAMES) + "\n")
    words = ["eval", str(run / "run"), "--zeroshot", str(classes), "--retrieval"]
    with pytest.raises(SystemExit) as left:
        main([*words, f"evaluation.knn.val_shards={run}/scenes/*val-*.tar"])
    assert left.value.code == 0
    assert "zeroshot/top1" in capsys.readouterr().out
    document = json.loads((run / "run" / "evaluations" / "step_000000012.json").read_text())
    assert (document["step"], document["queries"], document["classes"]) == (12, 20, 10)
    networks = by_network(document["scores"])
    assert networks[""] != networks["random_init"]
    assert {"zeroshot/top5", "retrieval/text_to_image/recall@10"} <= set(networks[""])
    classes.write_text("one\ntwo\n")
    with pytest.raises(SystemExit):
        main([*words, f"evaluation.knn.val_shards={run}/scenes/*val-*.tar"])
    assert "class_names has 2 lines" in capsys.readouterr().err


def test_lists_are_read_line_by_line_and_bad_ones_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("a {}\n\n the {} \n")
    assert read_lines(file, what="prompt templates", placeholder="{}") == ["a {}", "the {}"]
    file.write_text("a {}\nnothing\n")
    with pytest.raises(ConfigError, match=r"must contain \{\}, and 'nothing' does not"):
        read_lines(file, what="prompt templates", placeholder="{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lines(tmp_path / "absent.txt", what="prompt templates")
