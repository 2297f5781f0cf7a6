"""Which runs compile their blocks, what is compiled, and that sizes which vary need no further graph."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.data.augment.masks import mask_capacity, mask_counts
from pipeline.data.augment.views import Batch, MaskSpec
from pipeline.errors import ConfigError
from pipeline.methods.base import Method, Step
from pipeline.models.attention import with_attention
from pipeline.models.settings import ModelSettings
from pipeline.models.text import TextBlock
from pipeline.models.vision import VisionTower, build_tower
from pipeline.training import compilation
from pipeline.training.compilation import TensorDropPath, compile_blocks, why_uncompiled
from tests.helpers.tiny_methods import TINY, batch_at, config, make_method

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def graphs() -> Any:
    """The graphs that are compiled in a test: a list of the shapes of their inputs. Blocks then run as Dynamo has traced them."""
    torch._dynamo.reset()
    made: list[list[tuple[int, ...]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        made.append([tuple(x.shape) for x in inputs if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)])
        return graph.forward

    original: Any = nn.Module.compile
    compile_ = lambda module, dynamic=None, mode=None: original(module, backend=backend, dynamic=dynamic)  # noqa: E731
    with mock.patch.object(nn.Module, "compile", compile_):
        yield made
    torch._dynamo.reset()


def _step(method: Method, batch: Batch, index: int) -> dict[str, Tensor]:
    torch.manual_seed(index)
    with torch.no_grad():
        method.before_accumulation([batch], Step(index=index))
    terms = method(batch, Step(index=index))
    torch.stack(list(terms.values())).sum().backward()
    method.after_step(Step(index=index))
    return {name: term.detach() for name, term in terms.items()}


def _with_capacity(method: Method, batch: Batch) -> Batch:
    masks = dict(batch.masks)
    for spec in method.views:
        if spec.mask is not None:
            rows, patches = masks[spec.name].grid.shape
            masks[spec.name] = replace(masks[spec.name], capacity=mask_capacity(rows, 4 * rows, patches, spec.mask))
    tokens = batch.tokens
    if tokens is not None and method.text is not None and method.text.trim and batch.position:
        tokens = tokens[:, : tokens.shape[1] - 1]
    return replace(batch, masks=masks, tokens=tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "clip", "coca", "detailclip", "dino", "mocov3", "simvlm", "distill"])
def test_compiled_steps_are_those_of_the_blocks_and_only_the_first_compiles(name: str, graphs: list[Any]) -> None:
    results = []
    for compiled in (False, True):
        method = make_method(name).train()
        if compiled:
            assert compile_blocks(method) > 0
        each = []
        for index in range(4):
            each.append(_step(method, _with_capacity(method, batch_at(method, index)), index))
            first = len(graphs) if index == 0 else first  # noqa: F821
        results.append((each, {n: p.grad for n, p in method.named_parameters() if p.grad is not None}))
    assert len(graphs) == first > 0
    (plain, gradients), (fast, others) = results
    for expected, terms in zip(plain, fast, strict=True):
        torch.testing.assert_close(terms, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(others, gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_the_losses_of_a_step_trace_without_a_break(name: str) -> None:
    torch._dynamo.reset()
    method = make_method(name).train()
    batch = batch_at(method, 0)
    if batch.tokens is not None:
        batch = replace(batch, text_ends=batch.tokens.argmax(1).tolist())
    torch.manual_seed(0)
    with torch.no_grad():
        method.before_accumulation([batch], Step())
    explained = torch._dynamo.explain(lambda: torch.stack(list(method(batch, Step()).values())).sum())()
    reasons = Counter(reason.reason.splitlines()[0] for reason in explained.break_reasons)
    if name == "simvlm":  # counts the tokens to predict on the host, so that the device need not be asked
        reasons = Counter({reason: n for reason, n in reasons.items() if "item()" not in reason})
    if name == "lejepa":  # draws its directions by a generator of its own, equal on all ranks, before the loss
        reasons = Counter({reason: n for reason, n in reasons.items() if "opaque object" not in reason})
    assert not reasons


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"), [("dinov2", {"global_size": 12}), ("simclr", {"global_size": 12}), ("byol", {"patch_dropout": 0.5})]
)
def test_blocks_are_compiled_once_in_each_stage_of_a_curriculum(name: str, stage: dict[str, Any], graphs: list[Any]) -> None:
    views = {**TINY[name]["views"], "curriculum": [{"until": "3 steps", **stage}]}
    method, made = make_method(name, method={"views": views}).train(), []
    full = method.views
    assert compile_blocks(method) > 0
    for index in range(6):
        method.views = method.curriculum[0].views if index < 3 else full
        _step(method, _with_capacity(method, batch_at(method, index)), index)
        made.append(len(graphs))
    assert 0 < made[0] == made[1] == made[2] < made[3] == made[4] == made[5] <= 2 * made[0], made


def _tower(depth: int = 3, **changes: Any) -> VisionTower:
    torch.manual_seed(0)
    settings = ModelSettings(embed_dim=16, depth=depth, num_heads=2, patch_size=4, **changes)
    return build_tower(settings, image_size=16)


def test_reading_attention_takes_one_graph_for_all_blocks(graphs: list[Any]) -> None:
    tower, images = _tower(depth=12), torch.randn(2, 3, 16, 16)
    expected = with_attention(tower, images)
    for block in tower.vit.blocks:
        block.compile(dynamic=False)
    tokens = with_attention(tower, images)
    assert len(graphs) == 2  # the last block accepts selected tokens
    assert tokens.attention is not None and expected.attention is not None
    torch.testing.assert_close(tokens.attention, expected.attention)
    assert not any(module._forward_hooks for module in tower.modules())
    plain = tower(images)
    torch.testing.assert_close(plain.patches, expected.patches)
    assert plain.attention is None


def test_masked_patches_are_filled_up_to_a_fixed_number_only_if_blocks_are_compiled(graphs: list[Any]) -> None:
    tower, images = _tower(), torch.randn(3, 3, 16, 16)
    read = torch.tensor([1, 7, 20, 33])
    few = tower(images, patches=read)
    assert torch.equal(few.patches, tower(images, patches=read, capacity=(8, 48)).patches)
    tower.compiled = True
    for block in tower.vit.blocks:
        block.compile(dynamic=False)
    for number, count in ((1, 2), (4, 2), (3, 2), (4, 2)):
        tokens = tower(images, patches=read[:number], capacity=(8, 48))
        torch.testing.assert_close(tokens.patches, few.patches[:number])
        torch.testing.assert_close(tokens.cls, few.cls)
        assert len(graphs) == count
    tower(images, patches=torch.arange(9), capacity=(8, 48))
    tower(images, patches=torch.arange(30), capacity=(8, 48))
    assert len(graphs) == 3, "more than is usual takes one more graph"
    gradients = []
    for capacity in ((4, 48), (8, 48)):
        tower.zero_grad()
        tower(images, patches=read, capacity=capacity).patches.square().sum().backward()
        gradients.append([p.grad for p in tower.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_rising_drop_rates_take_no_graph_for_each_block(graphs: list[Any]) -> None:
    method = make_method("dino", model={**config("dino").model.model_dump(), "depth": 6, "drop_path": 0.3}).train()
    assert compile_blocks(method) == 12
    rates = [block.drop_path1 for block in method.backbone.vit.blocks]  # type: ignore[union-attr]
    assert [type(rate) for rate in rates] == [TensorDropPath] * 6 or all(not isinstance(rate, TensorDropPath) for rate in rates)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_rate_as_a_tensor_drops_samples_and_keeps_the_mean(rate: float) -> None:
    path, x = TensorDropPath(rate), torch.ones(20_000, 2, 3)
    assert path.eval()(x) is x and not list(path.state_dict())
    torch.manual_seed(0)
    dropped = path.train()(x)
    kept = dropped[:, 0, 0] != 0
    assert torch.equal(dropped, torch.where(kept[:, None, None], x / (1 - rate), 0.0))
    assert abs(float(kept.float().mean()) - (1 - rate)) < 0.02


def test_every_block_of_towers_decoders_and_teachers_is_compiled() -> None:
    for name in ("clip", "coca", "detailclip", "simvlm"):
        method = make_method(name)
        blocks = [m for root in compilation.networks_of(method) for m in root.modules() if isinstance(m, TextBlock)]
        vit = [
            b
            for root in compilation.networks_of(method)
            for m in root.modules()
            if isinstance(m, VisionTower)
            for b in m.vit.blocks
        ]
        assert compile_blocks(method) == len(blocks) + len(vit) > 2
        assert all(block._compiled_call_impl is not None for block in (*blocks, *vit))
    assert torch._dynamo.config.recompile_limit >= 64


def test_the_capacity_is_hardly_ever_exceeded_and_its_bound_never() -> None:
    spec, rows, crops, patches = MaskSpec(patch=16), 32, 1024, 196
    usual, most = mask_capacity(rows, crops, patches, spec)
    numbers = []
    for key in range(200):
        numbers += mask_counts(crops, patches, spec, key).reshape(-1, rows).sum(1).tolist()
    mean, deviation = float(np.mean(numbers)), float(np.std(numbers))
    assert max(numbers) <= usual <= most and usual % 64 == 0
    assert 5.5 * deviation < usual - mean < 6.5 * deviation + 64
    assert most == int(np.sort(mask_counts(crops, patches, spec, 0))[-rows:].sum())
    assert mask_capacity(crops, crops, patches, spec)[1] == int(mask_counts(crops, patches, spec, 0).sum())


# ---- who compiles -------------------------------------------------------------------------------------------------------------


def _settings(**train: Any) -> Any:
    return config("clip", train={"global_batch_size": 8, **train})


def test_by_default_a_gpu_compiles_and_a_cpu_does_not() -> None:
    assert _settings().train.compile == "auto"
    with mock.patch.object(compilation, "find_spec", lambda _: object()):
        assert why_uncompiled(_settings(), GPU) is None
        assert "GPU only" in str(why_uncompiled(_settings(), CPU))
        assert why_uncompiled(_settings(compile=False), GPU) == "train.compile=false"
        assert "zero_stage=3" in str(why_uncompiled(_settings(zero_stage=3), GPU))
        assert why_uncompiled(_settings(compile=True, zero_stage=3), GPU) is None


def test_a_run_that_began_uncompiled_stays_so_unless_asked() -> None:
    with mock.patch.object(compilation, "find_spec", lambda _: object()):
        assert "as it began" in str(why_uncompiled(_settings(), GPU, before=False))
        assert why_uncompiled(_settings(), GPU, before=True) is None
        assert why_uncompiled(_settings(compile=True), GPU, before=False) is None


def test_without_a_compiler_auto_says_so_and_true_is_refused() -> None:
    with mock.patch.object(compilation, "find_spec", lambda _: None):
        assert "no Triton" in str(why_uncompiled(_settings(), GPU))
    with mock.patch.object(shutil, "which", lambda _: None), mock.patch.object(compilation, "find_spec", lambda _: object()):
        assert "no C compiler" in str(why_uncompiled(_settings(), GPU))
        with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
            why_uncompiled(_settings(compile=True), CPU)
        with pytest.raises(ConfigError, match="C compiler"):
            why_uncompiled(_settings(compile=True), GPU)
