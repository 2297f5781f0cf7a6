"""Weights in the layouts of the libraries that define them: the architecture is read from shapes, all tensors load strictly, and
the forward pass equals the library's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower, build_tower
from pipeline.weights.adapt.describe import describe
from pipeline.weights.architecture import Architecture, Hints, architecture_of
from pipeline.weights.foreign_names import renamed
from pipeline.weights.init_from import find, weights_of
from pipeline.weights.public_layouts import fit, unwrapped

CLOSE = 2e-5  # of normalized features: other orders of fp32 sums
WIDTH, HEADS, DEPTH, SIZE = 64, 4, 2, 32


def randomized(model: nn.Module) -> nn.Module:
    """A model whose parameters are all random, so that none can be exchanged without a difference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def images(size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tower_of(source: Path | str, **model: Any) -> tuple[VisionTower, Architecture]:
    """The tower that ``fovea adapt`` makes of weights, at their own resolution."""
    described = describe(str(source), model)
    a = described.architecture
    tower = build_tower(ModelSettings(**a.model), image_size=a.image_size).eval()
    state, _ = unwrapped(weights_of(find(str(source))))
    fitted = fit(state, tower, where="here")
    with torch.no_grad():
        parameters = dict(tower.named_parameters())
        for name, tensor in fitted.weights.items():
            parameters.pop(name).copy_(tensor)
    assert parameters.keys() <= {"mask_token"}
    return tower, a


def _transformers(kind: str, **settings: Any) -> Callable[[Path], tuple[Path, Callable[[Tensor], Tensor]]]:
    def make(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
        import transformers

        common = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": SIZE}
        config = getattr(transformers, f"{kind}Config")(**{**common, "patch_size": 8, **settings})
        model: Any = randomized(getattr(transformers, f"{kind}Model")(config))
        if hasattr(model, "rope_embeddings"):
            model = model.float()
        model.save_pretrained(folder)

        def cls_first(x: Tensor) -> Tensor:
            out = model(pixel_values=x)
            if kind.startswith("Siglip"):
                return torch.cat([out.pooler_output[:, None], out.last_hidden_state], 1)
            if kind.startswith("CLIP"):
                norm = model.vision_model.post_layernorm if hasattr(model, "vision_model") else model.post_layernorm
                return norm(out.last_hidden_state)  # transformers norms the class token only
            return out.last_hidden_state

        return folder, cls_first

    return make


def _timm(name: str, file: str = "", **arguments: Any) -> Callable[[Path], tuple[Path, Callable[[Tensor], Tensor]]]:
    """A file (or a folder) as timm saves it, of a narrow and shallow model of a published name."""

    def make(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
        sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "img_size": SIZE, "patch_size": 8}
        model: Any = randomized(timm.create_model(name, pretrained=False, **{**sizes, **arguments}))
        folder.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        about = {"architecture": name, "model_args": sizes | arguments}
        pretrained = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, SIZE, SIZE]}
        (folder / "config.json").write_text(json.dumps(about | {"pretrained_cfg": pretrained}))
        pooled = getattr(model, "attn_pool", None)

        def tokens(x: Tensor) -> Tensor:
            features = model.forward_features(x)
            return features if pooled is None else torch.cat([pooled(features)[:, None], features], 1)

        return folder / file if file else folder, tokens

    return make


def _open_clip(quick: bool) -> Callable[[Path], tuple[Path, Callable[[Tensor], Tensor]]]:
    def make(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
        from open_clip.model import CLIP

        vision = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": 8, "image_size": SIZE}
        text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
        model: Any = randomized(CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=quick))
        folder.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
        about = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick}}
        (folder / "open_clip_config.json").write_text(json.dumps(about))

        def tokens(x: Tensor) -> Tensor:
            kept: list[Tensor] = []
            hook = model.visual.transformer.register_forward_hook(lambda _, __, out: kept.append(out))
            model.encode_image(x)
            hook.remove()
            return model.visual.ln_post(kept[0])

        return folder, tokens

    return make


LIBRARIES: dict[str, Callable[[Path], tuple[Path, Callable[[Tensor], Tensor]]]] = {
    "transformers Dinov2": _transformers("Dinov2", mlp_ratio=4),
    "transformers Dinov2 SwiGLU": _transformers("Dinov2", use_swiglu_ffn=True),
    "transformers Dinov2WithRegisters": _transformers("Dinov2WithRegisters", num_register_tokens=4),
    "transformers DINOv3": _transformers("DINOv3ViT", num_register_tokens=4, intermediate_size=256),
    "transformers DINOv3 gated": _transformers(
        "DINOv3ViT", num_register_tokens=4, intermediate_size=384, use_gated_mlp=True, hidden_act="silu"
    ),
    "transformers ViT": _transformers("ViT", intermediate_size=256),
    "transformers CLIP": _transformers("CLIPVision", intermediate_size=256),
    "transformers SigLIP": _transformers("SiglipVision", intermediate_size=256),
    "timm ViT with classifier": _timm("vit_base_patch16_224", num_classes=5),
    "timm DINOv2": _timm("vit_small_patch14_dinov2", num_classes=0),
    "timm DINOv2 with registers": _timm("vit_small_patch14_reg4_dinov2", num_classes=0),
    "timm DINOv3": _timm("vit_small_patch16_dinov3", num_classes=0),
    "timm CLIP": _timm("vit_base_patch32_clip_quickgelu_224", num_classes=0),
    "timm SigLIP": _timm("vit_base_patch16_siglip_224", num_classes=0),
    "timm ViT, a file": _timm("vit_base_patch16_224", "model.safetensors", num_classes=0),
    "open_clip": _open_clip(False),
    "open_clip, quick GELU": _open_clip(True),
}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_the_forward_pass_equals_that_of_the_defining_library(kind: str, tmp_path: Path) -> None:
    source, library = LIBRARIES[kind](tmp_path / "weights")
    tower, a = tower_of(source)
    assert a.image_size == SIZE
    with torch.no_grad():
        tokens = tower(images())
        ours = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
        torch.testing.assert_close(ours, library(images()), atol=CLOSE, rtol=CLOSE)


DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}
DINOV3 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def _meta(make: Callable[..., nn.Module], *arguments: Any, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return make(*arguments, **settings)


def _released_dinov2(size: str, registers: int) -> dict[str, Tensor]:
    """Names and shapes of the released ``.pth`` files: images of 518 pixels, a position for the class token, a mask token."""
    name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    state: dict[str, Tensor] = {}
    for key, tensor in _meta(timm.create_model, name, num_classes=0).state_dict().items():
        key = {"reg_token": "register_tokens"}.get(key, key)
        if size == "giant":
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state[key] = torch.empty(1, 1 + 37 * 37, tensor.shape[2], device="meta") if key == "pos_embed" else tensor
    return state | {"mask_token": torch.empty(1, state["cls_token"].shape[2], device="meta")}


def _released_dinov3(size: str) -> dict[str, Tensor]:
    """Names and shapes of the released ``.pth`` files: storage tokens, one bias for queries, keys and values, periods."""
    state: dict[str, Tensor] = {}
    for key, tensor in _meta(timm.create_model, f"vit_{size}_patch16_dinov3_qkvb", num_classes=0).state_dict().items():
        key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if key.endswith("q_bias"):
            for bias in ("bias", "bias_mask"):
                state[key.replace("q_bias", f"qkv.{bias}")] = torch.empty(3 * len(tensor), device="meta")
        elif not key.endswith("v_bias") and not key.startswith("rope"):
            state[key] = tensor
    width = state["cls_token"].shape[2]
    rest = {"mask_token": torch.empty(1, width, device="meta"), "rope_embed.periods": torch.empty(16, device="meta")}
    return state | rest


def _hugging_face(size: str, registers: int, version: int) -> dict[str, Tensor]:
    import transformers

    width, depth, heads = (DINOV2 if version == 2 else DINOV3)[size]
    common = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    if version == 3:
        kind, more = "DINOv3ViT", {"intermediate_size": 4 * width, "num_register_tokens": registers, "patch_size": 16}
    else:
        kind = "Dinov2WithRegisters" if registers else "Dinov2"
        more = {"image_size": 518, "patch_size": 14, "use_swiglu_ffn": size == "giant"}
    config = getattr(transformers, f"{kind}Config")(**common, **more)
    state = dict(_meta(getattr(transformers, f"{kind}Model"), config).state_dict())
    if version == 2:  # transformers 5 computes with two matrices, and saves them as one, as the released files have them
        for name in [name for name in state if ".mlp.gate_proj." in name]:
            both = [state.pop(name), state.pop(name.replace("gate_proj", "up_proj"))]
            state[name.replace("gate_proj", "weights_in")] = torch.cat(both)
        state = {name.replace(".mlp.down_proj.", ".mlp.weights_out."): tensor for name, tensor in state.items()}
    return state


def _strict(state: dict[str, Tensor], expected: dict[str, Any], size: int) -> None:
    """Shapes alone give the architecture, and each tensor has its place."""
    a = architecture_of(renamed(state), Hints(), where="here")
    model = ModelSettings(**a.model)
    assert {key: getattr(model, key) for key in expected} == expected
    assert a.image_size == size
    tower = _meta(build_tower, model, image_size=size)
    assert isinstance(tower, VisionTower)
    fit(state, tower, where="here")


def _sizes(table: dict[str, tuple[int, int, int]], size: str, patch: int, registers: int) -> dict[str, Any]:
    width, depth, heads = table[size]
    return {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch, "registers": registers}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", DINOV2)
def test_every_released_dinov2_is_recognized_from_its_shapes(size: str, registers: int) -> None:
    resampling = "antialias" if registers else "offset"
    expected = _sizes(DINOV2, size, 14, registers) | {"ffn": "swiglu" if size == "giant" else "mlp", "mlp_ratio": 4.0}
    expected |= {"layer_scale": 1e-5, "pos_embed": "learned", "pos_embed_interpolation": resampling}
    _strict(_released_dinov2(size, registers), expected, 518)
    _strict(_hugging_face(size, registers, 2), expected, 518)


@pytest.mark.parametrize("size", DINOV3)
def test_every_released_dinov3_is_recognized_from_its_shapes(size: str) -> None:
    expected = _sizes(DINOV3, size, 16, 4) | {"ffn": "mlp", "mlp_ratio": 4.0, "pos_embed": "rope"}
    _strict(_released_dinov3(size), expected, 224)
    _strict(_hugging_face(size, 4, 3), expected, 224)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-32", {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 32}),
        ("ViT-L-14", {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": 14}),
        ("ViT-H-14", {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}),
        ("ViT-bigG-14", {"embed_dim": 1664, "depth": 48, "num_heads": 16, "patch_size": 14}),
        ("ViT-B-16-SigLIP", {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "pooling": "attention"}),
        ("ViT-SO400M-14-SigLIP", {"embed_dim": 1152, "depth": 27, "num_heads": 16, "patch_size": 14, "pooling": "attention"}),
    ],
)
def test_open_clips_models_are_recognized_from_their_shapes(name: str, expected: dict[str, Any]) -> None:
    import open_clip
    from open_clip.model import CLIP, CustomTextCLIP

    config = open_clip.get_model_config(name)
    assert config is not None
    config["text_cfg"] = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}  # the tower is the matter
    siglip = "SigLIP" in name
    if siglip:
        config["vision_cfg"]["timm_model_pretrained"] = False
    config.pop("custom_text", None)
    model = _meta(CustomTextCLIP if siglip else CLIP, **config)
    _strict(dict(model.state_dict()), expected | {"pre_norm": not siglip}, 224)
