"""Export for Hugging Face: ``transformers`` loads the weights strictly, under the names of released checkpoints, and saves them.

A tower with learned positions becomes a ``Dinov2Model``, with registers a ``Dinov2WithRegistersModel``, with rotary positions
a ``DINOv3ViTModel``. Absent parts get neutral values: a layer scale of one, a class position of zero.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from timm.layers import GluMlp
from timm.models.eva import Eva
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.vision import VisionTower
from pipeline.weights.export.formats.timm import timm_state
from pipeline.weights.export.networks import Networks, Preprocessing


def write(networks: Networks, folder: Path) -> tuple[str, list[str]]:
    """Writes ``config.json``, ``model.safetensors``, ``preprocessor_config.json``; returns the lines that load them, and notes.

    Raises:
        ConfigError: transformers is not installed, or has no model of this architecture.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "transformers is not installed", where="--to huggingface", hint="Install it: pip install 'fovea[export]'"
        ) from error
    tower, p = networks.transformer, networks.preprocessing
    kind, settings = architecture(tower, networks.side)
    config = getattr(transformers, f"{kind}Config")(**settings)
    transformers.logging.disable_progress_bar()
    _loaded(getattr(transformers, f"{kind}Model"), config, converted(tower, networks.side)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_processor(p, networks.side), indent=1) + "\n")
    usage = f"""
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("{folder}").eval()
processor = AutoImageProcessor.from_pretrained("{folder}")
tokens = model(**processor(image, return_tensors="pt")).last_hidden_state  # the class token is tokens[:, 0]
"""
    notes = []
    if kind != "DINOv3ViT":
        notes.append("transformers resamples positions for images of another size in its own way, without antialiasing.")
    if networks.text is not None:
        notes.append("Only the vision tower is here: export to open_clip for texts.")
    return usage, notes


def architecture(tower: VisionTower, size: int) -> tuple[str, dict[str, Any]]:
    """Name and settings of the equivalent transformers architecture.

    Raises:
        ConfigError: transformers has no equivalent.
    """
    vit = tower.vit
    block = vit.blocks[0]
    gated = _gated(block.mlp)
    registers = vit.num_prefix_tokens - 1
    _check(tower, gated)
    common: dict[str, Any] = {
        "hidden_size": tower.width,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": block.norm1.eps,
        "image_size": size,
        "patch_size": tower.patch,
        "hidden_act": "gelu",
    }
    if isinstance(vit, Eva):
        hidden = block.mlp.fc2.in_features
        return "DINOv3ViT", common | {
            "intermediate_size": hidden,
            "use_gated_mlp": gated,
            "hidden_act": "silu" if gated else "gelu",
            "num_register_tokens": registers,
            "rope_theta": tower.timm_args.get("rope_temperature", 100.0),
            "query_bias": block.attn.q_bias is not None,
            "value_bias": block.attn.q_bias is not None,
            "key_bias": False,
        }
    hidden = block.mlp.fc2.in_features
    ratios = [ratio for ratio in range(1, 17) if _hidden(tower.width, ratio, gated) == hidden]
    if not ratios:
        raise _unknown(f"a feed-forward layer of {hidden} hidden channels, because it supports integer ratios only")
    common |= {"mlp_ratio": ratios[0], "use_swiglu_ffn": gated}
    if registers:
        return "Dinov2WithRegisters", common | {"num_register_tokens": registers}
    return "Dinov2", common


def converted(tower: VisionTower, size: int) -> dict[str, Tensor]:
    """The weights under the names of released checkpoints, which every version of transformers reads and writes. The names of
    its modules differ between versions.
    """
    state = timm_state(tower, size)
    rotary = isinstance(tower.vit, Eva)
    layers = "layer" if rotary else "encoder.layer"
    width = tower.width
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inner = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if inner is None:
            tensors |= _outer(name, tensor, rotary, tower)
            continue
        prefix = f"{layers}.{inner[1]}."
        pieces = _inner(inner[2], tensor, rotary, _gated(tower.vit.blocks[0].mlp))
        tensors |= {prefix + key: piece for key, piece in pieces.items()}
    mask = tower.mask_token.detach().float()
    tensors["embeddings.mask_token"] = mask.clone() if rotary else mask[0].clone()
    if rotary:
        tensors.setdefault("embeddings.register_tokens", torch.zeros(1, 0, width))
    for number in range(len(tower.vit.blocks)):
        for scale in (1, 2):
            tensors.setdefault(f"{layers}.{number}.layer_scale{scale}.lambda1", torch.ones(width))
    return tensors


def _outer(name: str, tensor: Tensor, rotary: bool, tower: VisionTower) -> dict[str, Tensor]:
    patches = "embeddings.patch_embeddings" if rotary else "embeddings.patch_embeddings.projection"
    names = {
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj.weight": f"{patches}.weight",
        "patch_embed.proj.bias": f"{patches}.bias",
        "norm.weight": "norm.weight" if rotary else "layernorm.weight",
        "norm.bias": "norm.bias" if rotary else "layernorm.bias",
    }
    if name == "pos_embed" and not rotary:
        if tower.vit.no_embed_class:  # the class token's position
            tensor = torch.cat([tensor.new_zeros(1, 1, tensor.shape[2]), tensor], dim=1)
        return {"embeddings.position_embeddings": tensor}
    if name not in names:
        raise _unknown(f"the tensor {name}")
    return {names[name]: tensor}


def _inner(name: str, tensor: Tensor, rotary: bool, gated: bool) -> dict[str, Tensor]:
    """The tensors of a block."""
    if name in ("attn.qkv.weight", "attn.qkv.bias"):
        end = name.rpartition(".")[2]
        parts = ("q_proj", "k_proj", "v_proj") if rotary else ("attention.query", "attention.key", "attention.value")
        return {f"attention.{part}.{end}": piece.clone() for part, piece in zip(parts, tensor.chunk(3), strict=True)}
    renamed = {
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
    }
    modules = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj" if rotary else "attention.output.dense"}
    if rotary:
        modules |= {
            "mlp.fc1_g": "mlp.gate_proj",
            "mlp.fc1_x": "mlp.up_proj",
            "mlp.fc2": "mlp.down_proj",
            "mlp.fc1": "mlp.up_proj",
        }
    elif gated:
        modules |= {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
    else:
        modules |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    module, _, end = name.rpartition(".")
    if name in renamed:
        return {renamed[name]: tensor}
    if module not in modules:
        raise _unknown(f"the tensor blocks.….{name}")
    return {f"{modules[module]}.{end}": tensor}


def _hidden(width: int, ratio: int, gated: bool) -> int:
    """Hidden width that transformers derives from the ratio."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8 if gated else width * ratio


def _gated(mlp: nn.Module) -> bool:
    return isinstance(mlp, GluMlp) or hasattr(mlp, "fc1_g")


def _check(tower: VisionTower, gated: bool) -> None:
    vit = tower.vit
    block = vit.blocks[0]
    if not isinstance(vit.norm_pre, nn.Identity):
        raise _unknown("a norm before the first block")
    if not isinstance(getattr(block.attn, "q_norm", None), nn.Identity | None):
        raise _unknown("norms of queries and keys")
    if not isinstance(vit.patch_embed.proj, nn.Conv2d):
        raise _unknown("a convolutional stem")
    if isinstance(vit, Eva) and vit.pos_embed is not None:
        raise _unknown("learned positions beside rotary ones")
    act = block.mlp.act
    if not isinstance(act, nn.SiLU if gated else nn.GELU):
        raise _unknown(f"the activation {type(act).__name__}")


def _unknown(what: str) -> ConfigError:
    return ConfigError(f"no transformers model has {what}", where="--to huggingface", hint="Export it to safetensors or onnx")


def _loaded(kind: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """A model of transformers with these weights.

    Raises:
        ConfigError: the weights are not exactly those that the model needs.
    """
    model, report = kind.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
    )
    shapes = {name for name, *_ in report["mismatched_keys"]}
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"], *shapes})
    if wrong:
        raise ConfigError(
            f"{len(wrong)} tensors of transformers' {kind.__name__} have other names or shapes, the first is {wrong[0]}",
            where="--to huggingface",
            hint="Install transformers 5, or export to timm",
        )
    return model


def _processor(p: Preprocessing, side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / p.centre)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
