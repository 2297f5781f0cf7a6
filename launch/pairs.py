"""``fovea eval --zeroshot --retrieval``: pictures against texts, by a run's newest checkpoint and by the untrained network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.evaluate import fill_trained, newest, shown
from pipeline.config import Loaded
from pipeline.errors import ConfigError, DataError
from pipeline.settings import Config
from pipeline.training.evaluations import lines
from pipeline.training.inputs import indexed
from pipeline.training.run import RunDirectory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.recipes.contrastive import Contrastive

_TEXTS = 256  # encoded at a time


def run(directory: Path, loaded: Loaded, *, classes: Path | None, templates: Path | None, retrieval: bool) -> int:
    """Judge a run, print the table, write ``<run>/pairs.json``; returns the exit code.

    Args:
        directory: the run.
        loaded: its settings; ``evaluation.knn`` says on which shards, on how many samples, in what size.
        classes: file with the names of the classes, in the order of their numbers, for zero-shot classification.
        templates: file with sentences to put them in.
        retrieval: whether captions and pictures are looked for by each other.

    Raises:
        FoveaError: no checkpoint, a method without a text tower, unreadable files, or data without labels or captions.
    """
    config, saved = loaded.config, newest(directory)
    if not config.recipe.reads_text:
        raise ConfigError(
            f"{config.recipe.name} reads no captions", where="recipe.name", mend="Judge it with `fovea eval RUN` alone."
        )
    names = lines(classes, what="class names") if classes is not None else []
    from pipeline.evaluation.zeroshot import SIMPLE

    sentences = lines(templates, what="sentences", place="{}") if templates is not None else list(SIMPLE)
    found, samples = _judge(config, saved, names, sentences, retrieval)
    document: dict[str, Any] = {
        "checkpoint": saved.path.name,
        "step": saved.step,
        "samples_seen": int(saved.manifest.get("samples_seen", 0)),
        "samples": samples,
        "classes": len(names),
        "templates": sentences if names else [],
        "scores": found,
    }
    RunDirectory(directory).write("pairs.json", document)
    _print(document)
    return 0


def _judge(
    config: Config, saved: Any, names: list[str], sentences: list[str], retrieval: bool
) -> tuple[dict[str, dict[str, float]], int]:
    import torch

    from pipeline.data.random import permutation
    from pipeline.recipes.contrastive import Contrastive
    from pipeline.training.assemble import make_recipe

    device = torch.device("cuda" if torch.cuda.is_available() and config.launch.backend != "gloo" else "cpu")
    manifest = indexed(config, config.validation_shards)
    ids, most = manifest.ids(), config.evaluation.knn.max_val
    if most is not None and most < len(ids):
        ids = ids[sorted(permutation(len(ids), 0, 0xE7A1)[:most])]
    recipe = make_recipe(config, device)
    if not isinstance(recipe, Contrastive):
        raise ConfigError(f"{config.recipe.name} has no text tower", where="recipe.name", mend="Judge it with `fovea eval RUN`.")
    view = recipe.views[0]
    size = config.evaluation.knn.size or view.size
    batches = list(shown(config, manifest, ids, size, device, view.normalize))
    labels = torch.cat([batch.labels for batch in batches]).cpu()
    captions = [caption for batch in batches for caption in batch.captions or []]
    if names and (int(labels.min()) < 0 or int(labels.max()) >= len(names)):
        raise DataError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, but {len(names)} classes are named",
            where="--zeroshot",
            mend="Name every class, in the order of the numbers, and judge shards whose samples all have one.",
        )
    if retrieval and not all(caption.strip() for caption in captions):
        raise DataError("some samples have no caption", where="--retrieval", mend="Judge shards whose samples all have one.")
    found = {}
    for source in ("untrained", "trained"):
        if source == "trained":
            fill_trained(recipe, saved)
        recipe.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            images = torch.cat([recipe.encode_images(batch.views["image"][0]).float().cpu() for batch in batches])
            found[source] = _scores(recipe, images, labels, captions if retrieval else [], names, sentences, device)
    return found, len(labels)


def _scores(
    recipe: Contrastive,
    images: Tensor,
    labels: Tensor,
    captions: list[str],
    names: list[str],
    sentences: list[str],
    device: torch.device,
) -> dict[str, float]:
    import torch

    from pipeline.data.text import tokenizer
    from pipeline.evaluation.retrieval import retrieval
    from pipeline.evaluation.zeroshot import class_vectors, classified

    if recipe.text is None:
        return {}
    tokens = tokenizer(recipe.text)

    def encode(texts: list[str]) -> Tensor:
        return recipe.encode_texts(torch.from_numpy(tokens(texts)).to(device)).float().cpu()

    scores: dict[str, float] = {}
    if names:
        found = classified(images, class_vectors(encode, names, sentences), labels)
        scores |= {f"zeroshot/{name}": value for name, value in found.items()}
    if captions:
        # Pictures told of in the same words share a number: any of them is a right answer.
        first = {caption: number for number, caption in reversed(list(enumerate(captions)))}
        numbers = torch.tensor([first[caption] for caption in captions])
        texts = torch.cat([encode(captions[low : low + _TEXTS]) for low in range(0, len(captions), _TEXTS)])
        found = retrieval(images, texts, numbers, numbers)
        scores |= {f"retrieval/{name}": value for name, value in found.items()}
    return scores


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Pictures and texts of {document['checkpoint']}", title_justify="left")
    table.add_column("score")
    scores = document["scores"]
    for source in scores:
        table.add_column(source, justify="right")
    for name in scores["trained"]:
        form = "{:.1f}" if name.endswith("_rank") else "{:.1%}"
        table.add_row(name, *(form.format(row[name]) for row in scores.values()))
    console = Console()
    console.print(table)
    chance = f"; guessing is right in {100 / document['classes']:.1f} %" if document["classes"] else ""
    console.print(f"after {document['samples_seen']:,} samples; {document['samples']:,} pictures judged{chance}", highlight=False)
