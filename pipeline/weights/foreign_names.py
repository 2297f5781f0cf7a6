"""Renames the tensors of transformers' and open_clip's vision towers to timm's names, and recognizes the layout of a file.

Supported are ``Dinov2``, ``Dinov2WithRegisters``, ``DINOv3ViT``, ``ViT``, ``CLIP`` and ``SigLIP`` of transformers and open_clip's
own vision transformer, also when it holds one of timm (``visual.trunk.``). Separate queries, keys and values are joined. Text
towers, projections, poolers and classifiers are left out, and named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["fovea", "timm", "dinov2", "dinov3", "open_clip", "hf_dinov2", "hf_dinov3", "hf_vit", "hf_clip", "hf_siglip"]

_TEXTS = ("text_model.", "text_projection", "logit_", "transformer.", "token_embedding.", "ln_final.", "text.", "attn_mask")
_CLASSIFIERS = re.compile(r"(?:head|classifier|fc|head_dist|cls_head)\.(?:weight|bias)|classifier\..*")
_FULL = {  # open_clip's own vision transformer
    "conv1.weight": "patch_embed.proj.weight",
    "conv1.bias": "patch_embed.proj.bias",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ls_1": "ls1",
    "ls_2": "ls2",
}
_HF = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "norm_pre",  # transformers' spelling
    "layernorm": "norm",
    "post_layernorm": "norm",
    "norm": "norm",
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp": "attn_pool.mlp",
}
_HF_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "self_attn.out_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    **{f"attention.attention.{name}": f"attn.{name[0]}" for name in ("query", "key", "value")},
    **{f"{attention}.{name}_proj": f"attn.{name}" for attention in ("attention", "self_attn") for name in "qkv"},
}
_GATED = {"mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}
_UNGATED = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}


@dataclass(frozen=True)
class Renamed:
    """Tensors under timm's names.

    Attributes:
        layout: whose names the file has.
        tensors: the vision tower's tensors; those of DINOv2 and DINOv3 keep the names that their own files have.
        notes: what was left out.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def renamed(state: Mapping[str, Tensor]) -> Renamed:
    """Recognizes a layout and renames its tensors; ``meta`` tensors suffice. A layout that is not recognized counts as timm's."""
    names = set(state)
    if any(name.startswith(("vit.", "net.")) for name in names):
        return Renamed("fovea", dict(state), ())
    left: list[str] = []
    tensors = _without(state, left)
    if any(name.startswith("visual.trunk.") for name in names):
        inner = {name.removeprefix("visual.trunk."): t for name, t in tensors.items() if name.startswith("visual.trunk.")}
        left += [name for name in tensors if not name.startswith("visual.trunk.")]
        return Renamed("open_clip", inner, _notes(left))
    if names & {"visual.conv1.weight", "conv1.weight"} and names & {"visual.class_embedding", "class_embedding"}:
        return Renamed("open_clip", _of_open_clip(tensors, left), _notes(left))
    if any(".patch_embeddings." in f".{name}" or ".patch_embedding." in f".{name}" for name in names):
        return _of_transformers(tensors, left)
    if names & {"storage_tokens", "rope_embed.periods"}:
        return Renamed("dinov3", tensors, _notes(left))
    meta = {"register_tokens", "mask_token"} & names or any(re.match(r"blocks\.\d+\.\d+\.", name) for name in names)
    return Renamed("dinov2" if meta and "pos_embed" in names else "timm", tensors, _notes(left))


def _without(state: Mapping[str, Tensor], left: list[str]) -> dict[str, Tensor]:
    """The tensors except those of classifiers and of text towers, whose names go to ``left``."""
    texts = any(name.startswith(("visual.", "vision_model.")) for name in state)
    gone = {n for n in state if _CLASSIFIERS.fullmatch(n) or (texts and n.startswith(_TEXTS))}
    left += sorted(gone)
    return {name: tensor for name, tensor in state.items() if name not in gone}


def _notes(left: list[str]) -> tuple[str, ...]:
    classifier = sorted({name for name in left if _CLASSIFIERS.fullmatch(name)})
    others = sorted({name.split(".")[0] for name in left} - {name.split(".")[0] for name in classifier})
    notes = [f"left out: {', '.join(classifier)}, of a classifier"] if classifier else []
    return (*notes, *([f"left out beside the vision tower: {', '.join(others)}"] if others else []))


def _replaced(name: str, table: Mapping[str, str]) -> str | None:
    """The new name if the old one is in the table, or is one of the table's modules followed by a parameter's name."""
    if name in table:
        return table[name]
    module, _, end = name.rpartition(".")
    if module in table:
        return f"{table[module]}.{end}"
    outer, _, inner = module.rpartition(".")  # two levels: an MLP below a module of the table
    return f"{table[outer]}.{inner}.{end}" if outer in table and inner.startswith("fc") else None


def _of_open_clip(state: Mapping[str, Tensor], left: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for full, tensor in state.items():
        name = full.removeprefix("visual.")
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        new = _replaced(block[2], _OPEN_CLIP_BLOCK) if block else _replaced(name, _FULL)
        if name == "proj":
            left.append("image projection")
        elif new is None:
            tensors[name] = tensor  # unexpected, and will be reported
        else:
            tensors[f"blocks.{block[1]}.{new}" if block else new] = tensor
    return _shaped(tensors)


def _of_transformers(state: Mapping[str, Tensor], left: list[str]) -> Renamed:
    start = next(name.split("embeddings.")[0] for name in state if "embeddings." in name and "patch_embedding" in name)
    inside = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
    left += [name for name in state if not name.startswith(start)]
    gated = any(".mlp.gate_proj." in name for name in inside)
    table = _HF_BLOCK | (_GATED if gated else _UNGATED)
    tensors: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        block = re.fullmatch(r"(?:model\.|encoder\.)?layers?\.(\d+)\.(.+)", name)
        new = _replaced(block[2], table) if block else _replaced(name, _HF)
        if name.startswith("pooler.") or name.endswith((".position_ids", "inv_freq")):
            left.append("pooler" if name.startswith("pooler.") else "position_ids")
        elif name.startswith("head.attention.in_proj_"):
            end = name.rpartition("_")[2]
            query, key, value = tensor.chunk(3)
            tensors |= {f"attn_pool.q.{end}": query, f"attn_pool.kv.{end}": torch.cat([key, value])}
        elif new is None:
            tensors[name] = tensor
        else:
            tensors[f"blocks.{block[1]}.{new}" if block else new] = tensor
    rotary = "pos_embed" not in tensors
    layout: Layout = "hf_dinov3" if rotary else "hf_dinov2" if "mask_token" in tensors else "hf_vit"
    if any(name.startswith("attn_pool.") for name in tensors):
        layout = "hf_siglip"
    elif any(name.startswith("norm_pre.") for name in tensors):
        layout = "hf_clip"
    elif any(".layernorm_before." in name for name in inside):
        layout = "hf_vit"
        if tensors.pop("mask_token", None) is not None:  # of masked pretraining; ViT's own forward pass has it, DINOv2's too
            left.append("mask_token")
    return Renamed(layout, _shaped(_joined(tensors, rotary)), _notes(left))


def _joined(state: Mapping[str, Tensor], rotary: bool) -> dict[str, Tensor]:
    """Joins queries, keys and values; a rotary tower keeps the biases of queries and values, since its keys have none."""
    tensors = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name in [name for name in state if name.endswith(".attn.q.weight")]:
        attention = name.removesuffix("q.weight")
        parts = [state.get(f"{attention}{part}.weight") for part in "qkv"]
        biases = {part: state[f"{attention}{part}.bias"] for part in "qkv" if f"{attention}{part}.bias" in state}
        if all(part is not None for part in parts):
            tensors[f"{attention}qkv.weight"] = torch.cat([part for part in parts if part is not None])
        if rotary:
            tensors |= {f"{attention}{part}_bias": bias for part, bias in biases.items()}
        elif len(biases) == 3:
            tensors[f"{attention}qkv.bias"] = torch.cat(list(biases.values()))
    return tensors


def _shaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens and positions with the leading dimension of one that timm's have."""
    for name in ("cls_token", "pos_embed"):
        if name in tensors and tensors[name].ndim < 3:
            tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
    return tensors
