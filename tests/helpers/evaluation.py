"""Runs, checkpoints and image sets for tests of evaluations and of what reads their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pipeline.checkpoint.files import entry
from pipeline.config.load import Loaded, load, show
from pipeline.data.index.manifest import Manifest
from pipeline.data.pack import synthetic as scenes
from pipeline.evaluation.images import EvalData, ImageSet, Placement
from pipeline.evaluation.settings import KnnSettings
from pipeline.methods.base import Method
from pipeline.methods.registry import build_seeded_method
from tests.helpers.runs import TOY

CPU = torch.device("cpu")


def toy(folder: Path, *overrides: str) -> Loaded:
    """A configuration over 40 training scenes of 32 pixels and 20 validation scenes, beside it ``run`` for the run."""
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


def write_run(loaded: Loaded) -> Path:
    """A run with a checkpoint of weights that no seed gives, with its settings beside it."""
    folder = loaded.config.run.folder
    settings = loaded.config.model_dump(mode="json")
    write_checkpoint(folder, changed(build_seeded_method(loaded.config, CPU), 1), config=settings)
    (folder / "config.yaml").write_text(show(loaded))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def changed(method: Method, seed: int) -> Method:
    """The method with other weights in its teacher."""
    assert method.teacher is not None
    generator = torch.Generator().manual_seed(seed)
    for _, weight in method.teacher.named_parameters():
        weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return method


def image_set(manifest: Manifest, *, size: int, batch_size: int, **options: Any) -> ImageSet:
    """This rank's images of a data set, in the process group that is there."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    options = {"limit": None, **options}
    return ImageSet(manifest, size=size, batch_size=batch_size, rank=rank, world_size=world_size, device=CPU, **options)


def eval_data(
    *,
    size: int = 16,
    bank: ImageSet | None = None,
    queries: ImageSet | None = None,
    class_maps: tuple[Manifest, Manifest] | None = None,
) -> EvalData:
    """Evaluation data with given image sets, in the process group that is there."""
    placement = Placement(size=size, rank=dist.get_rank(), world_size=dist.get_world_size(), device=CPU)
    data = EvalData(placement, KnnSettings(), class_maps=class_maps)
    vars(data).update({name: images for name, images in (("bank", bank), ("queries", queries)) if images is not None})
    return data
