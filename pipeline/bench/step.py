"""A whole training step against the same step by others: CLIP against open_clip, with the same weights and the same batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.bench import pairs
from pipeline.data.text import trimmed
from pipeline.data.views import Batch
from pipeline.errors import ConfigError
from pipeline.methods import ClipSettings, TextSettings
from pipeline.models.text import from_open_clip
from pipeline.models.vision import build_tower
from pipeline.recipes.base import Step
from pipeline.recipes.clip import CLIP
from pipeline.settings import ModelSettings

OURS, THEIRS = "fovea", "open_clip"
TOWERS = {
    "B-32": "vit_base_patch32_224",
    "B-16": "vit_base_patch16_224",
    "L-16": "vit_large_patch16_224",
    "tiny": "vit_tiny_patch16_224",
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        model: of :data:`TOWERS`.
        batch: pictures with captions.
        caption: tokens of a caption, marks included; the rest of 77 is padding, which our data plane leaves out.
        rounds: that count.
        device: ``cpu`` or ``cuda``.
        bf16: compute under autocast.
    """

    model: str = "B-32"
    batch: int = 8
    caption: int = 20
    rounds: int = 3
    device: str = "cpu"
    bf16: bool = False


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        cases: by name, see :data:`OURS` and :data:`THEIRS`.
        losses: of the first step, by name.
    """

    cases: dict[str, pairs.Case]
    losses: dict[str, float]


def measure(options: Options, *, tell: Callable[[str], None] = lambda _: None) -> Result:
    """Compares the losses of the same weights first, then times and memory.

    Raises:
        ConfigError: no such model, or the two do not agree about the loss: a faster wrong step does not count.
    """
    if options.model not in TOWERS:
        raise ConfigError(f"{options.model!r} is no size", where="--model", mend=f"choose of {', '.join(TOWERS)}")
    device = torch.device(options.device)
    tell("building both")
    ours, theirs = _models(options, device)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    tokens = torch.randint(1, 49405, (options.batch, 77))
    tokens[:, 0], tokens[:, options.caption - 1], tokens[:, options.caption :] = 49406, 49407, 0
    cut = torch.from_numpy(trimmed(tokens.numpy())).to(device)  # as our data plane hands them over
    tokens = tokens.to(device)
    batch = Batch(
        views={"image": [images]},
        labels=torch.zeros(options.batch, dtype=torch.int64),
        keys=[str(n) for n in range(options.batch)],
        ids=list(range(options.batch)),
        position=0,
        tokens=cut,
    )

    def mine() -> torch.Tensor:
        return ours(batch, Step())["contrastive"]

    def other() -> torch.Tensor:
        a, b, scale = theirs(images, tokens)
        logits, labels = scale * a @ b.T, torch.arange(len(a), device=device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    rivals, losses = {}, {}
    for name, model, forward in ((OURS, ours, mine), (THEIRS, theirs, other)):
        act = partial(_step, forward, _optimizer(model, device), options.bf16, device)
        losses[name] = act()
        rivals[name] = act
    if abs(losses[OURS] - losses[THEIRS]) > 1e-2 * abs(losses[THEIRS]):
        raise ConfigError(f"the losses of the same weights differ: {losses}", where="fovea bench step")
    tell("measuring")
    return Result(pairs.measure(rivals, rounds=options.rounds, device=device), losses)


def _step(forward: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, bf16: bool, device: torch.device) -> float:
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = forward()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _optimizer(model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=device.type == "cuda")


def _models(options: Options, device: torch.device) -> tuple[CLIP, Any]:
    import open_clip

    tiny, torch_name = options.model == "tiny", TOWERS[options.model]
    text = TextSettings(architecture=None, width=64, depth=2, heads=2) if tiny else TextSettings()
    sizes = text.sizes
    torch.manual_seed(0)
    settings = ClipSettings(image_size=224, text=text, patch_dropout=0.0)
    ours = CLIP(build_tower(ModelSettings(timm=torch_name), image_size=224), settings)
    theirs: Any = open_clip.CustomTextCLIP(
        sizes.embed,
        vision_cfg={"timm_model_name": torch_name, "timm_pool": "token", "timm_proj": "linear", "image_size": 224},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": sizes.width, "heads": sizes.heads, "layers": sizes.depth},
    )
    state = theirs.state_dict()
    ours.text_tower.load_state_dict(from_open_clip(state))
    trunk = {name.removeprefix("visual.trunk."): tensor for name, tensor in state.items() if name.startswith("visual.trunk.")}
    ours.backbone.vit.load_state_dict(trunk)
    with torch.no_grad():
        ours.image_projection.weight.copy_(state["visual.head.proj.weight"])
    return ours.to(device).train(), theirs.to(device).train()


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """The page that a person reads."""
    told = ", ".join(f"{name} {loss:.6f}" for name, loss in result.losses.items())
    lines = ["# A training step of CLIP", "", f"`{command}`", "", *(f"- {name}: {value}" for name, value in machine.items())]
    lines += [
        f"- {TOWERS[options.model]}, {options.batch} pairs, captions of {options.caption} tokens (open_clip pads to 77), "
        "forward, backward, AdamW",
        f"- first losses of the same weights and batch: {told}",
        "",
        *pairs.table(result.cases, THEIRS),
    ]
    return "\n".join(lines) + "\n"
