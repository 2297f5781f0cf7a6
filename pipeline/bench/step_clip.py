"""Builds our and open_clip's CLIP training step with the same weights and the same batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.bench.pairs import Contest
from pipeline.data.augment.views import Batch
from pipeline.data.loader.text import trimmed
from pipeline.methods.base import Step
from pipeline.methods.clip.method import CLIP
from pipeline.methods.clip.settings import ClipSettings, TextSettings
from pipeline.models.settings import ModelSettings
from pipeline.models.text import from_open_clip
from pipeline.models.vision import build_tower

TOWERS = {
    "B-32": "vit_base_patch32_224",
    "B-16": "vit_base_patch16_224",
    "L-16": "vit_large_patch16_224",
    "tiny": "vit_tiny_patch16_224",
}


def contest(model: str, samples: int, caption: int, *, bf16: bool, device: torch.device) -> Contest:
    """Both steps, with the same weights and the same batch.

    Args:
        model: one of :data:`TOWERS`.
        samples: images with captions.
        caption: tokens per caption, including start and end tokens; the rest of 77 is padding, which our data pipeline omits.
        bf16: compute under autocast.
        device: device of the weights and the batch.
    """
    ours, theirs = _models(model, device)
    images = torch.randn(samples, 3, 224, 224, device=device)
    tokens = torch.randint(1, 49405, (samples, 77))
    tokens[:, 0], tokens[:, caption - 1], tokens[:, caption:] = 49406, 49407, 0
    cut = torch.from_numpy(trimmed(tokens.numpy())).to(device)  # as provided by our data pipeline
    tokens = tokens.to(device)
    batch = Batch(
        views={"image": [images]},
        labels=torch.zeros(samples, dtype=torch.int64),
        keys=[str(n) for n in range(samples)],
        ids=list(range(samples)),
        position=0,
        tokens=cut,
    )

    def our_loss() -> torch.Tensor:
        return ours(batch, Step())["contrastive"]

    def their_loss() -> torch.Tensor:
        a, b, scale = theirs(images, tokens)
        logits, labels = scale * a @ b.T, torch.arange(len(a), device=device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    steps = [
        partial(_step, forward, _optimizer(net, device), bf16, device)
        for net, forward in ((ours, our_loss), (theirs, their_loss))
    ]
    about = f"{TOWERS[model]}, {samples} pairs, captions of {caption} tokens (open_clip pads to 77), forward, backward, AdamW"
    blocks = [*ours.backbone.vit.blocks, *ours.text_tower.blocks]
    return Contest(steps[0], ("open_clip", steps[1]), blocks, lambda: (steps[0](), steps[1]()), about)


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


def _models(model: str, device: torch.device) -> tuple[CLIP, Any]:
    import open_clip

    tiny, torch_name = model == "tiny", TOWERS[model]
    text = TextSettings(architecture=None, width=64, depth=2, num_heads=2) if tiny else TextSettings()
    sizes = text.sizes
    torch.manual_seed(0)
    settings = ClipSettings(text=text, patch_dropout=0.0)
    ours = CLIP(build_tower(ModelSettings(timm_name=torch_name), image_size=224), settings)
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
