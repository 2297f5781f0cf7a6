"""Each initial tensor of each shipped config against a table of how the authors' code draws it.

The table holds facts read in the released code (facebookresearch dinov2, dinov3, dino, moco, moco-v3; google-research simclr;
deepmind byol with haiku's defaults; open_clip; SLIP and DetailCLIP with the timm of their time). A tensor without rule fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.methods.registry import build_method
from pipeline.models.depth import kept_rows
from pipeline.models.initialization import TRUNCATED
from pipeline.models.resnet import build_trunk
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LARGE = re.compile("_b16|_b32|resnet50|distill|vitg|datacomp")
NAMES = sorted(
    f"{path.parent.name}/{path.stem}"
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name != "clusters" and not path.stem.startswith(("_", "base"))
)


@dataclass(frozen=True)
class Drawn:
    """Mean and deviation that a tensor starts with; a deviation of 0 means a constant."""

    mean: float
    std: float


Rule = Callable[[tuple[int, ...]], Drawn]


def _fan_in(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def constant(value: float) -> Rule:
    return lambda shape: Drawn(value, 0.0)


def normal(std: float) -> Rule:
    return lambda shape: Drawn(0.0, std)


def width(power: float, axis: int = -1, factor: float = 1.0) -> Rule:
    return lambda shape: Drawn(0.0, factor * shape[axis] ** power)


def torch_linear(shape: tuple[int, ...]) -> Drawn:
    """``nn.Linear`` and ``nn.Conv2d``: uniform within 1 / sqrt(fan-in)."""
    return Drawn(0.0, _fan_in(shape) ** -0.5 / math.sqrt(3))


def xavier(parts: int = 1) -> Rule:
    return lambda shape: Drawn(0.0, math.sqrt(2 / (shape[0] / parts + _fan_in(shape))))


def fan_out(shape: tuple[int, ...]) -> Drawn:
    return Drawn(0.0, math.sqrt(2 / (shape[0] * math.prod(shape[2:]))))


def fan_in(factor: float) -> Rule:
    return lambda shape: Drawn(0.0, factor * _fan_in(shape) ** -0.5)


def torch_bias(inputs: int) -> Rule:
    return lambda shape: Drawn(0.0, inputs**-0.5 / math.sqrt(3))


ZERO, ONE, SMALL = constant(0.0), constant(1.0), normal(0.02)
NORMS = {r"norm\w*\.(\d\.)?weight$": ONE, r"norm\w*\.(\d\.)?bias$": ZERO, r"\.bn\.weight$": ONE, r"\.bn\.bias$": ZERO}
SCALES = {r"\.ls[12]\.gamma$": constant(1e-5), r"\.gamma_[12]$": constant(1e-5)}


def transformer(config: Config) -> dict[str, Rule]:
    """A vision transformer."""
    m, token = config.model, SMALL if config.model.init == "dino" else normal(1e-6)
    rules: dict[str, Rule] = {**NORMS, **SCALES, r"backbone\.mask_token$": ZERO}
    if m.init == "open_clip":
        rules |= {r"vit\.(pos_embed|cls_token)$": width(-0.5)}
    rules |= {r"vit\.pos_embed$": SMALL, r"vit\.(cls_token|reg_token)$": SMALL if m.pos_embed == "rope" else token}
    if m.init == "mocov3":
        rules |= {r"\.patch_embed\.proj\.weight$": xavier(), r"\.patch_embed\.proj\.bias$": ZERO}
        rules |= {r"\.attn\.qkv\.weight$": xavier(3), r"vit\.blocks.*\.weight$": xavier(), r"vit\.blocks.*\.bias$": ZERO}
        return rules
    rules |= {r"\.patch_embed\..*weight$": torch_linear, r"\.patch_embed\..*bias$": _patch_bias(m)}
    if m.init == "open_clip":
        rules |= {r"\.attn\.qkv\.weight$": xavier()}
        rules |= {r"\.(attn\.proj|mlp\.fc[12])\.weight$": torch_linear, r"\.attn\..*bias$": ZERO}
        tokens = 768
        return rules | {r"\.mlp\.fc1\.bias$": torch_bias(tokens), r"\.mlp\.fc2\.bias$": torch_bias(4 * tokens)}
    return rules | {r"vit\.blocks.*weight$": SMALL, r"vit\.blocks.*bias$": ZERO, r"class_position$": SMALL}


def _patch_bias(m: ModelSettings) -> Rule:
    side, inner = m.patch_side or 0, (m.embed_dim or 0) // 2
    # The last layer of a stack of convolutions is a linear one from half as many channels.
    return (
        (lambda shape: Drawn(0.0, (shape[0] / 2) ** -0.5 / math.sqrt(3)))
        if m.stem == "conv" and inner
        else torch_bias(3 * side**2)
    )


def resnet(config: Config) -> dict[str, Rule]:
    """A ResNet: torchvision's, MoCo v3's with the last norm at 0, SimCLR's by TensorFlow, BYOL's by haiku."""
    init = config.model.init
    last = r"\.bn3\.weight$" if "50" in (config.model.timm_name or "") else r"layer\d\.\d+\.bn2\.weight$"
    convolution = {"simclr": fan_in(1.0), "byol": fan_in(TRUNCATED)}.get(init, fan_out)
    zeroed = {last: ZERO} if init in ("simclr", "byol", "mocov3") else {}
    # A projection beside a block is a convolution, then a norm of its own.
    norms = {r"\.bn\d\.weight$": ONE, r"\.bn\d\.bias$": ZERO, r"downsample\.1\.weight$": ONE, r"downsample\.1\.bias$": ZERO}
    return {**zeroed, **norms, r"\.(conv\d|downsample\.0)\.weight$": convolution}


def text(prefix: str, depth: int) -> dict[str, Rule]:
    """CLIP's text tower, as open_clip and SLIP have it."""
    into_sum = (2 * depth) ** -0.5
    return {
        rf"{prefix}\.tokens\.weight$": SMALL,
        rf"{prefix}\.positions$": normal(0.01),
        rf"{prefix}\.cls$": normal(0.01),
        rf"{prefix}\.blocks.*\.qkv\.weight$": width(-0.5),
        rf"{prefix}\.blocks.*\.proj\.weight$": width(-0.5, factor=into_sum),
        rf"{prefix}\.blocks.*\.(qkv|proj)\.bias$": ZERO,
        rf"{prefix}\.blocks.*\.fc1\.weight$": width(-0.5, factor=2**-0.5),
        rf"{prefix}\.blocks.*\.fc2\.weight$": lambda shape: Drawn(0.0, shape[0] ** -0.5 * into_sum),
        rf"{prefix}\.blocks.*\.fc1\.bias$": lambda shape: Drawn(0.0, (shape[0] / 4) ** -0.5 / math.sqrt(3)),
        rf"{prefix}\.blocks.*\.fc2\.bias$": lambda shape: Drawn(0.0, (shape[0] * 4) ** -0.5 / math.sqrt(3)),
        rf"{prefix}\.projection\.weight$": width(-0.5),
    }


def prototypes(config: Config) -> dict[str, Rule]:
    """DINO's head: weight-normed prototypes as ``nn.Linear`` draws them; DINOv3's plain ones from 0.02."""
    plain = getattr(config.method, "head_norm", None) == "plain"
    head = r"(^|\.)(\w*head|heads\.\w+|teacher_\w+|ibot_head|dino_head)\."
    return {
        head + r"(\w+\.)*mlp\.\d+\.weight$": SMALL,
        head + r"(\w+\.)*mlp\.\d+\.bias$": ZERO,
        r"\.last\.direction$": SMALL if plain else torch_linear,
        r"\.last\.gain$": ONE,
    }


def mlps(config: Config) -> dict[str, Rule]:
    """Projector and predictor: batch norms at 1 and 0, layers as ``nn.Linear`` draws them or by the authors' framework."""
    layer: Rule = {"simclr": normal(0.01), "byol": fan_in(TRUNCATED)}.get(config.model.init, torch_linear)
    heads = ("projector", "predictor", *(["head.mlp"] if getattr(config.method, "head_norm", "") == "batch" else []))
    norm = rf"({'|'.join(map(re.escape, heads))})\.(1|4|7)\."
    last = r"(projector|predictor)\.\d\."
    inner = config.model.embed_dim or (2048 if config.model.timm_name == "resnet50" else 8 * (config.model.resnet_width or 64))
    biased = config.method.name == "mocov2" or getattr(config.method, "head_norm", "") == "none"
    rules: dict[str, Rule] = {norm + "weight$": ONE, norm + "bias$": ZERO} if config.method.name != "mocov2" else {}
    if biased and getattr(config.method, "head_norm", "none") == "batch":
        rules |= {r"projector\.1\.weight$": ONE, r"projector\.1\.bias$": ZERO}
    rules |= {last + "weight$": layer}
    return rules | ({last + "bias$": lambda shape: Drawn(0.0, inner**-0.5 / math.sqrt(3))} if biased else {})


def table(config: Config) -> dict[str, Rule]:
    """All rules of a config, the first that fits counts."""
    method, m = config.method, config.model
    rules: dict[str, Rule] = resnet(config) if "resnet" in (m.timm_name or "") else transformer(config)
    rules |= {r"^logits\.": lambda shape: Drawn(math.nan, 0.0), r"^image_projection\.weight$": width(-0.5)}
    if method.name in ("clip", "detailclip", "coca"):
        rules |= text("text_tower", getattr(method, "text").sizes.depth)  # noqa: B009
    if method.name == "detailclip":
        rules |= {r"decoder\.mask_token$": SMALL, r"decoder\.embed\.weight$": xavier(), r"decoder\.pixels\.weight$": torch_linear}
        rules |= {r"decoder\.blocks.*\.weight$": xavier(), r"decoder\.blocks.*\.bias$": ZERO}
        rules |= {r"decoder\.(embed|pixels)\.bias$": torch_bias(768 if m.timm_name else m.embed_dim or 0)}
    if method.name in ("dinov2", "detailclip", "dino", "distill"):
        rules = prototypes(config) | rules
    if method.name in ("simclr", "byol", "mocov2", "mocov3", "dino", "lejepa"):
        rules = mlps(config) | rules
    if method.name == "lejepa":
        rules = {r"projector\.6\.bias$": torch_bias(getattr(method, "head_hidden"))} | rules  # noqa: B009
    if method.name in ("coca", "simvlm") or getattr(method, "image_pool", "") == "attention":  # no code of the authors
        rules |= {r"^(text_tower\.(decoder|vocabulary)|language|pooler|pool)\.": lambda shape: Drawn(math.nan, math.nan)}
    return rules


def differs(tensor: Tensor, drawn: Drawn) -> bool:
    """Whether a tensor cannot be such a sample: five standard errors, and a hundredth for what is rounded."""
    x = tensor.detach().double().flatten()
    if math.isnan(drawn.std) or math.isnan(drawn.mean):
        return False
    if drawn.std == 0:
        return bool((x - drawn.mean).abs().max() > 1e-9)
    n = len(x)
    apart = abs(float(x.mean()) - drawn.mean) > 5 * drawn.std / math.sqrt(n)
    return apart or abs(float(x.std()) / drawn.std - 1) > 5 / math.sqrt(2 * n) + 0.01


def shallow(config: Config) -> Config:
    """With few blocks and prototypes: none of the rules looks at how many there are."""
    update = {"depth": 2} if config.model.depth else {}
    method = {"prototypes": 512} if hasattr(config.method, "prototypes") else {}
    method |= {"ibot_prototypes": None} if hasattr(config.method, "ibot_prototypes") else {}
    if hasattr(config.method, "teacher_model"):
        method |= {"teacher_model": config.method.teacher_model.model_copy(update={"depth": 2})}
    if getattr(config.method, "students", ()):
        few = [one.model_copy(update={"depth": 2}) for one in config.method.students]
        method |= {"students": tuple(few)}
    return config.replace(model=config.model.model_copy(update=update), method=config.method.model_copy(update=method))


def marks(name: str) -> list[pytest.MarkDecorator]:
    """Towers that take seconds: every run tries the first of each method, full runs all."""
    if not LARGE.search(name):
        return []
    first = next(n for n in NAMES if LARGE.search(n) and n.partition("/")[0] == name.partition("/")[0])
    return [pytest.mark.slow] if name == first else [pytest.mark.slow, pytest.mark.full]


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in NAMES])
def test_every_initial_tensor_is_drawn_as_in_the_authors_code(name: str) -> None:
    config = shallow(load(name).config)
    rules = table(config)
    torch.manual_seed(0)
    method = build_method(config)
    wrong = []
    for key, tensor in method.named_parameters():
        if not tensor.requires_grad and key.endswith("pos_embed") and getattr(config.method, "pos_embed", "") == "sincos":
            continue
        rule = next((rule for pattern, rule in rules.items() if re.search(pattern, key)), None)
        if rule is None:
            wrong.append(f"{key}: no rule")
        elif differs(tensor, rule(tuple(tensor.shape))):
            drawn = rule(tuple(tensor.shape))
            wrong.append(f"{key} {list(tensor.shape)}: {float(tensor.mean()):.5f} ± {float(tensor.std()):.5f}, theirs {drawn}")
    assert not wrong, "\n".join(wrong[:20])


def test_the_start_called_open_clip_is_that_librarys() -> None:
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(
        image_size=64, patch_size=16, width=256, layers=2, heads=4, mlp_ratio=4.0, output_dim=32
    ).state_dict()
    sizes = {"embed_dim": 256, "depth": 2, "num_heads": 4, "patch_size": 16, "layer_scale": None, "init": "open_clip"}
    vit = build_tower(ModelSettings.model_validate(sizes), image_size=64).vit.state_dict()
    inner = {
        "attn.qkv.weight": "attn.in_proj_weight",
        "attn.qkv.bias": "attn.in_proj_bias",
        "attn.proj.weight": "attn.out_proj.weight",
    }
    inner |= {"attn.proj.bias": "attn.out_proj.bias", "mlp.fc1.weight": "mlp.c_fc.weight", "mlp.fc1.bias": "mlp.c_fc.bias"}
    inner |= {"mlp.fc2.weight": "mlp.c_proj.weight", "mlp.fc2.bias": "mlp.c_proj.bias", "norm1.weight": "ln_1.weight"}
    names = {f"blocks.1.{ours}": f"transformer.resblocks.1.{name}" for ours, name in inner.items()}
    names |= {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj.weight": "conv1.weight"}
    for ours, name in names.items():
        mine, other = vit[ours].double(), theirs[name].double()
        assert float(mine.std()) == pytest.approx(float(other.std()), rel=0.02 + 5 * mine.numel() ** -0.5, abs=1e-9), ours
        assert abs(float(mine.mean() - other.mean())) < 1e-9 + 7 * float(other.std()) * mine.numel() ** -0.5, ours


@pytest.mark.parametrize(("init", "name"), [("mocov3", "resnet50"), ("mocov3", "resnet18"), ("simclr", "resnet34")])
def test_the_last_norm_of_each_block_starts_at_zero(init: str, name: str) -> None:
    net = build_trunk(ModelSettings.model_validate({"timm_name": name, "init": init}), image_size=32).net
    blocks = [block for stage in (net.layer1, net.layer4) for block in stage]  # type: ignore[union-attr]
    last = "bn3" if name == "resnet50" else "bn2"
    assert all(not getattr(block, last).weight.any() and getattr(block, "bn1").weight.all() for block in blocks)  # noqa: B009


def test_the_rate_of_stochastic_depth_can_rise_with_the_block() -> None:
    settings = {"embed_dim": 32, "depth": 5, "num_heads": 2, "patch_size": 8, "drop_path": 0.4}
    rising = build_tower(ModelSettings.model_validate({**settings, "drop_path_schedule": "linear"}), image_size=32)
    assert [getattr(block, "dropped", 0.0) for block in rising.vit.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    rows = build_tower(
        ModelSettings.model_validate({**settings, "drop_path_schedule": "linear", "batched_drop_path": False}), image_size=32
    )
    probabilities = [getattr(block.drop_path1, "drop_prob", 0.0) for block in rows.vit.blocks]
    assert probabilities == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert kept_rows(10, 0.4) == 6


def test_a_class_position_of_its_own_moves_apart_and_merges_into_the_token() -> None:
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "registers": 3}
    torch.manual_seed(0)
    apart = build_tower(ModelSettings.model_validate({**settings, "cls_pos_embed": True}), image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = apart(images)
    (tokens.cls * torch.randn(2, 32)).sum().backward()
    token, position = apart.vit.cls_token.grad, apart.class_position.grad  # type: ignore[union-attr]
    assert torch.equal(token, position) and bool(token.any())
    apart.merge_class_position()
    merged = build_tower(ModelSettings.model_validate(settings), image_size=32).eval()
    merged.vit.load_state_dict(apart.vit.state_dict())
    for ours, theirs in zip(tokens[:3], merged(images)[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
