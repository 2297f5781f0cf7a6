"""Parameter groups: learning-rate and weight-decay multipliers, decided by module structure and never by name.

DINOv2's rules (arXiv 2304.07193 and its code): the learning rate of block ``i`` of ``n`` is scaled by ``decay ** (n - i)``,
that of everything before the blocks by ``decay ** (n + 1)``, the patch embedding additionally by ``patch_lr``. Vectors
(biases, norms, layer scales) have no weight decay; everything else has, including tokens and position embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from pipeline.models.heads import Prototypes
from pipeline.models.vision import VisionTower


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share their multipliers.

    Attributes:
        params: the parameters.
        names: their names in the module they were collected from, in the same order.
        lr_scale: multiplies the scheduled learning rate.
        wd_scale: multiplies the scheduled weight decay.
        last_layer: whether ``Step.last_layer_lr`` is used instead of ``Step.lr``.
        backbone: whether the learning rate is multiplied by ``Step.backbone_share``: of a tower that is frozen at the start.
    """

    params: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    lr_scale: float
    wd_scale: float
    last_layer: bool
    backbone: bool = False


def parameter_groups(
    root: nn.Module,
    *,
    layer_decay: float = 1.0,
    patch_lr: float = 1.0,
    undecayed: Iterable[nn.Parameter] = (),
    vectors: bool = False,
    scales: Mapping[nn.Parameter, float] | None = None,
) -> list[ParameterGroup]:
    """All trainable parameters of ``root``, in as few groups as the rules allow.

    Args:
        root: a method or any module; each :class:`VisionTower` in it gets layer-wise decay, each :class:`Prototypes` is a last
            layer, everything else has learning-rate multiplier 1.
        layer_decay: factor from each block to the one below.
        patch_lr: additional factor of the patch embedding.
        undecayed: parameters without weight decay, besides vectors.
        vectors: whether vectors (biases, norms, layer scales) are decayed.
        scales: learning-rate multipliers of parameters that are in no :class:`VisionTower`.

    Returns:
        Groups in order of their first parameter; each parameter is in exactly one.
    """
    lr_scales = {id(parameter): scale for parameter, scale in (scales or {}).items()}
    spared = set(map(id, undecayed))
    last: set[int] = set()
    begun: set[int] = set()
    for module in root.modules():
        if isinstance(module, VisionTower):
            for parameter, scale in _tower_scales(module, layer_decay, patch_lr):
                lr_scales[id(parameter)] = scale * module.lr_mult
            if module.starts_frozen:
                begun.update(map(id, module.parameters()))
        elif isinstance(module, Prototypes):
            last.update(map(id, module.parameters()))

    fused: dict[tuple[float, float, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            wd_scale = 0.0 if (parameter.ndim <= 1 and not vectors) or id(parameter) in spared else 1.0
            key = (lr_scales.get(id(parameter), 1.0), wd_scale, id(parameter) in last, id(parameter) in begun)
            fused.setdefault(key, []).append((name, parameter))
    return [ParameterGroup(tuple(p for _, p in members), tuple(n for n, _ in members), *key) for key, members in fused.items()]


def _tower_scales(tower: VisionTower, decay: float, patch_lr: float) -> Iterator[tuple[nn.Parameter, float]]:
    depth = len(tower.vit.blocks)
    for parameter in tower.parameters():
        yield parameter, decay ** (depth + 1)
    for parameter in tower.vit.patch_embed.parameters():
        yield parameter, decay ** (depth + 1) * patch_lr
    for index, block in enumerate(tower.vit.blocks):
        for parameter in block.parameters():
            yield parameter, decay ** (depth - index)
    for last in (tower.vit.norm, tower.local_norm, getattr(tower.vit, "attn_pool", None)):
        for parameter in last.parameters() if last is not None else ():
            yield parameter, 1.0
