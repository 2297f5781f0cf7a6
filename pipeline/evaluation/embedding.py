"""Embeds data sets: the features of every sample of some shards, by all ranks together, into a folder of Parquet files.

The ranks take parts of shards from a shared counter, and a part's batches are the same whichever rank takes it, so that the bytes
of the folder depend neither on the number of ranks nor on interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.schema import Config
from pipeline.config.sizes import Size, height_width, is_divisible, size_text
from pipeline.data.augment.views import Normalize
from pipeline.data.embeddings.document import (
    DType,
    EmbeddedChannels,
    EmbeddingDocument,
    EmbeddingSpec,
    ImageSpec,
    Pooling,
    WeightsSpec,
)
from pipeline.data.embeddings.document import load as load_document
from pipeline.data.embeddings.work import EmbeddingFolder, check_directory
from pipeline.data.index.manifest import Manifest
from pipeline.data.indexing import Indexer
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.embedding_worker import EmbedWorker, Report
from pipeline.evaluation.runner import check_channels, eval_model_of, evaluated_modules
from pipeline.methods.registry import build_seeded_method
from pipeline.models.eval_model import EvalModel
from pipeline.runtime.process_group import World
from pipeline.untrusted import shown_address
from pipeline.weights import pretrained
from pipeline.weights.from_checkpoint import fill_trained, named_or_newest


@dataclass(frozen=True)
class EmbedRequest:
    """What to embed.

    Attributes:
        directory: the folder of embeddings.
        run: the run whose checkpoint embeds; ``None`` for pretrained weights.
        source: the run, checkpoint or weights as they were named.
        checkpoint: of the run, instead of its newest.
        pooling: class token, mean of the patch tokens, or patch tokens.
        patches: patch tokens of each image with the pooling ``patches``; all if the network has fewer.
        dtype: of the stored numbers.
        size: side, or height and width, of the images in pixels; by default that of the network.
        batch_size: images of a forward pass.
        timm_name: timm architecture name of a weights file.
        overwrite: replace embeddings that are there.
    """

    directory: Path
    source: str
    run: Path | None = None
    checkpoint: Path | None = None
    pooling: Pooling = "cls"
    patches: int = 16
    dtype: DType = "float16"
    size: Size | None = None
    batch_size: int = 256
    timm_name: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class EmbedResult:
    """How a start ended; the same on all ranks, but for the description.

    Attributes:
        state: ``finished``, ``complete`` if everything was there already, or ``stopped``.
        document: the description of the folder, on the first rank and unless stopped.
        reasons: bad samples by reason, likewise.
        embedded: images of this start.
        seconds: of this start.
    """

    state: str
    document: EmbeddingDocument | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    embedded: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Network:
    """The network, its input and its weights' description."""

    model: EvalModel
    size: Size
    normalize: Normalize
    weights: WeightsSpec


def index_shards(config: Config, *, reuse: bool = False, progress: Any = None) -> Manifest:
    """The index of the shards to embed, with every accepted sample.

    Args:
        config: the settings; the shards are ``data.shards``.
        reuse: another process has built it.
        progress: called after each shard that was indexed.

    Raises:
        DataError: no shard matches, or shards cannot be used.
    """
    return Indexer(config, progress, reuse).one(config.data.shards)


def embed(
    request: EmbedRequest,
    config: Config,
    world: World,
    *,
    report: Report = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> EmbedResult:
    """Embed the shards ``data.shards`` of the settings; all ranks call it together.

    Args:
        request: what to embed.
        config: settings of the run, or those of pretrained weights.
        world: this rank's position in the process group.
        report: receives the progress, on the first rank.
        stopping: asked after every batch whether to stop; all ranks then stop.

    Raises:
        FoveaError: weights or shards that cannot be used, a folder of other embeddings, or too many bad samples.
        OSError: the folder cannot be written.
    """
    threads = config.train.threads or 1
    torch.set_num_threads(threads)  # not as many as a rank may have: sums are rounded differently with other numbers
    manifest = index_shards(config, reuse=world.rank > 0)
    network = _load(request, config, world)
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        spec = _spec(request, network, EmbeddedChannels.of(config.data.channels), world.device, threads)
        folder = stack.enter_context(contextlib.closing(EmbeddingFolder(request.directory, spec, manifest)))
        start: list[Any] = [None, None, None, None]
        if world.rank == 0:
            state = folder.prepare(overwrite=request.overwrite)
            start = [manifest.fingerprint, state, *(([], []) if state == "complete" else folder.missing())]
        dist.broadcast_object_list(start, src=0, group=world.control)
        fingerprint, state, units, waiting = start
        if fingerprint != manifest.fingerprint:
            raise DataError(
                "this rank sees other shards than the first one",
                where=f"rank {world.rank}",
                hint="Give all nodes the same shards, and data.index a folder that they share",
            )
        if state == "complete":
            return EmbedResult("complete", load_document(request.directory) if world.rank == 0 else None)
        worker = EmbedWorker(folder, network.model, config, world, units, report=report, stopping=stopping)
        if worker.run(waiting):
            return EmbedResult("stopped", embedded=worker.embedded, seconds=worker.seconds)
        document, reasons = folder.finish() if world.rank == 0 else (None, Counter())
    return EmbedResult("finished", document, reasons, worker.embedded, worker.seconds)


# ---- the network ----------------------------------------------------------------------------------------------------------


def _load(request: EmbedRequest, config: Config, world: World) -> _Network:
    if request.run is None:
        loaded = pretrained.load(request.source, model=request.timm_name, device=world.device)
        model, native, name = loaded.subject, loaded.size, loaded.name
        normalize = Normalize(model.mean, model.std)
        check_channels(model, config)
    else:
        chosen: list[Any] = [None]
        if world.rank == 0:
            chosen = [named_or_newest(request.run, request.checkpoint).path]
        dist.broadcast_object_list(chosen, src=0, group=world.control)
        saved = named_or_newest(request.run, chosen[0])
        method = build_seeded_method(config, world.device)
        fill_trained(method, saved)
        for module in evaluated_modules(method):
            module.eval()
        view = method.views[0]
        native, name, normalize = view.size, saved.path.name, view.normalize or Normalize()
        model = eval_model_of(method, config, world.device)
    size = request.size or config.evaluation.knn.image_size or native
    if not is_divisible(size, model.tower.patch):
        raise ConfigError(
            f"{size_text(size)} must be a multiple of the patch size {model.tower.patch}",
            where="--size",
            hint="Choose another size",
        )
    source = shown_address(str(request.source), limit=4096)
    return _Network(model, size, normalize, WeightsSpec(source, name, weights_digest(model)))


def weights_digest(model: EvalModel) -> str:
    """SHA-256 over names, types, shapes and values of the tensors of a network, hex; independent of how they are stored."""
    tower: Any = model.tower
    module: nn.Module = tower if isinstance(tower, nn.Module) else tower.module
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _spec(
    request: EmbedRequest, network: _Network, channels: EmbeddedChannels | None, device: torch.device, threads: int
) -> EmbeddingSpec:
    """The description of the embeddings, for which one blank image is embedded."""
    count = len(network.normalize.mean)
    tokens = network.model.tokens(torch.zeros(1, count, *height_width(network.size), device=device))
    dim = tokens.cls.shape[-1] if request.pooling == "cls" else tokens.patches.shape[-1]
    patches = min(request.patches, tokens.patches.shape[1]) if request.pooling == "patches" else 0
    return EmbeddingSpec(
        pooling=request.pooling,
        dim=int(dim),
        dtype=request.dtype,
        patches=int(patches),
        weights=network.weights,
        image=ImageSpec(size=network.size, mean=network.normalize.mean, std=network.normalize.std, channels=channels),
        batch_size=request.batch_size,
        precision=network.model.precision,
        device=device.type,
        threads=threads if device.type == "cpu" else 0,
    )


def check_request(request: EmbedRequest, config: Config) -> None:
    """Detect what cannot be embedded before any rank is started; indexes the shards on the way.

    Raises:
        FoveaError: no checkpoint, shards that cannot be used, pyarrow is missing, or a folder of other files.
    """
    check_directory(request.directory)
    if request.run is not None:
        named_or_newest(request.run, request.checkpoint)
    index_shards(config)
