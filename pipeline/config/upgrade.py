"""Upgrades settings that earlier versions of fovea stored in runs and checkpoints to the current keys.

Only files that fovea itself wrote are upgraded. Configs that users write must have the current keys.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

_MODEL = {
    "timm": "timm_name",
    "width": "embed_dim",
    "heads": "num_heads",
    "patch": "patch_size",
    "positions": "pos_embed",
    "position_resampling": "pos_embed_interpolation",
    "class_position": "cls_pos_embed",
    "drop_path_rates": "drop_path_schedule",
    "drop_path_mode": "batched_drop_path",
    "rope_rescale": "rope_rescale_coords",
    "rope_jitter": "rope_jitter_coords",
    "rope_shift": "rope_shift_coords",
    "local_norm": "untie_local_norm",
}

_RENAMED = {
    "checkpoint.asynchronous": "async_save",
    "checkpoint.copy_to": "mirror",
    "checkpoint.most_failures": "max_failures",
    "data.bad_budget": "max_bad_fraction",
    "data.bad_window": "bad_fraction_window",
    "data.block": "shuffle_block_size",
    "data.caption": "caption_extension",
    "data.crc": "verify_checksums",
    "data.damaged": "on_truncated_shard",
    "data.image": "image_extensions",
    "data.label": "label_extension",
    "data.lanes": "canonical_streams",
    "data.storage.grace": "outage_timeout",
    "data.storage.mode": "access",
    "data.storage.parallel": "download_concurrency",
    "data.storage.part_mb": "part_size_mb",
    "data.workers": "num_workers",
    "evaluation.budget": "max_time_percent",
    "evaluation.knn.batch": "batch_size",
    "evaluation.knn.size": "image_size",
    "evaluation.linear.batch": "batch_size",
    "evaluation.linear.hold_out": "validation_fraction",
    "evaluation.linear.rates": "learning_rates",
    "evaluation.logistic.costs": "C",
    "evaluation.logistic.hold_out": "validation_fraction",
    "evaluation.logistic.iterations": "max_iter",
    "evaluation.pictures": "log_images",
    "evaluation.robustness.budget": "epsilon",
    "evaluation.segmentation.batch": "batch_size",
    "evaluation.segmentation.classes": "num_classes",
    "evaluation.segmentation.hold_out": "validation_fraction",
    "evaluation.segmentation.ignore": "ignore_index",
    "evaluation.segmentation.names": "class_names",
    "evaluation.segmentation.rates": "learning_rates",
    "evaluation.segmentation.size": "image_size",
    "evaluation.segmentation.whole": "sliding_window",
    "evaluation.zeroshot.classes": "class_names",
    "health": "watchdog",
    "health.checkpoint_limit": "checkpoint_timeout",
    "health.evaluate_limit": "evaluation_timeout",
    "health.max_rewinds": "max_rollbacks",
    "health.rewind_after": "rollback_after",
    "health.rewind_margin": "rollback_margin",
    "health.stall_factor": "hang_factor",
    "health.stall_floor": "hang_floor",
    "health.start_limit": "startup_timeout",
    "launch.init": "deepspeed_init",
    "launch.ranks": "num_processes",
    "optim.lr_rule": "lr_scaling",
    "optim.trust": "trust_coefficient",
    "recipe": "method",
    "recipe.accumulation": "grad_cache",
    "recipe.augment.hue": "hue_space",
    "recipe.chunk": "logit_chunk_size",
    "recipe.embed": "embed_dim",
    "recipe.gram_from": "gram_weights",
    "recipe.gram_refresh": "gram_update_every",
    "recipe.gram_refreshes": "gram_max_updates",
    "recipe.granularity": "mask_unit",
    "recipe.init_bias": "init_logit_bias",
    "recipe.init_scale": "init_logit_scale",
    "recipe.judge": "teacher_model",
    "recipe.judge_from": "teacher_weights",
    "recipe.koleo_group": "koleo_group_size",
    "recipe.koleo_neighbours": "koleo_topk",
    "recipe.layer_decay": "layerwise_lr_decay",
    "recipe.logit_rows": "prototype_chunk_size",
    "recipe.max_scale": "max_logit_scale",
    "recipe.patch_embed_lr_scale": "patch_embed_lr_mult",
    "recipe.positions": "pos_embed",
    "recipe.rec_weight": "reconstruction_weight",
    "recipe.repel": "local_repulsion",
    "recipe.standardise_pixels": "norm_pix_loss",
    "recipe.targets": "centering",
    "recipe.text.context": "context_length",
    "recipe.text.heads": "num_heads",
    "recipe.text_layer_decay": "text_layerwise_lr_decay",
    "recipe.text_lr_scale": "text_lr_mult",
    "recipe.token_rows": "caption_chunk_size",
    "recipe.undecayed": "no_weight_decay",
    "schedule.momentum": "teacher_momentum",
    "train.global_batch": "global_batch_size",
    "train.graphs": "cuda_graphs",
    "train.length": "duration",
    "train.max_nonfinite": "max_consecutive_nonfinite",
    "train.micro_batch": "micro_batch_size",
    "train.recompute": "activation_checkpointing",
    "train.zero": "zero_stage",
    **{f"{section}.{old}": new for section in ("model", "recipe.judge", "recipe.students") for old, new in _MODEL.items()},
}
"""Maps the last part of a dotted key from its old to its current name."""


def _choice(**names: Any) -> Callable[[Any], Any]:
    return lambda value: names.get(value, value) if isinstance(value, str) else value


_SCALING = {
    "sqrt1024": {"rule": "sqrt"},
    "linear256": {"rule": "linear"},
    "none": {"rule": "none"},
}
_VALUES: dict[str, Callable[[Any], Any]] = {
    "recipe.accumulation": _choice(exact=True, plain=False),
    "recipe.targets": _choice(sinkhorn="sinkhorn_knopp", centering="softmax_center"),
    "data.storage.mode": _choice(direct="range_read"),
    "data.damaged": _choice(refuse="error", use="keep-readable"),
    "optim.lr_rule": _choice(**_SCALING),
    **{f"{section}.drop_path_mode": _choice(subset=True, rows=False) for section in ("model", "recipe.judge", "recipe.students")},
}
_RETIRED = {"recipe.local_loss", "recipe.gather_with_grad", "recipe.views.global_count"}  # only one value was allowed


_MOVED = {
    "image_size": ("views", "global_size"),
    "crop_scale": ("views", "global_scale"),
    "interpolation": ("views", "interpolation"),
    "flip_probability": ("augment", "flip_probability"),
    "normalize": ("augment", "normalize"),
}
"""Settings that were in a method's own section, with their place in the sections that all methods share now."""
_BLUR = {"as_released": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5), "off": (0.0, 0.0, 0.0)}
"""DINOv2's named blur probabilities of the first, the second and the local crops."""


def is_old(document: Container[str]) -> bool:
    """Whether settings have the section names of earlier versions."""
    return "recipe" in document


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as plain values under the current keys; settings that already have them are returned unchanged.

    Args:
        document: the settings of a run, by section.
    """
    if not is_old(document):
        return document
    optim, schedule = document.get("optim"), document.get("schedule")
    if isinstance(optim, dict) and "lr" in optim:
        curves = dict(schedule) if isinstance(schedule, dict) else {}
        curve = curves.get("lr")
        curves["lr"] = {**(curve if isinstance(curve, dict) else {}), "peak": optim["lr"]}
        rest = {name: value for name, value in optim.items() if name != "lr"}
        document = {**document, "optim": rest, "schedule": curves}
    upgraded: dict[str, Any] = _walk(document, "")
    if isinstance(method := upgraded.get("method"), dict):
        upgraded["method"] = _views_and_augment(method)
    return upgraded


def _views_and_augment(method: dict[str, Any]) -> dict[str, Any]:
    """Moves a method's own settings of views and augmentation into the sections that all methods share."""
    sections = {name: dict(part) for name in ("views", "augment") if isinstance(part := method.get(name), dict)}
    for name, (section, key) in _MOVED.items():
        if name in method:
            sections.setdefault(section, {})[key] = method[name]
    augment = sections.get("augment", {})
    blur, detailclip = augment.pop("blur", None), method.get("name") == "detailclip"
    if detailclip:
        augment |= {key: [augment[key]] for key in ("blur_probability", "solarize_probability") if _is_number(augment.get(key))}
        augment |= {"blur_probability": [0.0]} if blur == "off" else {}
    else:
        if _is_number(augment.get("solarize_probability")):
            augment["solarize_probability"] = [0.0, augment["solarize_probability"]]
        if isinstance(blur, str) and blur in _BLUR:
            first, second, local = _BLUR[blur]
            augment |= {"blur_probability": [first, second], "local_blur_probability": local}
    return {name: value for name, value in method.items() if name not in _MOVED} | sections


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _walk(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {
            _RENAMED.get(f"{path}{name}", name): _walk(inner, f"{path}{name}.")
            for name, inner in value.items()
            if f"{path}{name}" not in _RETIRED
        }
    if isinstance(value, list | tuple):
        return [_walk(inner, path) for inner in value]
    return _VALUES.get(path.removesuffix("."), lambda same: same)(value)
