"""SimVLM (Wang et al., "Simple visual language model pretraining with weak supervision", arXiv 2108.10904), in a small form.

Prefix language modelling: a transformer gets the image and the beginning of its caption as a prefix with bidirectional
attention, and predicts the rest of the caption causally. The number of prefix tokens is drawn for each caption.

Differences from the paper: images pass a vision tower (so that there is a backbone to export) instead of three convolutional
stages, there is one transformer instead of encoder and decoder, and no text-only batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch, TextSpec
from pipeline.methods.base import Method, Step
from pipeline.methods.shared.captioning import average_count, caption_nll, prediction_mask
from pipeline.methods.shared.contrastive import caption_tokens, random_keep
from pipeline.methods.shared.crops import one_view, view_stages
from pipeline.methods.simvlm.settings import SimvlmSettings
from pipeline.models.captions import PrefixLanguageModel, last_position
from pipeline.models.groups import ParameterGroup, parameter_groups
from pipeline.models.vision import VisionTower, build_tower


class SimVLM(Method):
    """SimVLM; see the module.

    Args:
        backbone: the vision tower.
        settings: sizes.
    """

    def __init__(self, backbone: VisionTower, settings: SimvlmSettings) -> None:
        super().__init__()
        self.settings = settings
        self.views, self.curriculum = one_view(settings), view_stages(settings, one_view)
        self.text = TextSpec(settings.text.tokenizer, settings.text.context_length)
        sizes = settings.text.sizes
        self.backbone = backbone
        self.language = PrefixLanguageModel(
            width=sizes.width, depth=sizes.depth, heads=sizes.heads, context=settings.text.context_length, picture=backbone.width
        )
        self.backbone.mask_token.requires_grad_(False)  # used by other methods only: it never gets a gradient here
        self._counts: deque[Tensor] = deque()

    @override
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Counts the tokens to predict in all micro-batches."""
        count = average_count([prediction_mask(caption_tokens(batch), self.prefix(batch)) for batch in batches])
        self._counts = deque([count] * len(batches))

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss term ``caption``."""
        tokens, prefix = caption_tokens(batch), self.prefix(batch)
        mask = prediction_mask(tokens, prefix)
        count = self._counts.popleft() if self._counts else average_count([mask])
        seen = self.backbone(batch.views["image"][0])
        image_tokens = torch.cat([seen.cls[:, None], seen.patches], dim=1)
        states = self.language(image_tokens, tokens, prefix)
        rows = self.settings.caption_chunk_size
        caption = caption_nll(states, tokens, mask, self.language.vocabulary, rows, self._predicted(batch)) / count
        self.metrics = {"token_perplexity": caption.detach().exp()}
        return {"caption": caption}

    def prefix(self, batch: Batch) -> Tensor:
        """Number of text tokens in each prefix, int64 ``[batch]``: at least the start token, never the last token.

        Depends only on the sample and the position in the run, not on the rank.
        """
        return torch.minimum(self._drawn(batch, batch.numbers()), last_position(caption_tokens(batch)).clamp(min=1))

    def _drawn(self, batch: Batch, numbers: Tensor) -> Tensor:
        most = self.settings.longest_prefix
        return 1 + random_keep(numbers, batch.position, most, 1 - 1 / most)[:, 0]

    def _predicted(self, batch: Batch) -> int | None:
        """Number of tokens to predict, computed on the host, which otherwise would wait for the device."""
        if batch.text_ends is None:
            return None
        last = torch.tensor(batch.text_ends)
        prefix = torch.minimum(self._drawn(batch, torch.tensor(batch.ids)), last.clamp(min=1))
        return int((last - prefix + 1).clamp(min=0).sum())

    @override
    def on_step_skipped(self) -> None:
        """Discards the prepared state."""
        super().on_step_skipped()
        self._counts.clear()

    @override
    def parameter_groups(self) -> list[ParameterGroup]:
        """Groups with layer-wise learning rates in the tower and no weight decay on vectors."""
        return parameter_groups(self, layer_decay=self.settings.layerwise_lr_decay)

    @override
    def export(self) -> dict[str, nn.Module]:
        """The vision tower, as ``backbone``, and the language model."""
        return {"backbone": self.backbone, "language": self.language}


def build(config: Config, settings: SimvlmSettings) -> SimVLM:
    """Builds SimVLM with a newly initialized vision tower."""
    return SimVLM(build_tower(config.model, image_size=settings.views.global_size), settings)
