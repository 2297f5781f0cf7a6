"""Validates combinations of settings that are valid on their own. Does not import torch."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import TypeVar

from pipeline.config.schema import METHODS, Config
from pipeline.config.sizes import Size, grid_of, height_width, is_divisible, nearest_sizes
from pipeline.config.types import Length
from pipeline.data.augment.settings import MultiCropSettings
from pipeline.masking import NO_PASSWORD, UNPRINTABLE, has_password, printable, shown_address
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.methods.mocov3.settings import Mocov3Settings
from pipeline.methods.shared.two_views_settings import TwoViewSettings
from pipeline.models.settings import ModelSettings

_T = TypeVar("_T")


def check(config: Config) -> list[tuple[str, str]]:
    """Returns conflicts between settings as pairs of dotted key and message."""
    conflicts: list[tuple[str, str]] = [
        *_check_plain(config),
        *_check_addresses(config),
        *_check_model(config),
        *_check_method(config),
        *_check_adapt(config),
        *_check_guidance(config),
        *_check_channels(config),
    ]
    if config.launch.num_processes is not None:
        conflicts += check_ranks(config, config.launch.num_processes)
    elif config.train.micro_batch_size and config.train.global_batch_size % config.train.micro_batch_size:
        conflicts.append(("train.global_batch_size", _indivisible(config, 1)))
    conflicts += check_devices(config, on_gpu=config.launch.backend == "nccl")
    knn = config.evaluation.knn
    if config.evaluation.needing("bank") and knn.val_shards is not None and set(knn.val_shards) & set(config.voting_shards):
        conflicts.append(
            ("evaluation.knn.val_shards", "evaluation.knn.val_shards names the shards of the feature bank; choose others")
        )
    if knn.max_train is not None and max(knn.k) > knn.max_train:
        conflicts.append(
            (
                "evaluation.knn.k",
                f"evaluation.knn.k = {max(knn.k)}: more neighbours than evaluation.knn.max_train = {knn.max_train}",
            )
        )
    conflicts += _check_evaluation(config)
    if config.train.offload == "cpu" and (config.train.zero_stage == 0 or config.optim.name != "adamw"):
        message = (
            "train.offload = cpu: needs train.zero_stage of 1 to 3, which give each rank a share to keep, and optim.name=adamw"
        )
        conflicts.append(("train.offload", message))
    moving = config.train.zero_stage == 3 or config.train.activation_checkpointing or config.train.micro_batch_size is not None
    if config.train.cuda_graphs and (moving or not config.train.compile):
        message = (
            "train.cuda_graphs: needs train.compile=true, weights that stay where they are (train.zero_stage of 0 to 2), and "
        )
        message += "neither train.activation_checkpointing nor train.micro_batch_size"
        conflicts.append(("train.cuda_graphs", message))
    if config.train.fp8 != "off" and config.train.precision != "bf16":
        message = f"train.fp8 = {config.train.fp8}: needs train.precision=bf16, not {config.train.precision}"
        conflicts.append(("train.fp8", message))
    if config.launch.deepspeed_init == "accelerate" and importlib.util.find_spec("transformers") is None:
        message = (
            "launch.deepspeed_init = accelerate: needs transformers, as accelerate does for DeepSpeed; pip install transformers"
        )
        conflicts.append(("launch.deepspeed_init", message))
    duration = config.train.duration
    if duration.amount == 0:
        conflicts.append(("train.duration", "train.duration = 0: must be longer than 0"))
    warmup = config.schedule.lr.warmup
    if warmup.unit == duration.unit and warmup.amount > duration.amount:
        conflicts.append(
            ("schedule.lr.warmup", f"schedule.lr.warmup = {warmup}: longer than the run, train.duration = {duration}")
        )
    best, scores = config.checkpoint.keep_best, config.evaluation.scores
    if best is not None and best not in scores:
        hint = f"choose one of {', '.join(scores)}" if scores else "set evaluation.knn.enabled=true for knn/k10 and the like"
        conflicts.append(
            ("checkpoint.keep_best", f"checkpoint.keep_best = {best}: no evaluation of this run computes it; {hint}")
        )
    if config.checkpoint.snapshot_every is not None and not config.launch.restarts:
        message = (
            f"checkpoint.snapshot_every = {config.checkpoint.snapshot_every}: has no effect while launch.restarts = 0; set that"
        )
        conflicts.append(("checkpoint.snapshot_every", message))
    distances = (
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep_every", config.checkpoint.keep_every),
        ("checkpoint.snapshot_every", config.checkpoint.snapshot_every),
        *((f"evaluation.{name}.every", config.evaluation.section(name).every) for name in config.evaluation.evaluators()),
    )
    for key, length in distances:
        if length is not None and length.amount == 0:
            conflicts.append((key, f"{key} = 0: must be longer than 0"))
    return conflicts


def _check_evaluation(config: Config) -> list[tuple[str, str]]:
    e, conflicts = config.evaluation, []
    s = e.segmentation
    if s.enabled:
        for key in ("train_shards", "val_shards", "num_classes"):
            if getattr(s, key) is None:
                conflicts.append((f"evaluation.segmentation.{key}", f"evaluation.segmentation.{key} is required"))
        if s.class_names and s.num_classes is not None and len(s.class_names) != s.num_classes:
            message = f"evaluation.segmentation.class_names: {len(s.class_names)} names of {s.num_classes} classes"
            conflicts.append(("evaluation.segmentation.class_names", message))
        if s.train_shards and s.val_shards and set(s.train_shards) & set(s.val_shards):
            message = "evaluation.segmentation.val_shards names the shards that the classifier is trained on; choose others"
            conflicts.append(("evaluation.segmentation.val_shards", message))
    if e.zeroshot.enabled and e.zeroshot.class_names is None:
        conflicts.append(("evaluation.zeroshot.class_names", "evaluation.zeroshot.class_names is required: a text file"))
    for name in e.enabled:
        if "text_encoder" in e.section(name).needs and not config.method.reads_text:
            conflicts.append((f"evaluation.{name}.enabled", f"evaluation.{name}.enabled: {config.method.name} reads no captions"))
    if e.robustness.enabled and config.train.zero_stage == 3:
        message = "evaluation.robustness.enabled: no gradient flows into images with train.zero_stage = 3; use `fovea eval RUN`"
        conflicts.append(("evaluation.robustness.enabled", message))
    return conflicts


def check_ranks(config: Config, ranks: int) -> list[tuple[str, str]]:
    """Returns conflicts with the number of ranks; called again once that number is known."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size or 1
    return [("train.global_batch_size", _indivisible(config, ranks))] if batch % (ranks * micro) else []


def check_devices(config: Config, *, on_gpu: bool) -> list[tuple[str, str]]:
    """Returns conflicts with the devices of the ranks; called again once they are known."""
    if config.train.verify_every is None or not on_gpu or config.train.deterministic:
        return []
    message = (
        f"train.verify_every = {config.train.verify_every}: a GPU gives other bits when it does a step again, unless its "
        "operations are deterministic; set train.deterministic=true as well, in a new run"
    )
    return [("train.verify_every", message)]


def _indivisible(config: Config, ranks: int) -> str:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size or 1
    unit = ranks * micro
    near = [str(number) for number in (batch // unit * unit, (batch // unit + 1) * unit) if number > 0]
    parts = [f"{ranks} ranks"] * (ranks > 1) + [f"train.micro_batch_size = {micro}"] * (micro > 1)
    return f"train.global_batch_size = {batch}: is not divisible by {' times '.join(parts)}; {' or '.join(near)} would"


def _check_addresses(config: Config) -> Iterator[tuple[str, str]]:
    """No setting may contain a password: settings end up in files, logs, reports and MLflow."""
    if config.tracking.uri is not None and has_password(config.tracking.uri):
        yield "tracking.uri", f"tracking.uri = {shown_address(config.tracking.uri)}: {NO_PASSWORD}"
    document = config.model_dump(mode="json")
    document["tracking"].pop("uri", None)
    for key, text in _texts(document):
        if has_password(text):
            message = (
                "must not carry a user name or password; storage takes credentials from the environment, or use a signed link"
            )
            yield key, f"{key} = {shown_address(text)}: {message}"


def _check_plain(config: Config) -> Iterator[tuple[str, str]]:
    """Strings must be printable and integers must fit 64 bits: both end up in scripts, logs, file names and arithmetic."""
    document = config.model_dump(mode="json")
    for key, text in _texts(document):
        if UNPRINTABLE.search(text):
            yield key, f"{key} = {printable(text, limit=80)}: must not contain line breaks or other control characters"
    for key, number in _leaves(document, int):
        if abs(number) >= 1 << 63:
            yield key, f"{key} = {str(number)[:20]}…: must be less than {1 << 63}"


def _texts(value: object) -> Iterator[tuple[str, str]]:
    return _leaves(value, str)


def _leaves(value: object, kind: type[_T], key: str = "") -> Iterator[tuple[str, _T]]:
    if isinstance(value, kind):
        yield key, value
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _leaves(inner, kind, f"{key}.{name}" if key else str(name))
    for inner in value if isinstance(value, list) else ():
        yield from _leaves(inner, kind, key)


def _check_model(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    shape = {name: getattr(model, name) for name in ("embed_dim", "depth", "num_heads", "patch_size")}
    yield from _check_start(model)
    yield from _check_resnet(config)
    if model.timm_name is None:
        if missing := [name for name, value in shape.items() if value is None]:
            yield "model", f"model.{missing[0]} is required: give model.timm_name, or model.{', '.join(shape)}"
        elif model.embed_dim and model.num_heads and model.embed_dim % model.num_heads:
            yield (
                "model.embed_dim",
                f"model.embed_dim = {model.embed_dim}: is not divisible by model.num_heads = {model.num_heads}",
            )
        if model.stem.startswith("small"):
            yield (
                "model.stem",
                f"model.stem = {model.stem}: applies to a ResNet only; give model.timm_name, or choose patch or conv",
            )
        return
    if "resnet" in model.timm_name:
        if model.stem == "conv":
            yield "model.stem", "model.stem = conv: applies to a transformer only; choose patch (as timm has it) or small"
        model = model.model_copy(update={"stem": "patch"})
    names = ("mlp_ratio", "registers", "stem", "ffn", "pos_embed", "rope_base", "activation", "pre_norm", "norm_eps", "pooling")
    fixed = {**shape, **{name: getattr(model, name) for name in names}}
    for name, value in fixed.items():
        if value != type(model).model_fields[name].default:
            yield (
                f"model.{name}",
                f"model.{name} = {value}: has no effect beside model.timm_name = {model.timm_name}; remove one of the two",
            )


def _check_start(model: ModelSettings) -> Iterator[tuple[str, str]]:
    """Checks initial weights and extra parameters that the encoder does not support."""
    resnet, rotary = "resnet" in (model.timm_name or ""), model.pos_embed == "rope"
    fitting = {"timm", "dino", "mocov3", "simclr", "byol"} if resnet else {"timm", "dino", "mocov3", "open_clip"}
    fitting -= {"mocov3", "open_clip"} if rotary else set()
    if model.init not in fitting:
        kind = "ResNet" if resnet else "tower with rotary positions" if rotary else "transformer"
        yield "model.init", f"model.init = {model.init}: does not apply to a {kind}; choose one of {', '.join(sorted(fitting))}"
    if model.cls_pos_embed and (resnet or rotary or (model.timm_name is None and not model.registers)):
        yield (
            "model.cls_pos_embed",
            "model.cls_pos_embed = true: needs learned positions and model.registers of 1 or more; set it to false",
        )


def _check_resnet(config: Config) -> Iterator[tuple[str, str]]:
    """Checks what only a ResNet has, and where there can be none."""
    model, name = config.model, config.model.timm_name or ""
    if "resnet" not in name:
        for key in ("resnet_width", "resnet_blocks", "channels_last"):
            if getattr(model, key) not in (None, False):
                yield f"model.{key}", f"model.{key}: applies to a ResNet only; set model.timm_name=resnet18, or remove it"
        return
    if not isinstance(config.method, TwoViewSettings):
        message = f"model.timm_name = {name}: {config.method.name} needs a vision transformer; choose one of timm's vit_* models"
        yield "model.timm_name", message
    elif isinstance(config.method, Mocov3Settings):
        if config.method.freeze_patches:
            yield "method.freeze_patches", "method.freeze_patches = true: a ResNet has no patch embedding; set it to false"
        if config.method.pos_embed != "learned":
            yield "method.pos_embed", "method.pos_embed = sincos: a ResNet has no position embeddings; set it to learned"
    if name.endswith(("_pruned", "_gn")):
        message = f"model.timm_name = {name}: is not a plain ResNet with batch norm; choose resnet18, resnet34 or resnet50"
        yield "model.timm_name", message


def _check_method(config: Config) -> Iterator[tuple[str, str]]:
    sizes = _sizes(config)
    yield from _check_rectangles(config)
    yield from _check_curriculum(config)
    idle = [key for key, size in sizes.items() if size and "gram_size" in key]
    if idle and getattr(config.method, "gram_weight", 0) == 0:
        yield (
            _setting(idle[0]),
            f"{idle[0]} = {sizes[idle[0]]}: has no effect while method.gram_weight = 0; set that, or leave it null",
        )
    patch, side = config.model.patch_side, config.method.views.global_size
    if patch is None:  # of a name that does not say it: the rest is checked when the network is built
        return
    if isinstance(side, int) and side % patch == 0 and getattr(config.method, "mask_unit", "") == "cells" and side // patch % 2:
        yield (
            "method.mask_unit",
            f"method.mask_unit = cells: {side // patch} patches a side make no cells of 2 x 2; choose patch, or another size",
        )
    for key, size in sizes.items():
        if size is not None and not is_divisible(size, patch):
            near = [str(size) if isinstance(size, int) else f"[{size[0]}, {size[1]}]" for size in nearest_sizes(size, patch)]
            shown = size if isinstance(size, int) else list(size)
            yield _setting(key), f"{key} = {shown}: is not divisible by the patch side {patch}; {' or '.join(near)} would"
    fewest = min(math.prod(grid_of(size, patch)) for key, size in sizes.items() if size and "global" in key)
    if getattr(config.method, "mask_probability", 0) and fewest < 2:
        yield (
            "method.mask_probability",
            "method.mask_probability: an image of a single patch leaves nothing to mask; make views larger or patches smaller",
        )


def _sizes(config: Config) -> dict[str, Size | None]:
    """Sizes of the views of a method by dotted key, of all stages and resolutions."""
    views = config.method.views
    local = isinstance(views, MultiCropSettings) and views.local_count > 0
    sizes: dict[str, Size | None] = {"method.views.global_size": views.global_size}
    if isinstance(views, MultiCropSettings) and local:
        sizes["method.views.local_size"] = views.local_size
    for number, stage in enumerate(views.curriculum):
        own = ("global_size", "local_size") if local else ("global_size",)
        sizes |= {f"method.views.curriculum.{number}.{name}": getattr(stage, name) for name in own}
    if isinstance(config.method, Dinov2Settings):
        sizes["method.gram_size"] = config.method.gram_size
        names = ("global_size", "local_size", "gram_size") if local else ("global_size", "gram_size")
        for number, resolution in enumerate(config.method.resolutions):
            sizes |= {f"method.resolutions.{number}.{name}": getattr(resolution, name) for name in names}
    return sizes


def _setting(key: str) -> str:
    """The setting that a file gives, for the key of a size: stages and resolutions are lists."""
    lists = ("method.views.curriculum", "method.resolutions")
    return next((name for name in lists if key.startswith(name)), key)


def _check_curriculum(config: Config) -> Iterator[tuple[str, str]]:
    """Checks the stages of sizes; how many steps they have is checked once the size of an epoch is known."""
    views, duration, key = config.method.views, config.train.duration, "method.views.curriculum"
    if views.curriculum and not config.method.resizable:
        able = ", ".join(name for name, settings in METHODS.items() if settings.resizable)
        yield key, f"{key}: the views of {config.method.name} have one size; leave it empty, or choose {able}"
    before: Length | None = None
    for number, stage in enumerate(views.curriculum):
        until = f"{key}.{number}.until = {stage.until}"
        if stage.until.amount == 0:
            yield key, f"{until}: must be longer than 0"
        if before is not None and before.unit == stage.until.unit and before.amount >= stage.until.amount:
            yield key, f"{until}: must be later than the end of the stage before, {before}"
        if stage.until.unit == duration.unit and stage.until.amount >= duration.amount:
            yield key, f"{until}: leaves no step of the full size in train.duration = {duration}; end it earlier"
        before = stage.until
        if stage.patch_dropout and not config.method.drops_patches:
            able = ", ".join(name for name, settings in METHODS.items() if settings.drops_patches)
            yield key, f"{key}.{number}.patch_dropout: {config.method.name} uses all patches; set it to 0, or choose {able}"
        elif stage.patch_dropout and "resnet" in (config.model.timm_name or ""):
            yield key, f"{key}.{number}.patch_dropout: a ResNet has no patches; set it to 0, or choose a vit_* model"
        if not stage.patch_dropout and views.at(stage) == views.model_copy(update={"curriculum": ()}):
            yield key, f"{key}.{number}: has the full sizes; set another global_size, or patch_dropout, or remove it"
        if getattr(stage, "local_size", None) is not None and not getattr(views, "local_count", 0):
            yield key, f"{key}.{number}.local_size: has no effect while method.views.local_count = 0; remove it"
        for name in ("global_size", "local_size"):
            own = getattr(stage, name, None)
            (height, width), (full_height, full_width) = (height_width(size or 1) for size in (own, getattr(views, name, None)))
            if own is not None and height * full_width != width * full_height:
                shown = own if isinstance(own, int) else list(own)
                message = f"{key}.{number}.{name} = {shown}: has another aspect ratio than method.views.{name}, which is that of "
                yield key, message + "the crops; choose sides in its proportion"


def _check_rectangles(config: Config) -> Iterator[tuple[str, str]]:
    """Checks what needs square views, where they have a height and a width; needs no patch size."""
    method, size = config.method, config.method.views.global_size
    if isinstance(method, Dinov2Settings) and method.gram_weight:
        anchored = {"method.views.global_size": method}
        for number, resolution in enumerate(method.resolutions):
            own = resolution.global_size is not None
            where = f"method.resolutions.{number}.global_size" if own else "method.views.global_size"
            if method.at(resolution).gram_size:
                anchored[where] = method.at(resolution)
        for where, one in anchored.items():
            crops, gram = one.views.global_size, one.gram_size
            if gram and not isinstance(crops, int):
                message = f"{where} = {list(crops)}: the Gram anchor's features of another size ({gram}) need square views; "
                yield _setting(where), message + "choose a side, or leave gram_size null there and in method"
    if isinstance(size, int):
        return
    key = f"method.views.global_size = {list(size)}"
    if method.name == "detailclip":
        yield "method.views.global_size", f"{key}: detailclip masks and reconstructs square grids; choose a side"
    if config.evaluation.segmentation.enabled and config.evaluation.segmentation.image_size is None:
        message = f"{key}: class maps are evaluated on squares; set evaluation.segmentation.image_size to a side"
        yield "evaluation.segmentation.image_size", message


def _check_channels(config: Config) -> Iterator[tuple[str, str]]:
    """Checks what depends on whether images are 8-bit RGB or of declared channels."""
    channels, augment = config.data.channels, config.method.augment
    if channels is None:
        for name in ("gain", "offset", "noise", "channel_dropout"):
            if getattr(augment, name):
                key = f"method.augment.{name}"
                yield key, f"{key} = {getattr(augment, name)}: applies to data.channels only; set that, or this to 0"
        return
    for name in ("tifffile", "imagecodecs"):
        if importlib.util.find_spec(name) is None:
            yield "data.channels", f"data.channels: needs {name}, which is not installed; pip install 'fovea[scientific]'"
    if channels.mean is None:
        message = "data.channels.mean is required, with std: `fovea shards stats SHARDS --channels … --write FILE` measures both"
        yield "data.channels.mean", message
    if config.model.in_channels not in (None, channels.count):
        message = f"model.in_channels = {config.model.in_channels}: data.channels.count is {channels.count}; leave it null"
        yield "model.in_channels", message
    rule = config.init_from.input_channels
    if isinstance(rule, tuple) and len(rule) != channels.count:
        message = f"init_from.input_channels: {len(rule)} colours for {channels.count} channels; name one for each"
        yield "init_from.input_channels", message
    if config.evaluation.robustness.enabled:
        yield "evaluation.robustness.enabled", "evaluation.robustness.enabled: needs 8-bit RGB images, not data.channels"


def _check_adapt(config: Config) -> Iterator[tuple[str, str]]:
    """Checks what part of a pretrained tower is trained."""
    adapt = config.adapt
    if adapt.keeps_start and config.init_from.source is None:
        yield "adapt", "adapt: there is no start to keep; set init_from.source, or the preserve and l2 weights to 0"
    if adapt.train == "lora" and adapt.l2_to_start:
        yield "adapt.l2_to_start", "adapt.l2_to_start: the weights of adapters are decayed by schedule.weight_decay; set it to 0"
    if adapt.train == "all":
        return
    key = f"adapt.train = {adapt.train}"
    if config.init_from.source is None:
        yield "adapt.train", f"{key}: the rest of the tower would stay random; set init_from.source, or adapt.train=all"
    if adapt.train == "lora" and config.train.fp8 != "off":
        yield "train.fp8", f"{key}: adapters are not computed in 8 bits; set train.fp8=off"
    if isinstance(config.method, Dinov2Settings) and config.method.gram_update_every is not None:
        yield "method.gram_update_every", f"{key}: the Gram anchor stays at the start; leave method.gram_update_every null"


def _check_guidance(config: Config) -> Iterator[tuple[str, str]]:
    """Checks whether the method's student can be guided by metadata."""
    if not config.guidance.columns:
        return
    if not config.method.guidable:
        able = ", ".join(name for name, settings in METHODS.items() if settings.guidable)
        yield "guidance.columns", f"guidance.columns: does not apply to {config.method.name}; leave it empty, or choose {able}"
    if "resnet" in (config.model.timm_name or ""):
        yield (
            "guidance.columns",
            "guidance.columns: is for vision transformers; leave it empty, or choose a vit_* model",
        )
