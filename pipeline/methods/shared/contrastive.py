"""Base of contrastive image-text methods: both towers, and gradient caching to contrast a split batch as a whole."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import losses
from pipeline.data.augment.views import Batch, TextSpec
from pipeline.errors import DataError
from pipeline.methods.base import Method, Step
from pipeline.methods.clip.settings import ContrastiveSettings, TextSettings
from pipeline.methods.shared.gradient_cache import Replay, replays
from pipeline.models.groups import ParameterGroup, parameter_groups
from pipeline.models.text import LogitScale, TextTower
from pipeline.models.vision import VisionTower


class Contrastive(Method):
    """Base class of methods that contrast L2-normalized features of images and captions.

    A global batch in several micro-batches is contrasted as one: :meth:`before_accumulation` computes all features without
    storing activations, then the loss of the whole batch and its gradients with respect to features, scale and bias;
    :meth:`contrast` then returns a term with exactly that gradient ("GradCache", arXiv 2101.06983). Both passes use the same
    random draws.

    Args:
        backbone: the vision tower.
        settings: sizes and optimization settings.
        scale: initial inverse temperature.
        bias: initial bias of the logits; ``None`` for the softmax loss.
    """

    couples_batch = True

    def __init__(self, backbone: VisionTower, settings: ContrastiveSettings, *, scale: float, bias: float | None = None) -> None:
        super().__init__()
        self.settings = settings
        # Tokens after the end token affect the feature only without causal attention.
        self.text = TextSpec(settings.text.tokenizer, settings.text.context_length, trim=settings.text.causal)
        embed = settings.embed_dim or settings.text.sizes.embed
        self.backbone = backbone
        self.image_projection = nn.Linear(backbone.width, embed, bias=False)
        nn.init.normal_(self.image_projection.weight, std=backbone.width**-0.5)
        self.text_tower = build_text(settings.text, embed)
        self.logits = LogitScale(scale, bias=bias, largest=settings.max_logit_scale)
        self._replays: deque[Replay] = deque()

    @abstractmethod
    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """L2-normalized features of a micro-batch, fp32 ``[batch, embed]`` each, the captions' last."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Features ``[batch, embed]`` of full images for evaluation, not normalized."""
        features: Tensor = self.image_projection(self.backbone(images).cls)
        return features

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Features ``[batch, embed]`` of captions, not normalized."""
        features: Tensor = self.text_tower(tokens)
        return features

    def compare(self, features: Sequence[Tensor], scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """This rank's loss of its features against those of all ranks."""
        images, texts = features
        if bias is None:
            return losses.clip_loss(images, texts, scale, chunk=self.settings.logit_chunk_size)
        return losses.siglip_loss(images, texts, scale, bias, chunk=self.settings.logit_chunk_size)

    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Contrasts all micro-batches as one batch, if there are several and ``grad_cache`` is on."""
        self._replays.clear()
        if len(batches) > 1 and self.settings.grad_cache:
            self._replays = replays(self, batches, self.features, self.compare, self._numbers())

    def contrast(self, features: Sequence[Tensor]) -> Tensor:
        """The loss of a micro-batch's features, or with ``grad_cache`` its part of the whole batch's loss."""
        numbers = self._numbers()
        images, texts = features[0].detach(), features[-1].detach()
        self.metrics = {"logit_scale": numbers[0].detach().squeeze(0), "pair_similarity": (images * texts).sum(1).mean()}
        if not self._replays:
            return self.compare(features, *numbers)
        return self._replays.popleft().of(features, numbers)

    def _numbers(self) -> list[Tensor]:
        """Scale, and bias where there is one."""
        return [number for number in self.logits() if number is not None]

    def on_step_skipped(self) -> None:
        """Discards the gradient cache."""
        super().on_step_skipped()
        self._replays.clear()

    def parameter_groups(self) -> list[ParameterGroup]:
        """Groups with layer-wise learning rates in both towers, without weight decay where the settings exclude it."""
        s = self.settings
        vit = self.backbone.vit
        tags: dict[str, list[Any]] = {
            "positions": [vit.pos_embed, self.text_tower.positions],
            "class_token": [vit.cls_token, getattr(vit, "reg_token", None)],
            "token_embedding": [self.text_tower.tokens.weight],
        }
        undecayed = [p for tag in s.no_weight_decay for p in tags[tag] if p is not None]
        scales = dict(self.text_tower.lr_scales(s.text_layerwise_lr_decay, s.text_lr_mult))
        return parameter_groups(self, layer_decay=s.layerwise_lr_decay, undecayed=undecayed, scales=scales)

    def export(self) -> dict[str, nn.Module]:
        """Both towers and the image projection."""
        return {"backbone": self.backbone, "image_projection": self.image_projection, "text": self.text_tower}


def build_text(t: TextSettings, embed: int) -> TextTower:
    """Builds a newly initialized text tower with output dimension ``embed``."""
    sizes = t.sizes
    return TextTower(
        width=sizes.width,
        depth=sizes.depth,
        heads=sizes.heads,
        embed=embed,
        context=t.context_length,
        causal=t.causal,
        quick_gelu=t.activation == "quick_gelu",
    )


def caption_tokens(batch: Batch) -> Tensor:
    """The caption tokens of a batch.

    Raises:
        DataError: the batch has no captions.
    """
    if batch.tokens is None:
        raise DataError("a batch has no captions", where="Method.text", hint="Load batches with the method's TextSpec")
    return batch.tokens


def unit(features: Tensor) -> Tensor:
    """L2-normalizes features, in fp32."""
    return F.normalize(features.float(), dim=-1, eps=1e-12)


def random_keep(ids: Tensor, position: int, patches: int, drop: float) -> Tensor:
    """Indices of the patches that each sample keeps; depends only on the sample and the position in the run.

    Args:
        ids: sample numbers, int64 ``[samples]``.
        position: samples consumed by the run before this global batch.
        patches: number of patches per image.
        drop: fraction of patches to drop; at least one is kept.

    Returns:
        int64 ``[samples, kept]``, ascending, on the device of the numbers.
    """
    kept = max(1, math.floor(patches * (1 - drop) + 1e-9))
    key = _mixed(_mixed(ids & 0x7FFFFFFFFFFFFFFF) ^ position)
    draws = _mixed(key[:, None] ^ torch.arange(patches, dtype=torch.int64, device=ids.device))
    return draws.topk(kept, dim=1).indices.sort(dim=1).values


def _mixed(x: Tensor) -> Tensor:
    """A bijective hash of int64 (splitmix64's finalizer; masks make arithmetic shifts logical)."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))
