"""First weights: from our checkpoints and from files, into the student and its teacher, strictly, seen before ranks start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoint.files import entry
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError, FoveaError
from pipeline.methods.base import Method
from pipeline.methods.registry import build_method
from pipeline.weights import init_from as initial
from tests.helpers.runs import TOY


def config(folder: Path, *overrides: str) -> Config:
    (folder / "toy.yaml").write_text(TOY)
    return load(folder / "toy.yaml", ["data.shards=x.tar", *overrides]).config


def make_method(config: Config, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    return build_method(config)


def write(run: Path, of: Method, *, step: int = 8, ranks: int = 2) -> dict[str, dict[str, Tensor]]:
    """A checkpoint with random weights, in pieces, and what it holds by network."""
    folder = run / "checkpoints" / f"step_{step:09d}"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(step)
    shapes = {name: p.shape for name, p in of.named_parameters() if p.requires_grad}
    content = {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in ("master", "teacher")
    }
    fragments: list[dict[str, list[int]]] = []
    for rank in range(ranks):
        table = {}
        for name, shape in shapes.items():
            share = -(-shape.numel() // ranks)
            start = min(rank * share, shape.numel())
            if length := min(share, shape.numel() - start):
                table[name] = [start, length]
        pieces = {f"{k}/{n}": content[k][n].flatten()[s : s + c].clone() for k in content for n, (s, c) in table.items()}
        save_file(pieces, folder / f"rank_{rank:05d}.safetensors")
        fragments.append(table)
    frozen = {name: b for name, b in of.named_buffers()} | {n: p.detach() for n, p in of.named_parameters() if n not in shapes}
    save_file(
        {f"frozen/{name}": t.clone() for name, t in frozen.items()} or {"memory/x": torch.zeros(1)}, folder / "whole.safetensors"
    )
    files = [entry(path) for path in sorted(folder.glob("*.safetensors"))]
    listed = {name: list(shape) for name, shape in shapes.items()}
    manifest: dict[str, Any] = {"format": 1, "step": step, "shapes": listed, "fragments": fragments, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return {"student": content["master"], "teacher": content["teacher"]}


@pytest.mark.parametrize("network", ["teacher", "student"])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_checkpoint_fills_student_and_teacher(tmp_path: Path, network: str, heads: bool, positions: str) -> None:
    plain = config(tmp_path, f"model.pos_embed={positions}")
    content = write(tmp_path / "run", make_method(plain))[network]
    chosen = [f"init_from.source={tmp_path / 'run'}", f"init_from.network={network}", f"init_from.heads={str(heads).lower()}"]
    settings = config(tmp_path, f"model.pos_embed={positions}", *chosen)
    initial.check(settings)
    fresh, method = make_method(plain), make_method(plain)
    start = initial.begin(method, settings)
    assert start is not None and start.record["step"] == 8 and start.record["network"] == network
    assert method.teacher is not None
    teacher = dict(method.teacher.named_parameters())
    for (name, p), (_, before) in zip(method.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(p, content[name] if heads or name.startswith("backbone.") else before), name
        assert torch.equal(p, teacher[name])


def test_the_newest_checkpoint_of_a_run_is_taken_or_the_one_that_is_named(tmp_path: Path) -> None:
    method = make_method(config(tmp_path))
    for step in (4, 12, 8):
        write(tmp_path / "run", method, step=step)
    for name, step in (("run", 12), ("run/checkpoints", 12), ("run/checkpoints/step_000000004", 4)):
        found = initial.find(str(tmp_path / name))
        assert found.saved is not None and found.saved.step == step
    records = [initial.find(str(tmp_path / f"run/checkpoints/step_00000000{step}")).record()["id"] for step in (4, 8)]
    assert len(set(records)) == 2


def test_positions_are_resampled_for_larger_pictures_and_that_is_said(tmp_path: Path) -> None:
    small = config(tmp_path)
    content = write(tmp_path / "run", make_method(small))["teacher"]
    large = config(tmp_path, f"init_from.source={tmp_path / 'run'}", "method.views.global_size=64")
    initial.check(large)
    method = make_method(large)
    start = initial.begin(method, large)
    assert start is not None and any("from 4 x 4 to 8 x 8" in note for note in start.notes)
    positions = dict(method.named_parameters())["backbone.vit.pos_embed"]
    assert positions.shape[1] == 65 and torch.equal(positions[:, 0], content["backbone.vit.pos_embed"][:, 0])


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_of_weights_fills_the_backbone(tmp_path: Path, suffix: str) -> None:
    plain = config(tmp_path)
    method, other = make_method(plain), make_method(plain, seed=1)
    state = {name: t.contiguous() for name, t in other.backbone.vit.state_dict().items()}  # type: ignore[union-attr, operator]
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    settings = config(tmp_path, f"init_from.source={path}")
    initial.check(settings)
    start = initial.begin(method, settings)
    assert start is not None and start.record["kind"] == "file" and len(start.record["blake2b"]) == 32
    got = dict(method.named_parameters())
    assert all(torch.equal(got[f"backbone.vit.{name}"], tensor) for name, tensor in state.items())
    assert torch.equal(got["dino_head.mlp.0.weight"], dict(make_method(plain).named_parameters())["dino_head.mlp.0.weight"])


def test_what_cannot_be_begun_with_is_refused_in_words(tmp_path: Path) -> None:
    method = make_method(config(tmp_path))
    write(tmp_path / "run", method)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no weights")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    cases = {
        ("nowhere",): "no such file",
        ("https://example.org/w.pth",): "Download them first",
        ("timm:vit_colossal",): "timm has no weights",
        (str(tmp_path / "empty"),): "not a run",
        (str(tmp_path / "notes.txt"),): "not a run",
        (str(tmp_path / "torn.pth"),): "cannot be read",
        (str(tmp_path / "torn.safetensors"),): "cannot be read",
        (str(tmp_path / "list.pth"),): "no named tensors",
        (str(tmp_path / "run"), "model.depth=2"): "missing: vit.blocks.1.",
        (str(tmp_path / "run"), "model.registers=1"): "missing: vit.reg_token",
        (str(tmp_path / "run"), "method.prototypes=64", "init_from.heads=true"): "dino_head.last.direction",
        (str(tmp_path / "run"), "method.shared_heads=true", "init_from.heads=true"): "unexpected: ibot_head",
    }
    for (source, *overrides), words in cases.items():
        settings = config(tmp_path, f"init_from.source={source}", *overrides)
        with pytest.raises(FoveaError) as refusal:
            initial.check(settings)
        assert words in str(refusal.value), (source, str(refusal.value))
    with (tmp_path / "run/checkpoints/step_000000008/rank_00001.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is complete"):
        initial.check(config(tmp_path, f"init_from.source={tmp_path / 'run'}"))


def test_heads_are_not_looked_for_in_files(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="only checkpoints of fovea contain heads"):
        initial.check(config(tmp_path, f"init_from.source={tmp_path / 'w.pth'}", "init_from.heads=true"))


def test_without_a_source_nothing_happens(tmp_path: Path) -> None:
    settings = config(tmp_path)
    initial.check(settings)
    assert initial.begin(make_method(settings), settings) is None


class Hub:
    """The folder in which timm looks for what it has downloaded, without a network."""

    NAME, FILE = "vit_tiny_patch16_224", "model.safetensors"

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import timm
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        torch.manual_seed(3)
        self.model = timm.create_model(self.NAME, depth=12)
        repository = folder / f"models--{str(self.model.pretrained_cfg['hf_hub_id']).replace('/', '--')}"
        self.file = repository / "snapshots" / ("0" * 40) / self.FILE
        self.file.parent.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)

    def hold(self, *, without: str = "", **changed: Tensor) -> dict[str, Tensor]:
        state = {name: t for name, t in self.model.state_dict().items() if name != without} | changed
        save_file(state, self.file)
        return state


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def test_timms_weights_fill_the_backbone_without_their_classifier(tmp_path: Path, hub: Hub) -> None:
    held = hub.hold()
    shape = "model={timm_name: vit_tiny_patch16_224, embed_dim: null, depth: null, num_heads: null, patch_size: null}"
    settings = config(tmp_path, shape, f"init_from.source=timm:{hub.NAME}", "method.views.local_size=16")
    initial.check(settings)
    made = make_method(settings)
    start = initial.begin(made, settings)
    assert start is not None and start.record["kind"] == "timm" and start.record["source"] == f"timm:{hub.NAME}"
    assert any("resampled from 14 x 14 to 2 x 2" in note for note in start.notes)
    assert made.teacher is not None
    for network in (made.get_submodule("backbone"), made.teacher.modules["backbone"]):
        own = dict(network.named_parameters())
        inside = {name.removeprefix("vit."): p for name, p in own.items() if name.startswith("vit.")}
        assert inside.keys() == held.keys() - {"head.weight", "head.bias"}
        assert all(torch.equal(p, held[name]) for name, p in inside.items() if name != "pos_embed")


def test_timms_weights_of_which_a_tensor_is_missing_or_of_another_shape_are_refused_by_name(tmp_path: Path, hub: Hub) -> None:
    name = f"timm:{hub.NAME}"
    for change in ({"without": "blocks.3.attn.qkv.weight"}, {"blocks.3.attn.qkv.weight": torch.zeros(3, 3)}):
        hub.hold(**change)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=r"incomplete.*blocks\.3\.attn\.qkv\.weight"):
            initial.weights_of(initial.find(name))
    hub.file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot fetch the weights"):
        initial.weights_of(initial.find(name))
    hub.file.unlink()
    with pytest.raises(CheckpointError, match="set HF_HOME"):
        initial.weights_of(initial.find(name))
    hub.hold()
    settings = config(tmp_path, f"init_from.source={name}")  # a tower of one block
    with pytest.raises(CheckpointError, match=r"132 unexpected: vit\.blocks\.1\."):
        initial.check(settings)
    with pytest.raises(CheckpointError, match="timm has no weights for 'vit_tiny_patch17_224'"):
        initial.weights_of(initial.find("timm:vit_tiny_patch17_224"))


def test_weights_that_timm_cannot_fetch_are_refused_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def away(*_: object, **__: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", away)
    with pytest.raises(CheckpointError, match=r"no route to the hub.*give the file's path"):
        initial._of_timm(initial.find("timm:vit_tiny_patch16_224"))
