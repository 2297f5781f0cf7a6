"""Evaluations outside training: the scores of training, and one error for whatever cannot be evaluated."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from launch.cli.eval_ranks import world_here
from pipeline.config.load import Loaded
from pipeline.config.schema import Config
from pipeline.data.inputs import prepare
from pipeline.data.pack import synthetic as scenes
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.data.storage import expand
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation import gallery
from pipeline.evaluation.knn import knn_accuracy
from pipeline.evaluation.results import EvalResult, by_network
from pipeline.evaluation.standalone import EvalRequest, evaluate_run, labelled_data, select, settings_for_weights
from pipeline.methods.base import Method
from pipeline.methods.registry import build_seeded_method
from pipeline.weights import from_checkpoint
from tests.helpers.evaluation import CPU, changed, toy, write_checkpoint
from tests.helpers.runs import train

GLOO = "launch.backend=gloo"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Method]:
    """A run whose newest checkpoint holds weights that no seed gives; an older one holds those of its seed."""
    loaded = toy(tmp_path_factory.mktemp("evaluated"), GLOO)
    write_checkpoint(loaded.config.run.folder, build_seeded_method(loaded.config, CPU), step=12)
    method = changed(build_seeded_method(loaded.config, CPU), 1)
    write_checkpoint(loaded.config.run.folder, method)
    return loaded, method


def evaluate(config: Config, run: Path, **request: Any) -> EvalResult:
    """The only result of a request."""
    messages: list[str] = []
    with world_here(config) as world:
        (result,) = evaluate_run(run, config, EvalRequest(**request), world, log=messages.append)
    return EvalResult(**{**result.document(), "scores": result.scores | {f"log/{text}": 0.0 for text in messages}})


def accuracy(loaded: Loaded, method: Method) -> dict[str, float]:
    """k-NN from first principles: class tokens of all images, every similarity."""
    config, inputs = loaded.config, prepare(loaded.config, 1)
    assert inputs.bank is not None and inputs.queries is not None
    shown = gallery.Gallery(config, inputs, {"trained": method.export()["backbone"]}, 32, CPU)
    bank, classes = shown.classes(inputs.bank, inputs.bank.ids())
    queries, answers = shown.classes(inputs.queries, inputs.queries.ids())
    scores = knn_accuracy(queries, torch.tensor(answers), bank, torch.tensor(classes), ks=(1, 5))
    return {f"knn/k{k}": value for k, value in scores.items()}


def test_the_newest_teacher_is_evaluated_beside_its_baselines(evaluated: tuple[Loaded, Method]) -> None:
    loaded, method = evaluated
    result = evaluate(loaded.config, loaded.config.run.folder)
    networks = by_network(result.scores)
    assert networks[""] == accuracy(loaded, method)
    assert networks["random_init"] == accuracy(loaded, build_seeded_method(loaded.config, CPU)) != networks[""]
    assert list(networks) == ["", "random_init", "pixels"] and set(networks["pixels"]) == {"knn/k1", "knn/k5"}
    assert (result.checkpoint, result.step, result.samples_seen, result.image_size) == ("step_000000024", 24, 384, 32)
    assert (result.queries, result.bank, result.classes) == (20, 40, 10)
    assert not torch.distributed.is_initialized()


def test_weights_that_a_run_began_with_are_a_baseline_of_their_own(evaluated: tuple[Loaded, Method], tmp_path: Path) -> None:
    loaded, method = evaluated
    run = loaded.config.run.folder
    folder = tmp_path / "student" / "checkpoints" / "step_000000024"
    shutil.copytree(run / "checkpoints" / "step_000000024", folder)
    source = loaded.config.init_from.model_copy(update={"source": str(folder)})
    config = loaded.config.replace(init_from=source)
    networks = by_network(evaluate(config, run, checkpoint=run / "checkpoints" / "step_000000012").scores)
    assert networks["init_from"] == accuracy(loaded, method) != networks["random_init"]
    assert networks[""] == networks["random_init"], "the weights of the seed"
    shutil.rmtree(folder)
    networks = by_network(evaluate(config, run).scores)
    assert "init_from" not in networks and networks["random_init"]
    assert [name for name in networks[""] if "the baseline init_from is left out" in name]


def test_without_baselines_only_the_checkpoint_is_evaluated(evaluated: tuple[Loaded, Method]) -> None:
    loaded, method = evaluated
    assert evaluate(loaded.config, loaded.config.run.folder, baselines=False).scores == accuracy(loaded, method)


def test_the_teacher_comes_back_bit_for_bit(evaluated: tuple[Loaded, Method]) -> None:
    loaded, method = evaluated
    back = from_checkpoint.load_trained(loaded.config, from_checkpoint.newest(loaded.config.run.folder), CPU)
    assert method.teacher is not None and back.teacher is not None
    for name, weight in method.teacher.state_dict().items():
        assert torch.equal(back.teacher.state_dict()[name], weight), name


def test_a_checkpoint_may_be_named_and_a_damaged_one_is_refused(evaluated: tuple[Loaded, Method], tmp_path: Path) -> None:
    loaded, _ = evaluated
    run = loaded.config.run.folder
    older = run / "checkpoints" / "step_000000012"
    result = evaluate(loaded.config, run, checkpoint=older)
    networks = by_network(result.scores)
    assert result.step == 12 and networks[""] == networks["random_init"], "its weights are those of the seed"
    shutil.copytree(older, tmp_path / "step_000000012")
    (tmp_path / "step_000000012" / "whole.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        evaluate(loaded.config, run, checkpoint=tmp_path / "step_000000012")


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    loaded = toy(tmp_path, GLOO)
    with pytest.raises(CheckpointError, match=r"no checkpoint yet.*checkpoint\.every"):
        evaluate(loaded.config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_architecture_is_refused_by_name_and_shapes(evaluated: tuple[Loaded, Method]) -> None:
    config = evaluated[0].config
    wider = config.replace(model=config.model.model_copy(update={"embed_dim": 48}))
    with pytest.raises(
        CheckpointError, match=r"backbone\.mask_token: \[1, 1, 32\] in the checkpoint, \[1, 1, 48\] in the settings"
    ):
        from_checkpoint.load_trained(wider, from_checkpoint.newest(config.run.folder), CPU)
    deeper = config.replace(model=config.model.model_copy(update={"depth": 2}))
    with pytest.raises(CheckpointError, match=r"blocks\.1\..*absent in the checkpoint"):
        from_checkpoint.load_trained(deeper, from_checkpoint.newest(config.run.folder), CPU)


def test_without_validation_shards_their_setting_is_named(evaluated: tuple[Loaded, Method], tmp_path: Path) -> None:
    config = evaluated[0].config
    for shard in expand(config.data.shards):
        (tmp_path / Path(shard).name).symlink_to(shard)
    knn = config.evaluation.knn.model_copy(update={"val_shards": None})
    data = config.data.model_copy(update={"shards": (f"{tmp_path}/*train-*.tar",)})
    nowhere = config.replace(data=data, evaluation=config.evaluation.model_copy(update={"knn": knn}))
    with pytest.raises(DataError, match=r"evaluation\.knn\.val_shards.*val-\*\.tar"):
        evaluate(nowhere, config.run.folder)


def test_shards_without_classes_are_refused_before_any_network_is_built(evaluated: tuple[Loaded, Method], tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "plain") as writer:
        for number in range(3):
            buffer = io.BytesIO()
            Image.fromarray(scenes.render(0, number, 32).image).save(buffer, "PNG")
            writer.write({"__key__": str(number), "png": buffer.getvalue()})
    config = evaluated[0].config
    knn = config.evaluation.knn.model_copy(update={"val_shards": (f"{tmp_path}/plain-*.tar",)})
    plain = config.replace(evaluation=config.evaluation.model_copy(update={"knn": knn}))
    with pytest.raises(DataError, match=r"evaluation\.knn\.val_shards: the shards of the queries have no class numbers.*\.cls"):
        labelled_data(plain, trained=True)


def test_an_unknown_evaluator_is_refused_with_the_names_of_all(evaluated: tuple[Loaded, Method]) -> None:
    with pytest.raises(ConfigError, match=r"there is no evaluator 'nearest'.*Choose one of knn, linear, "):
        select(evaluated[0].config, ["nearest"])


def test_settings_for_weights_are_those_of_data_and_evaluators() -> None:
    config = settings_for_weights(["data.shards=/d/train-*.tar", "evaluation.linear.epochs=3"])
    assert config.validation_shards == ("/d/*val-*.tar",)
    assert config.evaluation.linear.epochs == 3


@pytest.mark.slow
def test_eval_agrees_with_training(tmp_path: Path) -> None:
    loaded = toy(tmp_path, GLOO)
    words = (
        "launch.num_processes=1",
        "train.duration=8 steps",
        "checkpoint.every=8 steps",
        "evaluation.knn.every=4 steps",
        f"evaluation.knn.val_shards={tmp_path}/scenes/*val-*.tar",
        "evaluation.knn.enabled=true",
        "evaluation.knn.k=[1, 5]",
        "model.layer_scale=1.0",
        "schedule.lr.warmup=2 steps",
        "schedule.teacher_temperature.warmup=4 steps",
    )
    run = loaded.config.run.folder
    done = train(tmp_path / "toy.yaml", f"{tmp_path}/scenes/*train-*.tar", run, *words)
    assert done.returncode == 0, done.stderr
    scores = json.loads((run / "outcome.json").read_text())["scores"]
    assert evaluate(loaded.config, run).scores == scores
