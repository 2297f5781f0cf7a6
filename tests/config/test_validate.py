"""Settings that are right each by itself and do not go together; above all several data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import fingerprint, load, show
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from tests.config.test_load import MINIMAL, NAME, refused, write

TWO = "[{name: a, shards: /x/a-*.tar, weight: 2}, {name: b, shards: [b.tar, c.tar], weight: 1e-4}]"


def test_several_data_sets_stand_in_the_place_of_shards(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"model: {{timm_name: vit_tiny_patch16_224}}\nmethod: {{views: {{local_size: 96}}}}\ndata: {{sources: {TWO}}}\n"
    )
    loaded = load(path)
    config = loaded.config
    assert config.data.sources is not None and [source.weight for source in config.data.sources] == [2, 1e-4]
    assert config.data.patterns == config.voting_shards == ("/x/a-*.tar", f"{Path.cwd()}/b.tar", f"{Path.cwd()}/c.tar")
    assert config.validation_shards == ("/x/*val-*.tar",)
    assert load(write(tmp_path, show(loaded), "again.yaml")).config == config
    assert Config.model_validate(config.model_dump(mode="json")) == config
    moved = load(path, [f"data.sources={TWO.replace('/x/', '/y/')}"]).config
    assert fingerprint(moved) == fingerprint(config)
    plain = load(NAME, ["data.shards=[]", f"data.sources={TWO}"]).config
    assert plain.data.patterns == config.data.patterns


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        ("null", "data.shards is required"),
        ("[]", "data.sources names no data set"),
        ("[{name: a, shards: a.tar}, {name: a, shards: b.tar}]", "two data sets of one name"),
        ("[{name: a, shards: a.tar, weight: 1, repeat: 2}]", "gives a both weight and repeat"),
        ("[{name: a, shards: a.tar, weight: 1}, {name: b, shards: b.tar}]", "a weight and others none"),
        ("[{name: a, shards: a.tar, wieght: 1}]", "did you mean 'data.sources.weight'"),
        ("[{name: a, shards: a.tar, weight: 0}]", "greater than 0"),
        ("[{name: a, shards: []}]", "at least 1 item"),
        ("[{shards: a.tar}]", "data.sources.name"),
    ],
)
def test_data_sets_that_do_not_go_together_are_refused(tmp_path: Path, sources: str, text: str) -> None:
    path = write(tmp_path, MINIMAL)
    (problem,) = refused(path, "data.shards=[]", f"data.sources={sources}").problems
    assert text in problem.message


def test_shards_and_data_sets_together_are_refused(tmp_path: Path) -> None:
    (problem,) = refused(write(tmp_path, MINIMAL), f"data.sources={TWO}").problems
    assert problem.message.startswith("data.shards and data.sources are both given")


@pytest.mark.parametrize(
    "wrong", ["train.compile=false", "train.zero_stage=3", "train.activation_checkpointing=true", "train.micro_batch_size=8"]
)
def test_graphs_are_of_compiled_blocks_whose_weights_stay_where_they_are(wrong: str) -> None:
    asked = [
        "data.shards=none.tar",
        "train.compile=true",
        "train.zero_stage=1",
        "train.activation_checkpointing=false",
        "train.micro_batch_size=null",
        "train.cuda_graphs=true",
    ]
    assert load("dinov2/vits16_node", asked).config.train.cuda_graphs
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs"):
        load("dinov2/vits16_node", [*asked, wrong])


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("timm_name: resnet50, init: open_clip", "model.init"),
        ("embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, init: simclr", "model.init"),
        ("embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, pos_embed: rope, init: mocov3", "model.init"),
        ("embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, cls_pos_embed: true", "model.cls_pos_embed"),
        ("timm_name: resnet50, cls_pos_embed: true", "model.cls_pos_embed"),
        ("timm_name: resnet10t, stem: conv", "model.stem"),
        ("timm_name: vit_tiny_patch16_224, stem: small", "model.stem"),
        ("timm_name: vit_tiny_patch16_224, resnet_width: 32", "model.resnet_width"),
        ("embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, resnet_blocks: [1, 1, 1, 1]", "model.resnet_blocks"),
        ("embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, channels_last: true", "model.channels_last"),
        ("embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, stem: small_pooled", "model.stem"),
        ("timm_name: resnet50_gn", "model.timm_name"),
        ("timm_name: ecaresnet50d_pruned", "model.timm_name"),
    ],
)
def test_a_start_that_the_tower_has_no_place_for_is_refused_before_it_is_built(tmp_path: Path, model: str, key: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"method: {{name: byol}}\nmodel: {{{model}}}\ndata: {{shards: x.tar}}\n")
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load(file)


@pytest.mark.parametrize("method", ["clip", "coca", "detailclip", "dinov2", "simvlm"])
def test_a_resnet_is_refused_where_a_transformer_is_needed(tmp_path: Path, method: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"method: {{name: {method}}}\nmodel: {{timm_name: resnet18}}\ndata: {{shards: x.tar}}\n")
    with pytest.raises(ConfigError, match=r"resnet18: .* needs a vision transformer"):
        load(file)


@pytest.mark.parametrize("setting", ["freeze_patches: true", "pos_embed: sincos"])
def test_a_resnet_has_neither_patches_to_freeze_nor_positions(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"method: {{name: mocov3, {setting}}}\nmodel: {{timm_name: resnet18}}\ndata: {{shards: x.tar}}\n")
    with pytest.raises(ConfigError, match=setting.split(":")[0]):
        load(file)
