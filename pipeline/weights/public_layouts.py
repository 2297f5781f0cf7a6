"""Converts public weights to a tower's parameter names and position grid. Strict: mismatches are reported.

Accepted are a tower's own names (``vit.…``), timm's, and those of DINOv2's public files: blocks in chunks or not,
``register_tokens``, ``mlp.w12`` and ``mlp.w3`` of SwiGLU, a ``mask_token`` of two dimensions, and a separate class token
position. A rotary tower also accepts DINOv3's: ``storage_tokens``, the three biases in one, ``ls1``, ``mlp.w1``. Those of
transformers and open_clip are renamed first (:mod:`pipeline.weights.foreign_names`). Files may wrap their tensors (``teacher``,
``model``, ``state_dict``) or prefix each name with ``backbone.``, ``module.`` or ``teacher.backbone.``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.models.lora import is_factor
from pipeline.models.positions import resample_positions
from pipeline.models.tensor_files import reason
from pipeline.models.vision import VisionTower
from pipeline.untrusted import printable
from pipeline.weights.foreign_names import renamed
from pipeline.weights.input_channels import described, inflated

_WRAPPERS = ("teacher", "model", "state_dict", "student")
_PREFIXES = ("module.", "_orig_mod.", "teacher.", "student.", "backbone.")
_PARTIAL = ("teacher.", "student.", "backbone.")  # a file may hold other networks beside these
_WRAPPED = 8  # maximum nested wrappers
_NAMED = 6


@dataclass(frozen=True)
class Fitted:
    """Converted weights.

    Attributes:
        weights: a tensor for each parameter of the tower that the source contains, under the tower's names.
        notes: messages about what was converted or left out.
    """

    weights: dict[str, Tensor]
    notes: tuple[str, ...]


def unwrapped(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tower's tensors of a file, without wrappers and prefixes, and a note on other content.

    Args:
        state: output of ``torch.load`` or safetensors.
    """
    notes: list[str] = []
    way: list[str] = []
    for _ in range(_WRAPPED):
        inner = [name for name in _WRAPPERS if isinstance(state.get(name), Mapping)]
        if not inner:
            break
        way.append(f"under {inner[0]!r}")
        state = state[inner[0]]
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    beside: set[str] = set()
    for prefix in (*_PREFIXES, *_PREFIXES):
        under = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if under and (prefix in _PARTIAL or len(under) == len(tensors)):
            beside |= {name.split(".")[0] for name in tensors if not name.startswith(prefix)}
            way.append(f"prefix {prefix!r}")
            tensors = under
    if way:
        notes.append(f"names are read without what surrounds them: {', '.join(way)}")
    if beside:
        notes.append(f"left out beside the backbone: {', '.join(printable(name, limit=80) for name in sorted(beside))}")
    if kinds := sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()} - {"float32"}):
        notes.append(f"weights in {', '.join(kinds)} are converted to float32")
    return tensors, notes


def fit(
    state: Mapping[str, Tensor],
    tower: VisionTower,
    *,
    where: str,
    input_channels: str | Sequence[str] = "mean",
    grid: tuple[int, int] | None = None,
) -> Fitted:
    """Renames weights to a tower's names and resamples positions to its grid.

    Args:
        state: tensors by name; ``meta`` tensors suffice to check whether they fit.
        tower: provides names and shapes.
        where: the source, for messages.
        input_channels: rule by which weights for RGB images see other channels, see
            :func:`pipeline.weights.input_channels.inflated`.
        grid: rows and columns of the source's positions; ``None`` if it does not say: then a square if their number makes one,
            else the tower's own.

    Raises:
        CheckpointError: lists missing and unexpected names and differing shapes.
    """
    notes: list[str] = []
    own = {name: tuple(p.shape) for name, p in tower.named_parameters() if not is_factor(name)}
    ours = any(name.startswith("vit.") for name in state)
    try:
        foreign = renamed(state)
        notes += foreign.notes
        weights = dict(state) if ours else _renamed(foreign.tensors)
        if isinstance(tower.vit, Eva) and not ours:
            weights = _rotary(weights, tower, notes)
        for name, _ in tower.named_buffers():  # computed, not learned
            weights.pop(name, None)
        _fit_positions(weights, tower, notes, grid)
    except (RuntimeError, IndexError, ValueError) as error:  # tensors of an impossible shape
        raise CheckpointError(
            f"its tensors cannot be reshaped to the tower's ({reason(error)})", where=where, hint="Name other weights"
        ) from None
    for name in [name for name in weights if name.startswith("vit.patch_embed.") and weights[name].ndim == 4]:
        if weights[name].shape[1] == 3 and own.get(name, (0, 3))[1] == tower.in_channels != 3:
            weights[name] = inflated(weights[name], tower.in_channels, input_channels, where=where)
            notes.append(described(input_channels, tower.in_channels))
    if "mask_token" not in weights and not ours:
        notes.append("the source has no mask token: it starts at zero")
        own.pop("mask_token")
    if tower.class_position is not None and "class_position" not in weights:
        weights["class_position"] = torch.zeros_like(weights["vit.cls_token"]) if "vit.cls_token" in weights else torch.zeros(0)
        notes.append("the source's class token holds its position already: the tower's own position of it starts at zero")
    elif tower.class_position is None and "class_position" in weights and "vit.cls_token" in weights:
        weights["vit.cls_token"] = weights["vit.cls_token"] + weights.pop("class_position")
    if tower.local_norm is not None and "local_norm.weight" not in weights:
        notes.append("the source has no norm for local crops: it starts as a copy of the final norm")
        weights |= {f"local_norm.{end}": weights[f"vit.norm.{end}"] for end in ("weight", "bias") if f"vit.norm.{end}" in weights}
    elif tower.local_norm is None and (extra := [name for name in weights if name.startswith("local_norm.")]):
        notes.append("the source's norm for local crops is left out")
        weights = {name: tensor for name, tensor in weights.items() if name not in extra}
    compare(own, {name: tuple(tensor.shape) for name, tensor in weights.items()}, where=where)
    return Fitted(weights, tuple(notes))


def compare(own: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Refuses names and shapes that differ, and lists them.

    Raises:
        CheckpointError: with the three lists, each truncated to a few entries.
    """
    other = [
        f"{printable(name, limit=80)} {list(theirs[name])} there, {list(own[name])} here"
        for name in own
        if theirs.get(name, own[name]) != own[name]
    ]
    lists = {
        "missing": [name for name in own if name not in theirs],
        "unexpected": [name for name in theirs if name not in own],
        "of another shape": other,
    }
    wrong = {kind: names for kind, names in lists.items() if names}
    if wrong:
        problems = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in wrong.items())
        raise CheckpointError(
            f"its weights do not match ({problems})",
            where=where,
            hint="Set model.* to the architecture of the weights, or name others",
        )


def _some(names: list[str]) -> str:
    return ", ".join([*(printable(name, limit=200) for name in names[:_NAMED]), *(["…"] if len(names) > _NAMED else [])])


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    packed = any(".mlp.w12." in name for name in state)
    for name, tensor in state.items():
        if name == "mask_token":
            weights[name] = tensor.reshape(1, 1, -1)
            continue
        new = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        new = new.replace("register_tokens", "reg_token") if name == "register_tokens" else new
        if packed:
            new = new.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        weights[f"vit.{new}"] = tensor
    return weights


def _rotary(weights: Mapping[str, Tensor], tower: VisionTower, notes: list[str]) -> dict[str, Tensor]:
    """Renames DINOv3's parameters to timm's rotary towers', whose keys have no bias and whose queries and values may lack it."""
    result: dict[str, Tensor] = {}
    masked = any(name.endswith(".bias_mask") for name in weights)  # the keys' bias exists, but is multiplied by zero
    biased = tower.vit.blocks[0].attn.q_bias is not None
    for name, tensor in weights.items():
        if name.endswith((".periods", ".bias_mask")):  # constants
            continue
        new = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name).replace("vit.storage_tokens", "vit.reg_token")
        new = new.replace("vit.local_cls_norm.", "local_norm.").replace(".mlp.w1.", ".mlp.fc1_g.")
        new = new.replace(".mlp.w2.", ".mlp.fc1_x.").replace(".mlp.w3.", ".mlp.fc2.")
        if not name.endswith(".attn.qkv.bias"):
            result[new] = tensor
            continue
        query, key, value = tensor.chunk(3)
        if not masked and not tensor.is_meta and bool(key.any()):
            result[new] = tensor  # unexpected, and will be reported
        elif biased:
            result |= {new.replace("qkv.bias", "q_bias"): query, new.replace("qkv.bias", "v_bias"): value}
        elif not tensor.is_meta and bool(query.any() or value.any()):
            result[new] = tensor
        else:
            notes.append(f"left out: {name.removeprefix('vit.')}, all zeros")
    if biased and not any(name.endswith(".q_bias") for name in result):
        for name in [name for name in result if name.endswith(".attn.qkv.weight")]:
            zeros = result[name].new_zeros(result[name].shape[0] // 3)
            result |= {name.replace("qkv.weight", "q_bias"): zeros, name.replace("qkv.weight", "v_bias"): zeros}
        notes.append("the source has no biases of queries and values: they start at zero")
    return result


def _fit_positions(weights: dict[str, Tensor], tower: VisionTower, notes: list[str], known: tuple[int, int] | None) -> None:
    """Converts class position and grid to the tower's; what cannot be converted is left for the comparison to report."""
    name, vit = "vit.pos_embed", tower.vit
    if name not in weights or vit.pos_embed is None or weights[name].ndim != 3:
        return
    positions, grid = weights[name], tuple(vit.patch_embed.grid_size)
    num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    tokens = positions.shape[1]
    same = [(num_prefix, grid)] if tokens == num_prefix + math.prod(grid) else []
    square: list[tuple[int, tuple[int, int]]] = []
    for prefix in (num_prefix, 1, 0, vit.num_prefix_tokens):
        side = math.isqrt(max(tokens - prefix, 0))
        square += [(prefix, (side, side))] if side and side * side == tokens - prefix else []
    # As many positions as a rectangular grid has can still be those of a square, which public weights have.
    candidates = [*same, *square] if grid[0] == grid[1] else [*square, *same]
    if known is not None:
        candidates = [(prefix, known) for prefix in (num_prefix, 1, 0) if tokens == prefix + math.prod(known)] or candidates
    if not candidates:
        return
    prefix, old = candidates[0]
    if prefix == 1 and num_prefix == 0 and tower.class_position is not None:
        weights["class_position"], positions, prefix = positions[:, :1], positions[:, 1:], 0
    elif prefix == 1 and num_prefix == 0 and "vit.cls_token" in weights:  # adding it one step earlier gives the same sum
        weights["vit.cls_token"] = weights["vit.cls_token"] + positions[:, :1]
        positions, prefix = positions[:, 1:], 0
        notes.append("the class token's position is added to the class token, as timm's models with registers have it")
    elif prefix < num_prefix:
        nothing = positions.new_zeros(1, num_prefix - prefix, positions.shape[2])
        positions, prefix = torch.cat([positions[:, :prefix], nothing, positions[:, prefix:]], dim=1), num_prefix
    if prefix == num_prefix and old != grid:
        positions = resample_positions(positions, grid, old, prefix=prefix, how=tower.resampling)
        shown = [f"{rows} x {columns}" for rows, columns in (old, grid)]
        notes.append(
            f"positions are resampled from {shown[0]} to {shown[1]} patches (model.pos_embed_interpolation={tower.resampling})"
        )
    weights[name] = positions
