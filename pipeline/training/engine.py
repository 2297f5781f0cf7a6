"""One engine around DeepSpeed: the only file that imports it, and the only one that knows where it keeps things.

DeepSpeed shards the optimizer's state (ZeRO 1) and the gradients (ZeRO 2) over the ranks. Everything the trainer needs beyond
forward, backward and step goes through :meth:`Engine.fragments`: for each parameter the flat piece of its fp32 master and of its
moments that this rank owns. Checkpoints, per-network clipping and parameter export are written in terms of fragments, so that
DeepSpeed's private attributes appear here and nowhere else; ``tests/training/test_engine.py`` is their contract.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.views import Batch
from pipeline.errors import TrainingError
from pipeline.models.groups import ParameterGroup
from pipeline.recipes.base import Recipe, Step

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# DeepSpeed's autotuner loads MLflow wherever it is installed: seconds of each rank's start, for something never used here.
_tracker = sys.modules.get("mlflow")
sys.modules["mlflow"] = _tracker  # type: ignore[assignment]
import deepspeed  # noqa: E402

if _tracker is None:
    del sys.modules["mlflow"]

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Its shared-memory all-reduce serves inference only, and would be compiled here, with a compiler that users may not have.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
_MOMENTS = ("exp_avg", "exp_avg_sq")
_OUTSIDE = "other"  # the network of parameters that belong to none, such as a logit scale


@dataclass(frozen=True)
class EngineOptions:
    """What shapes the engine.

    Attributes:
        zero: ZeRO stage, 1 or 2.
        precision: ``fp32``, or ``bf16`` for bf16 compute over fp32 parameters (autocast), fp32 gradients and masters.
        micro_batch: samples of one forward pass of a rank.
        accumulation: forward passes of one optimizer step.
        betas, eps: AdamW's.
        clip_norm: largest L2 norm of a gradient, ``None`` for no clipping.
        clip_scope: ``network`` clips each of the recipe's networks by its own norm, ``global`` all together.
    """

    zero: Literal[1, 2]
    precision: Literal["fp32", "bf16"]
    micro_batch: int
    accumulation: int
    betas: tuple[float, float]
    eps: float
    clip_norm: float | None
    clip_scope: Literal["network", "global"]


@dataclass(frozen=True)
class Fragment:
    """The piece of one parameter that this rank owns, as views into the optimizer's own memory.

    Attributes:
        name: the parameter's name in the recipe.
        start: first element of the piece in the flattened parameter.
        shape: the whole parameter's shape.
        master: fp32 ``[elements]``, the weights that the optimizer moves.
        moments: fp32 ``[elements]`` each, ``exp_avg`` and ``exp_avg_sq``.
        gradient: the averaged gradient, after backward and before the step.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    master: Tensor
    moments: dict[str, Tensor]
    gradient: Tensor | None


class Engine:
    """Forward, backward, clip, step, for one recipe on all ranks.

    Args:
        recipe: the method with its student; its teacher and memory must already be on the device.
        options: see :class:`EngineOptions`.
        device: this rank's device.

    Raises:
        TrainingError: a parameter that DeepSpeed cannot take (0-dimensional, not contiguous).
    """

    def __init__(self, recipe: Recipe, options: EngineOptions, device: torch.device) -> None:
        self.recipe, self.options, self.device = recipe, options, device
        self._names = {id(p): name for name, p in recipe.named_parameters()}
        self._groups = recipe.parameter_groups()
        _check(recipe, self._groups)
        optimizer = torch.optim.AdamW(
            [{"params": g.params, "lr": 0.0, "weight_decay": 0.0} for g in self._groups],
            lr=0.0,
            betas=options.betas,
            eps=options.eps,
            fused=device.type == "cuda",
        )
        # DeepSpeed insists on this variable and takes it for the device's number, whoever started the ranks.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=recipe, optimizer=optimizer, config=_configuration(options, dist.get_world_size(), device)
        )
        self._network = {id(p): name for name, module in recipe.networks().items() for p in module.parameters()}
        for p in recipe.parameters():
            self._network.setdefault(id(p), _OUTSIDE)
        self._make_state()

    def _make_state(self) -> None:
        """Moments from the start, so that a checkpoint of step 0 is like any other."""
        state = self._zero.optimizer.state
        for flat in self._zero.single_partition_of_fp32_groups:
            if not state[flat]:
                state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device)}
                state[flat].update({moment: torch.zeros_like(flat) for moment in _MOMENTS})

    def forward_backward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """One micro-batch: terms, and the gradient of their sum. To be called ``accumulation`` times before :meth:`step`.

        Returns:
            The recipe's terms, detached, on the device.
        """
        terms = self._engine(batch, step)
        self._engine.backward(torch.stack([term.float() for term in terms.values()]).sum())
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, applies nothing
        return {name: term.detach().float() for name, term in terms.items()}

    def step(self, step: Step, finite: Tensor) -> tuple[bool, dict[str, Tensor]]:
        """Clip and apply the gradients of all micro-batches, unless something is not finite on any rank.

        Args:
            step: the schedules' values; learning rate and weight decay are set in every group each time.
            finite: bool scalar, whether this rank's terms were all finite.

        Returns:
            Whether the step was applied, and the gradient norm of each network before clipping; parameters outside all
            networks count as one more, ``other``.
        """
        for group, ours in zip(self._zero.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = (step.last_layer_lr if ours.last_layer else step.lr) * ours.lr_scale
            group["weight_decay"] = step.weight_decay * ours.wd_scale
        pieces = [(self._network[id(p)], f.gradient) for p, f in self._owned(gradients=True) if f.gradient is not None]
        names = sorted(set(self._network.values()))
        squares = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.device)
        for network, gradient in pieces:
            squares[names.index(network)] += gradient.double().square().sum()
        squares[-1] = (~finite).double()
        dist.all_reduce(squares)
        norms = dict(zip(names, squares[:-1].sqrt().float().unbind(), strict=True))
        applied = bool((squares[-1] == 0) & squares.isfinite().all())
        if applied and self.options.clip_norm is not None:
            whole = squares[:-1].sum().sqrt().float()
            for network, gradient in pieces:
                norm = whole if self.options.clip_scope == "global" else norms[network]
                gradient.mul_((self.options.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        elif not applied:
            for _, gradient in pieces:
                gradient.fill_(float("nan"))
        # DeepSpeed drops a non-finite gradient together with its buffers: a skipped step leaves nothing behind.
        self._engine.step()
        return applied, norms

    def _owned(self, *, gradients: bool = False) -> Iterator[tuple[Tensor, Fragment]]:
        state = self._zero.optimizer.state
        parameters: list[Any] = [p for group in self._groups for p in group.params]
        for p in parameters:
            mapping = p._hp_mapping
            if mapping is None:
                continue
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            where = mapping.hp_fragment_address
            fragment = Fragment(
                name=self._names[id(p)],
                start=mapping.lp_fragment_address.start,
                shape=tuple(p.shape),
                master=flat.detach().narrow(0, where.start, where.numel),
                moments={m: state[flat][m].narrow(0, where.start, where.numel) for m in _MOMENTS},
                gradient=mapping.get_lp_grad_fragment(p._index_in_param_group) if gradients else None,
            )
            yield p, fragment

    def fragments(self) -> Iterator[Fragment]:
        """This rank's pieces of all trainable parameters, in the order of the parameter groups."""
        for _, fragment in self._owned():
            yield fragment

    def set_optimizer_steps(self, steps: int) -> None:
        """Set AdamW's own count of steps, which its bias correction needs, in every group."""
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat]["step"].fill_(float(steps))

    def refresh(self) -> None:
        """After fragments were written: bring every rank's full parameters up to date."""
        self._zero.update_lp_params()

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; before the process group is destroyed."""
        self._engine.destroy()


def _check(recipe: Recipe, groups: list[ParameterGroup]) -> None:
    grouped = Counter(id(p) for g in groups for p in g.params)
    for name, p in recipe.named_parameters():
        if p.dim() == 0 or not p.is_contiguous():
            raise TrainingError(
                "a parameter is 0-dimensional or not contiguous, which DeepSpeed cannot shard",
                where=f"parameter {name}",
                mend="give it shape [1], or call .contiguous() in the recipe",
            )
        if grouped[id(p)] != p.requires_grad:
            raise TrainingError(
                f"a {'trainable' if p.requires_grad else 'frozen'} parameter is in {grouped[id(p)]} parameter groups",
                where=f"parameter {name}",
                mend="parameter_groups() of the recipe must list each trainable one exactly once, and no other",
            )


def _configuration(options: EngineOptions, world: int, device: torch.device) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        "train_batch_size": options.micro_batch * options.accumulation * world,
        "zero_optimization": {
            "stage": options.zero,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": 100_000_000,
            "allgather_bucket_size": 100_000_000,
        },
        # Parameters stay fp32 and only compute is bf16: initial weights are exact and gradients are reduced in fp32.
        "torch_autocast": {"enabled": options.precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
