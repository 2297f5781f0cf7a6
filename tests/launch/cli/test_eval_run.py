"""Judging a run's newest checkpoint: the numbers of training, and a sentence for whatever cannot be judged."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from launch.cli import eval_run as evaluate
from pipeline.checkpoint.files import entry
from pipeline.config.load import Loaded, load
from pipeline.data.inputs import prepare
from pipeline.data.pack import synthetic as scenes
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.data.storage import expand
from pipeline.errors import CheckpointError, DataError
from pipeline.evaluation import gallery
from pipeline.evaluation.knn import knn_accuracy
from pipeline.methods.base import Method
from pipeline.methods.registry import build_seeded_method
from pipeline.weights import from_checkpoint
from tests.helpers.runs import TOY, train

CPU = torch.device("cpu")


def toy(folder: Path, *overrides: str) -> Loaded:
    """A configuration over forty scenes of 32 pixels, twenty more to be judged, beside it ``run`` for the run."""
    scenes.write(folder / "scenes", train=40, val=20, size=32, seed=3)
    (folder / "toy.yaml").write_text(TOY)
    settings = [
        f"data.shards={folder}/scenes/*train-*.tar",
        f"data.index={folder}/index",
        f"run.directory={folder}/run",
        f"evaluation.knn={{enabled: true, k: [1, 5], val_shards: {folder}/scenes/*val-*.tar}}",
        "model.layer_scale=1.0",  # or all class tokens of fresh networks are alike, and their neighbours a matter of rounding
        "train.precision=fp32",
        *overrides,
    ]
    return load(folder / "toy.yaml", settings)


def write_checkpoint(run: Path, method: Method, *, step: int = 24, **facts: Any) -> Path:
    """A checkpoint as one rank writes it, with the method's teacher and without what training alone needs."""
    assert method.teacher is not None
    folder = run / "checkpoints" / f"step_{step:09d}"
    folder.mkdir(parents=True)
    teacher = dict(method.teacher.named_parameters())
    save_file({f"teacher/{name}": t.detach().flatten() for name, t in teacher.items()}, folder / "rank_00000.safetensors")
    save_file({f"teacher/{name}": t for name, t in method.teacher.named_buffers()}, folder / "whole.safetensors")
    manifest = {
        "format": 1,
        "step": step,
        "samples_seen": 16 * step,
        "world": 1,
        "shapes": {name: list(t.shape) for name, t in teacher.items()},
        "fragments": [{name: [0, t.numel()] for name, t in teacher.items()}],
        "files": [entry(folder / "rank_00000.safetensors"), entry(folder / "whole.safetensors")],
        **facts,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def changed(method: Method, seed: int) -> Method:
    """The method with other weights in its teacher."""
    assert method.teacher is not None
    generator = torch.Generator().manual_seed(seed)
    for _, weight in method.teacher.named_parameters():
        weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return method


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Method]:
    """A run whose newest checkpoint holds weights that no seed gives; an older one holds others."""
    loaded = toy(tmp_path_factory.mktemp("judged"))
    write_checkpoint(loaded.config.run.folder, build_seeded_method(loaded.config, CPU), step=12)
    method = changed(build_seeded_method(loaded.config, CPU), 1)
    write_checkpoint(loaded.config.run.folder, method)
    return loaded, method


def accuracy(loaded: Loaded, method: Method) -> dict[int, float]:
    """k-NN from first principles: class tokens of all pictures, every similarity."""
    config, inputs = loaded.config, prepare(loaded.config, 1)
    assert inputs.bank is not None and inputs.queries is not None
    shown = gallery.Gallery(config, inputs, {"trained": method.export()["backbone"]}, 32, CPU)
    bank, classes = shown.classes(inputs.bank, inputs.bank.ids())
    queries, answers = shown.classes(inputs.queries, inputs.queries.ids())
    return knn_accuracy(queries, torch.tensor(answers), bank, torch.tensor(classes), ks=(1, 5))


def test_the_newest_teacher_is_judged_beside_the_fresh_network(judged: tuple[Loaded, Method]) -> None:
    loaded, method = judged
    scores = evaluate.scores(loaded.config, loaded.config.run.folder)
    fresh = build_seeded_method(loaded.config, CPU)
    assert scores["trained"] == accuracy(loaded, method)
    assert scores["untrained"] == accuracy(loaded, fresh)
    assert scores["trained"] != scores["untrained"]
    assert set(scores["pixels"]) == {1, 5}
    assert not torch.distributed.is_initialized()


def test_the_teacher_comes_back_bit_for_bit(judged: tuple[Loaded, Method]) -> None:
    loaded, method = judged
    back = from_checkpoint.load_trained(loaded.config, from_checkpoint.newest(loaded.config.run.folder), CPU)
    assert method.teacher is not None and back.teacher is not None
    for name, weight in method.teacher.state_dict().items():
        assert torch.equal(back.teacher.state_dict()[name], weight), name


def test_eval_prints_a_table_and_writes_the_numbers_down(
    judged: tuple[Loaded, Method], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    loaded, _ = judged
    run = loaded.config.run.folder
    assert evaluate.run(run, loaded) == 0
    told = json.loads((run / "evaluation.json").read_text())
    assert (told["checkpoint"], told["step"], told["voters"], told["judged"], told["classes"]) == (
        "step_000000024",
        24,
        40,
        20,
        10,
    )
    out = capsys.readouterr().out
    for source, words in evaluate.SOURCES.items():
        row = next(line for line in out.splitlines() if words in line)
        assert all(f"{100 * value:.1f} %" in row for value in told["knn"][source].values())


def test_a_checkpoint_may_be_named_and_a_damaged_one_is_refused(judged: tuple[Loaded, Method], tmp_path: Path) -> None:
    loaded, _ = judged
    run = loaded.config.run.folder
    older = run / "checkpoints" / "step_000000012"
    assert evaluate.run(run, loaded, checkpoint=older, output=tmp_path / "scores.json") == 0
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told["step"] == 12 and told["knn"]["trained"] == told["knn"]["untrained"], "its weights are the fresh ones"
    shutil.copytree(older, tmp_path / "step_000000012")
    (tmp_path / "step_000000012" / "whole.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        evaluate.run(run, loaded, checkpoint=tmp_path / "step_000000012")


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    loaded = toy(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint yet.*checkpoint\.every"):
        evaluate.run(tmp_path / "run", loaded)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_architecture_is_refused_by_name_and_shapes(judged: tuple[Loaded, Method]) -> None:
    config = judged[0].config
    wider = config.replace(model=config.model.model_copy(update={"embed_dim": 48}))
    with pytest.raises(
        CheckpointError, match=r"backbone\.mask_token: \[1, 1, 32\] in the checkpoint, \[1, 1, 48\] in the settings"
    ):
        from_checkpoint.load_trained(wider, from_checkpoint.newest(config.run.folder), CPU)
    deeper = config.replace(model=config.model.model_copy(update={"depth": 2}))
    with pytest.raises(CheckpointError, match=r"blocks\.1\..*absent in the checkpoint"):
        from_checkpoint.load_trained(deeper, from_checkpoint.newest(config.run.folder), CPU)


def test_without_validation_shards_their_setting_is_named(judged: tuple[Loaded, Method], tmp_path: Path) -> None:
    config = judged[0].config
    for shard in expand(config.data.shards):
        (tmp_path / Path(shard).name).symlink_to(shard)
    knn = config.evaluation.knn.model_copy(update={"val_shards": None})
    data = config.data.model_copy(update={"shards": (f"{tmp_path}/*train-*.tar",)})
    nowhere = config.replace(data=data, evaluation=config.evaluation.model_copy(update={"knn": knn}))
    with pytest.raises(DataError, match=r"evaluation\.knn\.val_shards: there are no validation shards .*val-\*\.tar"):
        evaluate.scores(nowhere, config.run.folder)


def test_shards_without_classes_are_refused_before_any_network_is_built(judged: tuple[Loaded, Method], tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "plain") as writer:
        for number in range(3):
            picture = io.BytesIO()
            Image.fromarray(scenes.render(0, number, 32).image).save(picture, "PNG")
            writer.write({"__key__": str(number), "png": picture.getvalue()})
    config = judged[0].config
    knn = config.evaluation.knn.model_copy(update={"val_shards": (f"{tmp_path}/plain-*.tar",)})
    plain = config.replace(evaluation=config.evaluation.model_copy(update={"knn": knn}))
    with pytest.raises(DataError, match=r"evaluation\.knn\.val_shards: the shards to be judged have no class number.*\.cls"):
        evaluate.labelled(plain)


@pytest.mark.slow
def test_eval_agrees_with_what_training_measured(tmp_path: Path) -> None:
    loaded = toy(tmp_path)
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
    measured = json.loads((run / "outcome.json").read_text())["scores"]
    scores = evaluate.scores(loaded.config, run)
    names = {"knn": "trained", "untrained": "untrained", "pixels": "pixels"}
    assert {f"{name}/k{k}": scores[source][k] for name, source in names.items() for k in (1, 5)} == measured
