"""Runs DINOv2's step with the authors' own code, if installed; contains none of that code.

The package ``dinov2`` must be importable (from the package index, or a checkout on ``PYTHONPATH``), with xformers, omegaconf,
fvcore and iopath. It has its own licence; that of the first release forbids commercial use.

Differences from its trainer: one process, so neither FSDP nor its loss scaling, which bf16 does not need; on a CPU, where
xformers has no kernels, its three operations are replaced by those of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby, pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.augment.views import Batch
from pipeline.errors import ConfigError
from pipeline.methods.dinov2.method import DINOv2

PACKAGES = ("dinov2", "xformers", "omegaconf", "fvcore", "iopath")
INSTALL = "Run pip install --no-deps dinov2 xformers && pip install omegaconf fvcore"
_ARCHITECTURE = "vit_of_fovea"


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


class Official:
    """Student, teacher, optimizer and step of the official code, with the weights of our method.

    Args:
        ours: the method with shared heads, its teacher equal to its student.
        size: width, depth and heads of the tower.
        drop: rate of stochastic depth.
        layer_scale: initial value of LayerScale.
        batch: the batch of both.
        bf16: compute under autocast.

    Raises:
        ConfigError: a package is missing, or is another one of that name.
    """

    def __init__(
        self, ours: DINOv2, size: tuple[int, int, int], drop: float, layer_scale: float, batch: Batch, bf16: bool
    ) -> None:
        if absent := missing():
            raise ConfigError(f"the official DINOv2 needs {', '.join(absent)}", where="fovea bench step", hint=f"Run {INSTALL}")
        self.device = batch.views["global"][0].device
        self._temperature, self._bf16 = 0.07, bf16
        self._clip = ours.settings.clip_norm
        try:
            self.model: Any = _model(ours, size, drop, layer_scale).to(self.device)
        except (ImportError, AssertionError, AttributeError) as error:
            raise ConfigError(
                f"the installed version of dinov2 is not supported ({error})", where="fovea bench step", hint=f"Run {INSTALL}"
            ) from error
        self.model.train()
        self._images = _collated(batch)
        self._optimizer = torch.optim.AdamW(self.model.get_params_groups(), lr=0.0, weight_decay=0.0)
        if self.device.type == "cpu":
            _without_kernels()

    def set_drop(self, rate: float) -> None:
        """Set the rate of stochastic depth."""
        for block in self.model.student.backbone.blocks:
            block.sample_drop_ratio = rate

    def step(self) -> float:
        """Run a whole step of its trainer without changing weights, since learning rate and teacher update are 0; returns the
        loss.
        """
        self._optimizer.zero_grad(set_to_none=True)
        images = {**self._images, "n_masked_patches": self._images["n_masked_patches"].clone()}  # summed over ranks in place
        with _moved_nowhere(self.device), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            terms = self.model.forward_backward(images, teacher_temp=self._temperature)
        for network in self.model.student.values():
            nn.utils.clip_grad_norm_(network.parameters(), self._clip or torch.inf)
        self._optimizer.step()
        self._follow()
        logged = {name: float(term) for name, term in terms.items()}  # its loop reads each of them in each step
        return (
            logged["dino_local_crops_loss"]
            + logged["dino_global_crops_loss"]
            + 2 * logged["koleo_loss"]  # both are halved for display
            + 2 * logged["ibot_loss"]
        )

    @torch.no_grad()
    def _follow(self) -> None:
        teacher, student = (list(networks.parameters()) for networks in (self.model.teacher, self.model.student))
        torch._foreach_mul_(teacher, 1.0)
        torch._foreach_add_(teacher, student, alpha=0.0)


def _model(ours: DINOv2, size: tuple[int, int, int], drop: float, layer_scale: float) -> Any:
    from dinov2 import models
    from dinov2.configs import dinov2_default_config
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from dinov2.train.ssl_meta_arch import SSLMetaArch
    from omegaconf import OmegaConf

    width, depth, heads = size
    vits = models.vision_transformer

    def tower(**options: Any) -> nn.Module:
        def block(**inner: Any) -> nn.Module:
            made: nn.Module = NestedTensorBlock(attn_class=MemEffAttention, **inner)
            return made

        made: nn.Module = vits.DinoVisionTransformer(
            embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=4, block_fn=block, **options
        )
        return made

    s = ours.settings
    overrides = {
        "student": {"arch": _ARCHITECTURE, "patch_size": ours.backbone.patch, "drop_path_rate": drop, "layerscale": layer_scale},
        "dino": {
            "head_n_prototypes": s.prototypes,
            "head_bottleneck_dim": s.head_bottleneck,
            "head_hidden_dim": s.head_hidden,
            "koleo_loss_weight": s.koleo_weight,
        },
        "train": {"centering": "sinkhorn_knopp"},
        "crops": {"global_crops_size": s.views.global_size, "local_crops_number": s.views.local_count},
        "compute_precision": {"grad_scaler": False},
    }
    with mock.patch.dict(vars(vits), {_ARCHITECTURE: tower}):
        model = SSLMetaArch(OmegaConf.merge(dinov2_default_config, OmegaConf.create(overrides)))
    model.need_to_synchronize_fsdp_streams = False
    state = {name: tensor.detach().clone() for name, tensor in ours.backbone.vit.state_dict().items()}
    state["mask_token"] = ours.backbone.mask_token.detach().clone().flatten(0, 1)
    head = {name: t.detach().clone() for name, t in ours.dino_head.state_dict().items() if name.startswith("mlp.")}
    head |= {"last_layer.weight_g": ours.dino_head.last.gain, "last_layer.weight_v": ours.dino_head.last.direction}
    for networks in (model.student, model.teacher):
        networks["backbone"].load_state_dict(state)
        networks["dino_head"].load_state_dict(head)
    return model


def _collated(batch: Batch) -> dict[str, Any]:
    """The batch in the format of its collate function; our masks have as many patches as its upper bound."""
    masks = batch.masks["global"]
    assert masks.grid is not None
    return {
        "collated_global_crops": torch.cat(batch.views["global"]),
        "collated_local_crops": torch.cat(batch.views["local"]),
        "collated_masks": masks.grid,
        "mask_indices_list": masks.index,
        "masks_weight": masks.weight,
        "upperbound": len(masks.index),
        "n_masked_patches": torch.full((1,), len(masks.index), device=masks.index.device),
    }


@contextmanager
def _moved_nowhere(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        yield
        return
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor, **_: tensor):
        yield


def _without_kernels() -> None:
    from dinov2.layers import attention, block

    replaced: dict[Any, dict[str, Callable[..., Tensor]]] = {
        attention: {"memory_efficient_attention": _attention},
        block: {"index_select_cat": _selected, "scaled_index_add": _added},
    }
    for module, functions in replaced.items():
        for name, function in functions.items():
            setattr(module, name, function)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, op: Any = None) -> Tensor:
    """Attention ``[batch, tokens, heads, width]``; with a bias, within each of the concatenated sequences."""
    if attn_bias is None:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    outputs, at = [], 0
    for length, run in groupby(end - start for start, end in pairwise(attn_bias.q_seqinfo.seqstart_py)):
        count = len(list(run))
        rows = slice(at, at := at + count * length)
        alike = [x[0, rows].unflatten(0, (count, length)) for x in (q, k, v)]
        outputs.append(_attention(*alike).flatten(0, 1))
    return torch.cat(outputs)[None]


def _selected(sources: list[Tensor], indices: list[Tensor]) -> Tensor:
    return torch.cat([source.index_select(0, index).flatten() for source, index in zip(sources, indices, strict=True)])


def _added(x: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    return x.index_add(0, index, source if scaling is None else source * scaling, alpha=alpha)
