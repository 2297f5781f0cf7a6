"""open_clip export: ``open_clip_config.json`` and weights for ``open_clip.create_model_from_pretrained("local-dir:…")``.

open_clip's own vision transformer computes the same as ours. Its patch embedding has no bias, so the bias is added to the
positions, which gives the same sum.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.text import LogitScale, TextTower, to_open_clip
from pipeline.models.vision import VisionTower
from pipeline.weights.export.formats.timm import timm_state
from pipeline.weights.export.networks import Networks

_INNER = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "ls1": "ls_1",
    "ls2": "ls_2",
}


def write(networks: Networks, folder: Path) -> tuple[str, list[str]]:
    """Writes config and weights to a folder; returns lines of Python that load them, and notes.

    Raises:
        ConfigError: the method has no text tower, or open_clip has no equivalent of the towers.
    """
    text, projection, logits = networks.text, networks.others.get("image_projection"), networks.logits
    if text is None or logits is None or not isinstance(projection, nn.Linear):
        raise ConfigError(
            f"{networks.config.method.name} has no text tower",
            where="--to open_clip",
            hint="Export it to timm, or, with a convolutional stem, to safetensors or onnx",
        )
    if "image_pool" in networks.others:
        raise ConfigError(
            "open_clip has no attention pooling beside a class token",
            where="method.image_pool",
            hint="Export it to safetensors",
        )
    p = networks.preprocessing
    config = {
        "model_cfg": _model(networks.transformer, text, projection, logits, networks.side),
        "preprocess_cfg": {
            "size": [networks.side, networks.side],
            "mode": "RGB",
            "mean": list(p.mean),
            "std": list(p.std),
            "interpolation": p.interpolation,
            "resize_mode": "shortest",
            "fill_color": 0,
        },
    }
    state = {
        **_vision(networks.transformer, networks.side),
        "visual.proj": projection.weight.detach().float().T.contiguous(),
        **{name: tensor.detach().float().contiguous() for name, tensor in to_open_clip(text.state_dict()).items()},
        **_numbers(logits),
    }
    _compare(config["model_cfg"], state)
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    usage = f"""
import open_clip
model, preprocess = open_clip.create_model_from_pretrained("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
images, texts = model.encode_image(preprocess(image)[None]), model.encode_text(tokenizer(["a dog"]))
"""
    return usage, ["The bias of the patch embedding is in the positions: open_clip has none."]


def _model(tower: VisionTower, text: TextTower, projection: nn.Linear, logits: LogitScale, size: int) -> dict[str, Any]:
    vit = tower.vit
    block = vit.blocks[0]
    problem = (
        "rotary positions"
        if isinstance(vit, Eva)
        else "registers"
        if vit.num_prefix_tokens != 1 or vit.no_embed_class
        else "a convolutional stem"
        if not isinstance(vit.patch_embed.proj, nn.Conv2d)
        else "a gated feed-forward layer"
        if not isinstance(block.mlp.act, nn.GELU) or block.mlp.fc1.out_features != block.mlp.fc2.in_features
        else "norms of queries and keys"
        if not isinstance(block.attn.q_norm, nn.Identity)
        else "a norm before the first block"
        if not isinstance(vit.norm_pre, nn.Identity)
        else ""
    )
    if problem:
        raise ConfigError(
            f"open_clip's vision transformer has no {problem}", where="--to open_clip", hint="Export the tower to timm instead"
        )
    heads = text.blocks[0].heads
    quick = text.blocks[0].quick_gelu
    if quick:
        raise ConfigError(
            "open_clip has one activation for both towers, and only the text tower uses quick GELU",
            where="method.text.activation",
            hint="Export it to safetensors",
        )
    vision = {
        "image_size": size,
        "layers": len(vit.blocks),
        "width": tower.width,
        "head_width": tower.width // block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / tower.width,
        "patch_size": tower.patch,
        "no_ln_pre": True,
        "norm_kwargs": {"eps": block.norm1.eps},
        "ls_init_value": None if isinstance(block.ls1, nn.Identity) else 1e-5,
    }
    texts = {
        "context_length": len(text.positions),
        "vocab_size": text.tokens.num_embeddings,
        "width": text.tokens.embedding_dim,
        "heads": heads,
        "layers": len(text.blocks),
        "no_causal_mask": not text.blocks[0].causal,
    }
    config: dict[str, Any] = {
        "embed_dim": projection.out_features,
        "vision_cfg": vision,
        "text_cfg": texts,
        "custom_text": True,
    }
    return config if logits.bias is None else config | {"init_logit_bias": float(logits.bias.detach())}


def _vision(tower: VisionTower, size: int) -> dict[str, Tensor]:
    state = timm_state(tower, size)
    positions = state["pos_embed"][0].clone()
    if (bias := state.get("patch_embed.proj.bias")) is not None:
        positions[1:] += bias
    config = {
        "visual.conv1.weight": state["patch_embed.proj.weight"],
        "visual.class_embedding": state["cls_token"].reshape(-1).clone(),
        "visual.positional_embedding": positions,
        "visual.ln_post.weight": state["norm.weight"],
        "visual.ln_post.bias": state["norm.bias"],
    }
    for name, tensor in state.items():
        if (inner := re.fullmatch(r"blocks\.(\d+)\.(.+)", name)) is not None:
            rest = inner[2]
            module, _, end = rest.rpartition(".")
            theirs = _INNER.get(rest) or f"{_INNER[module]}.{end}"
            config[f"visual.transformer.resblocks.{inner[1]}.{theirs}"] = tensor
    return config


def _numbers(logits: LogitScale) -> dict[str, Tensor]:
    with torch.no_grad():
        scale, bias = logits()
    numbers = {"logit_scale": scale.log().reshape(()).clone()}
    return numbers if bias is None else numbers | {"logit_bias": bias.reshape(()).clone()}


def _compare(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Checks that open_clip's model and the weights have the same tensors, since open_clip itself loads non-strictly."""
    from open_clip.model import CustomTextCLIP

    with torch.device("meta"):
        model = CustomTextCLIP(**{name: value for name, value in config.items() if name != "custom_text"})
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ConfigError(
            f"{len(wrong)} tensors of open_clip's model have other names or shapes, the first is {wrong[0]}",
            where="--to open_clip",
            hint="Export it to safetensors",
        )
