"""Settings that are right each by itself and do not go together; above all several data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.load import difference, fingerprint, load, show
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from tests.config.test_load import MINIMAL, NAME, refused, write

TWO = "[{name: a, shards: /x/a-*.tar, weight: 2}, {name: b, shards: [b.tar, c.tar], weight: 1e-4}]"


@pytest.mark.parametrize(
    ("name", "section", "old"),
    [
        ("clip/scenes", ["recipe"], {"local_loss": True, "gather_with_grad": True}),
        ("dinov2/scenes_vit_tiny", ["recipe", "views"], {"global_count": 2}),
        ("byol/scenes", ["recipe", "views"], {"global_count": 2}),
    ],
)
def test_settings_of_earlier_versions_with_one_legal_value_are_read_and_gone(
    name: str, section: list[str], old: dict[str, Any]
) -> None:
    config = load(name).config
    document = json.loads(json.dumps(config.model_dump(mode="json")))
    inner = document
    for part in section:
        inner = inner[part]
    assert not old.keys() & inner.keys()
    inner |= old
    assert Config.model_validate(document) == config and difference(Config.model_validate(document), config) == {}
    again = load(name, [f"{'.'.join([*section, key])}={json.dumps(value)}" for key, value in old.items()])
    assert again.config == config and show(again) == show(load(name))
    inner |= {key: 3 for key in old}
    with pytest.raises(ValidationError):
        Config.model_validate(document)


def test_several_data_sets_stand_in_the_place_of_shards(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"model: {{timm: vit_tiny_patch16_224}}\nrecipe: {{views: {{local_size: 96}}}}\ndata: {{sources: {TWO}}}\n"
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


@pytest.mark.parametrize("wrong", ["train.compile=false", "train.zero=3", "train.recompute=true", "train.micro_batch=8"])
def test_graphs_are_of_compiled_blocks_whose_weights_stay_where_they_are(wrong: str) -> None:
    asked = [
        "data.shards=none.tar",
        "train.compile=true",
        "train.zero=1",
        "train.recompute=false",
        "train.micro_batch=null",
        "train.graphs=true",
    ]
    assert load("dinov2/vits16_node", asked).config.train.graphs
    with pytest.raises(ConfigError, match=r"train\.graphs"):
        load("dinov2/vits16_node", [*asked, wrong])


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("timm: resnet50, init: open_clip", "model.init"),
        ("width: 32, depth: 1, heads: 2, patch: 8, init: simclr", "model.init"),
        ("width: 32, depth: 1, heads: 2, patch: 8, positions: rope, init: mocov3", "model.init"),
        ("width: 32, depth: 1, heads: 2, patch: 8, class_position: true", "model.class_position"),
        ("timm: resnet50, class_position: true", "model.class_position"),
        ("timm: resnet10t, stem: small", "model.stem"),
        ("timm: resnet18d, stem: small", "model.stem"),
    ],
)
def test_a_start_that_the_tower_has_no_place_for_is_refused_before_it_is_built(tmp_path: Path, model: str, key: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"recipe: {{name: byol}}\nmodel: {{{model}}}\ndata: {{shards: x.tar}}\n")
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load(file)
