"""Wraps DeepSpeed; the only file that imports it.

DeepSpeed shards the optimizer state (ZeRO 1), the gradients (ZeRO 2) and the parameters (ZeRO 3) over the ranks; stage 0 shards
nothing. Everything the trainer needs beyond forward, backward and step goes through :meth:`Engine.fragments`: for each parameter
the flat piece of its fp32 master and of its moments that this rank owns. Checkpoints, per-network clipping and the teacher are
written in terms of fragments, so that DeepSpeed's memory layout is known only here and in ``zero_layouts.py``;
``tests/training/test_engine.py`` tests this contract.

The teacher is sharded like the student: whole on every rank up to stage 2, partitioned like the student's parameters in stage 3.
In either case it is updated locally, from the student's piece on the same rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.checkpoint.fragments import Fragment
from pipeline.data.augment.views import Batch
from pipeline.errors import TrainingError
from pipeline.estimate.communication import communication
from pipeline.methods.base import Method, Step, seed
from pipeline.models.groups import ParameterGroup
from pipeline.training import accelerate_init as accelerated
from pipeline.training.applied import Applied
from pipeline.training.optimizers import AdamW, FlatOptimizer, Lamb, Lars, Layerwise, Sgd, runs_of
from pipeline.training.rounded_gathers import drop_rounded, mark_rounded, rounded_gathers
from pipeline.training.zero_layouts import Layout, Zero0Layout, Zero3Layout, Zero12Layout, order_streams, piece_of
from pipeline.training.zero_offload import OffloadedZero3Layout, OffloadedZero12Layout

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# DeepSpeed's autotuner imports MLflow wherever it is installed, which adds seconds to each rank's start and is never used.
_tracker = sys.modules.get("mlflow")
sys.modules["mlflow"] = _tracker  # type: ignore[assignment]
import deepspeed  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.zero import partition_parameters  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS  # noqa: E402

if _tracker is None:
    del sys.modules["mlflow"]

# Each engine imports DeepSpeed's Muon, unused here, whose decorators would load torch's compiler: a CPU second of each start.
_compile, compiler.compile = getattr(compiler, "compile", None), lambda: lambda function: function
with contextlib.suppress(ImportError):  # a version without it
    import deepspeed.runtime.zero.muon.muon_optimizer
compiler.compile = _compile

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Its shared-memory all-reduce is for inference only, and compiling it here would need a compiler that users may not have.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
_LAYOUTS: dict[int, Callable[..., Layout]] = {0: Zero0Layout, 1: Zero12Layout, 2: Zero12Layout, 3: Zero3Layout}
_OFFLOADED: dict[int, Callable[..., Layout]] = {1: OffloadedZero12Layout, 2: OffloadedZero12Layout, 3: OffloadedZero3Layout}
ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)  # torch's own kernel; without this DeepSpeed warns of an untested optimizer
_READ = ("0.19.8",)  # versions whose streams were read line by line for order_streams; others keep their own wait
_ALIGNED = 4  # elements of fp32 in the 16 bytes that a GPU loads at once
_OUTSIDE = "other"  # pseudo-network of parameters outside all networks, such as a logit scale


@dataclass(frozen=True)
class EngineOptions:
    """Options of :class:`Engine`.

    Attributes:
        zero: ZeRO stage, 0 to 3.
        precision: ``fp32``, or ``bf16`` for bf16 compute over fp32 parameters (autocast), fp32 gradients and masters.
        micro_batch: samples of one forward pass of a rank.
        accumulation: forward passes of one optimizer step.
        betas, eps: of AdamW.
        clip_norm: maximum L2 norm of a gradient, ``None`` for no clipping.
        clip_scope: ``network`` clips each of the method's networks by its own norm, ``global`` all together, ``parameter`` each
            parameter by its own.
        optimizer: ``adamw``, ``lamb``, ``lars`` or ``sgd``.
        momentum: of LARS and SGD.
        trust: trust coefficient of LARS.
        offload: ``cpu`` keeps masters and moments in host memory and runs AdamW there, in stages 1 to 3.
        init: library that initializes DeepSpeed for the student.
        graphs: whether compiled blocks are replayed as CUDA graphs, whose memory is reused from one pass to the next.
        merge: whether DeepSpeed sees one parameter group, which takes one optimizer call and one gather, instead of one for each
            pair of multipliers; ``None`` for a GPU, where every element is computed alike wherever it lies. A CPU's vector
            instructions compute the last few elements of a tensor otherwise, in the last bit.
        l2_to_start: decay of the tower's weights towards ``Method.start``, see ``adapt.l2_to_start``.
        delay: whether it is decided on the device if a step is applied, so that the host need not wait; ``None`` for a GPU.
    """

    zero: Literal[0, 1, 2, 3]
    precision: Literal["fp32", "bf16"]
    micro_batch: int
    accumulation: int
    betas: tuple[float, float]
    eps: float
    clip_norm: float | None
    clip_scope: Literal["network", "global", "parameter"]
    optimizer: Literal["adamw", "lamb", "lars", "sgd"] = "adamw"
    momentum: float = 0.9
    trust: float = 1e-3
    offload: Literal["none", "cpu"] = "none"
    init: Literal["deepspeed", "accelerate"] = "deepspeed"
    graphs: bool = False
    l2_to_start: float = 0.0
    merge: bool | None = None
    delay: bool | None = None


class Engine:
    """Forward, backward, clipping and optimizer step of a method on all ranks.

    Args:
        method: the method with its student; its teacher and memory must already be on the device.
        options: see :class:`EngineOptions`.
        device: this rank's device.

    Attributes:
        observe_gradients: called in each step before clipping, with names and this rank's share of the averaged gradients.

    Raises:
        TrainingError: a parameter that DeepSpeed does not support (0-dimensional, not contiguous), or ``DS_ACCELERATOR`` is
            not for this device.
    """

    def __init__(self, method: Method, options: EngineOptions, device: torch.device) -> None:
        self.method, self.options, self.device = method, options, device
        self._names = {id(p): name for name, p in method.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in method.named_parameters() if p.requires_grad}
        self._groups = method.parameter_groups()
        _check(method, self._groups)
        check_accelerator(device.type, deepspeed.get_accelerator().device_name())
        on_device = device.type == "cuda" and options.offload == "none"
        merge = on_device if options.merge is None else options.merge
        self.delayed = on_device and options.zero < 3 if options.delay is None else options.delay
        optimizer = _optimizer(options, self._groups, merge=merge)
        # DeepSpeed requires this variable and uses it as the device number, whatever launcher started the ranks.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        sizes = [p.numel() for group in self._groups for p in group.params]
        config = _configuration(options, dist.get_world_size(), device, sizes)
        if options.init == "accelerate":
            self._engine = accelerated.initialize(method, optimizer, config)
        else:
            self._engine, _, _, _ = deepspeed.initialize(model=method, optimizer=optimizer, config=config)
        # DeepSpeed wraps the optimizer except in stage 0; the learning rates are those of the inner one.
        self._optimizer: FlatOptimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        self._rates = self._optimizer.param_groups[0]["members"] if merge else self._optimizer.param_groups
        parameters = [p for group in self._groups for p in group.params]
        layout = (_OFFLOADED if options.offload == "cpu" else _LAYOUTS)[options.zero]
        self.layout: Layout = layout(self._engine, parameters, self._names, optimizer.moments)
        if merge:
            member_of = [member for member, group in enumerate(self._groups) for _ in group.params]
            optimizer.runs = {flat: runs_of(segments, member_of) for flat, segments in self.layout.segments().items()}
        if isinstance(optimizer, Layerwise):
            optimizer.segments, optimizer.parameters = self.layout.segments(), len(parameters)
            optimizer.sharded = options.zero > 0
        self._teacher_engine = self._shard_teacher(config) if options.zero == 3 else None
        self._rounded = options.zero == 3 and options.precision == "bf16"
        if self._rounded:
            mark_rounded([method, *(method.teacher.modules.values() if method.teacher is not None else ())], partition_parameters)
        if self.delayed and options.zero in (1, 2) and device.type == "cuda":
            if method.teacher is not None:
                method.teacher.align()
            if deepspeed.__version__ in _READ and config["zero_optimization"]["overlap_comm"]:
                order_streams(self._engine.optimizer, deepspeed.get_accelerator())
        network = {id(p): name for name, module in method.networks().items() for p in module.parameters()}
        for p in parameters:
            network.setdefault(id(p), _OUTSIDE)
        self._networks = sorted(set(network.values()))
        self._network = {key: self._networks.index(name) for key, name in network.items()}
        # Norms are computed per network, or per parameter and then summed by network.
        self._own_norms = options.clip_scope == "parameter" and options.clip_norm is not None
        self._normed = {id(p): n for n, p in enumerate(parameters)} if self._own_norms else self._network
        members = F.one_hot(torch.tensor([self._network[key] for key in self._normed]), len(self._networks)).T.bool()
        self._members = members.to(device) if self._own_norms else members  # [networks, parameters]
        self._belongs: dict[tuple[int, ...], Tensor] = {}
        self.observe_gradients: Callable[[Step, list[tuple[str, Tensor]]], None] | None = None

    def _shard_teacher(self, config: dict[str, Any]) -> Any:
        """Partition the teacher's parameters exactly like the student's, so that corresponding pieces are on the same rank."""
        teacher = self.method.teacher
        if teacher is None:
            return None
        students: dict[str, Any] = dict(self.method.named_parameters())
        weights: dict[str, Any] = dict(teacher.named_parameters())
        engine, _, _, _ = deepspeed.initialize(model=nn.ModuleDict(teacher.modules), config=config)
        teacher.follow([(weight.ds_tensor, students[name].ds_tensor) for name, weight in weights.items()])
        self._teacher_weights = weights
        return engine

    @torch.no_grad()
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Call the method's hook with all micro-batches of a step, in the precision of the forward pass."""
        self._begin_pass()
        bf16 = self.options.precision == "bf16"
        with rounded_gathers(enabled=self._rounded), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            self.method.before_accumulation(batches, step)

    def forward_backward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Run forward and backward for one micro-batch; to be called ``accumulation`` times before :meth:`step`.

        Returns:
            The method's loss terms, detached, on the device.
        """
        self._begin_pass()
        seed(batch)
        with rounded_gathers(enabled=self._rounded):
            terms = self._engine(batch, step)
            self._engine.backward(torch.stack([term.float() for term in terms.values()]).sum())
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, updates nothing
        return {name: term.detach().float() for name, term in terms.items()}

    def _begin_pass(self) -> None:
        if self.options.graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def step(self, step: Step, finite: Tensor) -> tuple[Applied, dict[str, Tensor]]:
        """Clip and apply the gradients of all micro-batches, unless a term or gradient is non-finite on any rank.

        Args:
            step: the schedules' values; learning rate and weight decay are set in every group each time.
            finite: bool scalar, whether this rank's terms were all finite.

        Returns:
            Whether the step was applied, the same on all ranks, and the gradient norm of each network before clipping;
            parameters outside all networks count as one more, ``other``.
        """
        for rates, group in zip(self._rates, self._groups, strict=True):
            rates["lr"] = step.lr_of(group)
            rates["weight_decay"] = step.weight_decay * group.wd_scale
        if self.observe_gradients is not None:
            self.observe_gradients(step, self.names_of(self.layout.gradient_shares()))
        squares = torch.cat([self._squares(), (~finite).double().reshape(1)])
        dist.all_reduce(squares)
        own = squares[:-1].sqrt().float()
        lengths = self._by_network(squares[:-1]).sqrt().float() if self._own_norms else own
        applied = Applied((squares[-1] == 0) & squares.isfinite().all(), delayed=self.delayed)
        if applied.on_device is not None:
            self._optimizer.found_inf = (~applied.on_device).float()
        elif not applied:
            self.layout.drop()
        if self.options.clip_norm is not None and (applied.on_device is not None or applied):
            self._clip(squares[:-1].sum().sqrt().float().expand_as(own) if self.options.clip_scope == "global" else own)
        if self.options.l2_to_start and (applied.on_device is not None or applied):
            self._move_to_start(step, applied.on_device)
        self._engine.step()
        self.layout.clean()
        return applied, dict(zip(self._networks, lengths.unbind(), strict=True))

    @torch.no_grad()
    def _move_to_start(self, step: Step, applied: Tensor | None) -> None:
        """Move the tower's masters towards their starts, before the optimizer's own update, as AdamW's weight decay."""
        rates = {name: step.lr_of(group) for group in self._groups for name in group.names}
        for _, f in self.layout.held():
            if (start := self._starts.get(f.name)) is None:
                continue
            if self.options.zero == 3:
                own = start.ds_tensor.view(-1).narrow(0, 0, f.master.numel())
            else:
                own = start.detach().view(-1).narrow(0, f.start, f.master.numel())
            share = rates[f.name] * self.options.l2_to_start
            f.master.lerp_(own.to(f.master), share if applied is None else (share * applied).to(f.master))

    @cached_property
    def _starts(self) -> dict[str, Any]:
        """Parameters of the tower as it was at the start, by the names of those that are trained."""
        assert self.method.start is not None
        return {f"backbone.{name}": p for name, p in self.method.start["backbone"].named_parameters()}

    def _squares(self) -> Tensor:
        """Squared norms of this rank's share of the gradients, fp64 ``[n]``: per network, or per parameter with
        ``clip_scope="parameter"``.

        One reduction for all pieces: fewer launches than one per piece, and a deterministic order of summation.
        """
        size = len(self._normed) if self._own_norms else len(self._networks)
        numbers, gradients = [], []
        for p, gradient in self.layout.gradient_shares():
            numbers.append(self._normed[id(p)])
            gradients.append(gradient)
        if not gradients:
            return torch.zeros(size, dtype=torch.float64, device=self.device)
        each = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square()
        key = tuple(numbers)
        if self._own_norms:  # a rank holds at most one piece of each
            if key not in self._belongs:
                self._belongs = {key: torch.tensor(numbers, device=each.device)}
            return each.new_zeros(size).index_copy_(0, self._belongs[key], each).to(self.device)
        if key not in self._belongs:
            belongs = F.one_hot(torch.tensor(numbers), len(self._networks)).T
            self._belongs = {key: belongs.to(gradients[0].device, torch.bool)}
        return torch.where(self._belongs[key], each, 0.0).sum(1).to(self.device)

    def _by_network(self, squares: Tensor) -> Tensor:
        """Sum over each network's parameters: fp64 ``[parameters]`` to ``[networks]``."""
        return torch.where(self._members, squares, 0.0).sum(1)

    def _clip(self, lengths: Tensor) -> None:
        """Scale the gradients of networks (or parameters) whose norm, in ``lengths`` ``[n]``, exceeds the maximum."""
        assert self.options.clip_norm is not None
        by_network: dict[int, list[Tensor]] = {}
        for p, gradient in self.layout.gradients():
            by_network.setdefault(self._normed[id(p)], []).append(gradient)
        factors = (self.options.clip_norm / (lengths + 1e-6)).clamp(max=1.0)
        for number, gradients in by_network.items():
            torch._foreach_mul_(gradients, factors[number].to(gradients[0].device))

    def names_of(self, tensors: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[str, Tensor]]:
        """Names of parameters instead of these themselves."""
        return [(self._names[id(p)], tensor) for p, tensor in tensors]

    def fragments(self) -> Iterator[Fragment]:
        """This rank's pieces of all trainable parameters, in the order of the parameter groups."""
        for _, fragment in self.layout.owned():
            yield fragment

    def held(self) -> Iterator[Fragment]:
        """What a checkpoint has to provide to this rank: its fragments, and in stage 0 every parameter in full."""
        for _, fragment in self.layout.held():
            yield fragment

    def teacher_pieces(self, *, owned: bool) -> Iterator[tuple[str, int, Tensor]]:
        """Name, first element and fp32 memory ``[elements]`` of the teacher's weights on this rank.

        Args:
            owned: only the pieces that correspond to this rank's fragments, so that every element belongs to one rank; else all
                that it holds.
        """
        teacher = self.method.teacher
        if teacher is None:
            return
        if self._teacher_engine is not None:
            for name, weight in self._teacher_weights.items():
                start, length = piece_of(weight)
                if length > 0 and name in self.shapes:
                    yield name, start, weight.ds_tensor.narrow(0, 0, length)
            return
        weights = {name: tensor.detach().view(-1) for name, tensor in teacher.named_parameters() if name in self.shapes}
        if owned:
            for f in self.fragments():
                if f.name in weights:
                    yield f.name, f.start, weights[f.name].narrow(0, f.start, f.master.numel())
        else:
            yield from ((name, 0, weight) for name, weight in weights.items())

    @contextlib.contextmanager
    def gathered(self, *, teacher: bool = False, write: bool = False) -> Iterator[None]:
        """Gather the parameters that the optimizer does not update, on every rank; collective.

        Args:
            teacher: also gather the teacher's weights and the student's trainable ones.
            write: broadcast what rank 0 writes to them.
        """
        if self.options.zero < 3:
            yield
            return
        chosen: list[Tensor] = [p for p in self.method.parameters() if teacher or not p.requires_grad]
        if self.method.teacher is not None:
            chosen += [p for name, p in self.method.teacher.named_parameters() if teacher or name not in self.shapes]
        drop_rounded(chosen)
        with deepspeed.zero.GatheredParameters(chosen, modifier_rank=0 if write else None):
            yield

    def set_optimizer_steps(self, steps: int) -> None:
        """Set the optimizer's step count, used by Adam's bias correction, for every tensor that has a state."""
        for flat in self.layout.flats():
            self._optimizer.state[flat]["step"] = torch.full((), float(steps), device=flat.device)

    def optimizer_steps(self) -> list[float]:
        """The optimizer's step counts."""
        return [float(self._optimizer.state[flat]["step"]) for flat in self.layout.flats()]

    def memory(self) -> dict[str, float]:
        """Bytes that persist on this rank: ``parameters``, ``gradients``, ``masters``, ``moments``, ``frozen``, ``teacher``.

        The memory of an offloaded optimizer is counted as ``host`` only, except on a CPU, where all of it is host memory.
        """
        parts = self.layout.parts()
        frozen: list[Any] = [p for p in self.method.parameters() if not p.requires_grad]
        parts["frozen"] = [getattr(p, "ds_tensor", p) for p in frozen]
        teacher: list[Any] = [p for _, p in self.method.teacher.named_parameters()] if self.method.teacher is not None else []
        parts["teacher"] = [getattr(p, "ds_tensor", p) for p in teacher]
        away = [t for tensors in parts.values() for t in tensors if t.device.type != self.device.type]
        if away:
            parts = {name: [t for t in tensors if t.device.type == self.device.type] for name, tensors in parts.items()}
            parts["host"] = away
        counted: set[int] = set()
        sizes = {}
        for name, tensors in parts.items():
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            sizes[name] = float(sum(size for storage, size in storages.items() if storage not in counted))
            counted |= storages.keys()
        return sizes

    def refresh(self) -> None:
        """Update every rank's parameters after fragments were written."""
        self.layout.refresh()

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; to be called before the process group is destroyed."""
        if self._teacher_engine is not None:
            self._teacher_engine.destroy()
        self._engine.destroy()


def _optimizer(options: EngineOptions, groups: list[ParameterGroup], *, merge: bool) -> FlatOptimizer:
    chosen: list[dict[str, Any]] = [
        {"params": list(g.params), "lr": 0.0, "weight_decay": 0.0, "adapt": g.wd_scale > 0} for g in groups
    ]
    if merge:
        parameters = [p for group in chosen for p in group.pop("params")]
        # Parameters of odd sizes go last, so that all others stay aligned for vector instructions.
        chosen = [{"params": sorted(parameters, key=lambda p: p.numel() % _ALIGNED != 0), "members": chosen}]
    if options.optimizer == "lars":
        return Lars(chosen, momentum=options.momentum, trust=options.trust)
    if options.optimizer == "sgd":
        return Sgd(chosen, momentum=options.momentum)
    if options.optimizer == "lamb":
        return Lamb(chosen, betas=options.betas, eps=options.eps)
    return AdamW(chosen, betas=options.betas, eps=options.eps)


def check_accelerator(device: str, accelerator: str) -> None:
    """Reject a GPU with DeepSpeed's accelerator for CPUs, under which it would compute without autocast.

    Raises:
        TrainingError: they do not fit.
    """
    if device == "cuda" and accelerator != "cuda":
        raise TrainingError(
            f"DeepSpeed computes on {accelerator}, but this rank on {device}",
            where=f"DS_ACCELERATOR={os.environ.get('DS_ACCELERATOR', '')}",
            hint="Unset this environment variable, or set it to cuda",
        )


def _check(method: Method, groups: list[ParameterGroup]) -> None:
    grouped = Counter(id(p) for g in groups for p in g.params)
    for name, p in method.named_parameters():
        if p.dim() == 0 or not p.is_contiguous():
            raise TrainingError(
                "a parameter is 0-dimensional or not contiguous, which DeepSpeed cannot shard",
                where=f"parameter {name}",
                hint="Give it shape [1], or call .contiguous() in the method",
            )
        if grouped[id(p)] != p.requires_grad:
            raise TrainingError(
                f"a {'trainable' if p.requires_grad else 'frozen'} parameter is in {grouped[id(p)]} parameter groups",
                where=f"parameter {name}",
                hint="List each trainable parameter exactly once, and no other, in parameter_groups() of the method",
            )


def _configuration(options: EngineOptions, world: int, device: torch.device, sizes: Sequence[int]) -> dict[str, Any]:
    chosen = communication(sum(sizes), largest=max(sizes, default=0), ranks=world, cuda=device.type == "cuda")
    # Norms are computed in step; DeepSpeed's own, with a launch and a double copy per parameter, can be disabled since about
    # 0.19.
    normless = options.zero in (1, 2) and options.offload == "none" and "compute_grad_norm" in DeepSpeedZeroConfig.model_fields
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        "train_batch_size": options.micro_batch * options.accumulation * world,
        "zero_optimization": {
            "stage": options.zero,
            **({"offload_optimizer": {"device": "cpu", "pin_memory": device.type == "cuda"}} if options.offload == "cpu" else {}),
            **({"compute_grad_norm": False} if normless else {}),
            "overlap_comm": chosen.overlap,
            "contiguous_gradients": True,
            "reduce_bucket_size": chosen.reduce_bucket,
            "allgather_bucket_size": chosen.allgather_bucket,
            "stage3_prefetch_bucket_size": chosen.prefetch,
            "stage3_max_live_parameters": chosen.live,
            "stage3_max_reuse_distance": chosen.live,
            # Partition every parameter: the teacher's pieces must match the student's. The other option would compute gradients
            # of linear layers differently from torch.
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        },
        # Parameters stay fp32 and only compute is bf16: initial weights are exact and gradients are reduced in fp32.
        "torch_autocast": {"enabled": options.precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_allow_untested_optimizer": True,  # LARS and LAMB are our own and tested here
        "zero_force_ds_cpu_optimizer": False,  # torch has a fused AdamW for CPUs that needs no compiler
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        # Its throughput timer, on by default, waits for the whole device before every forward pass and after every step.
        "timers": {"throughput": {"enabled": False}},
    }
