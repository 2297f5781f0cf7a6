"""The tree of settings: what is read, what is refused, and how well it is told."""

from __future__ import annotations

import ast
import importlib
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config.layers import scalar
from pipeline.config.load import (
    InvalidConfig,
    allowed,
    available,
    difference,
    fingerprint,
    flatten,
    identity,
    load,
    nearest,
    resolve,
    schema,
    show,
)
from pipeline.config.schema import Config
from pipeline.config.types import Length, Settings, absolute_paths
from pipeline.config.validate import check_ranks
from pipeline.errors import ConfigError
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.methods.settings import MethodSettings, register
from pipeline.training.settings import CurveSettings, LrScalingSettings

ROOT = Path(__file__).resolve().parents[2]
NAME = "dinov2/cifar10_vit_tiny"
MINIMAL = "model: {embed_dim: 8, depth: 1, num_heads: 2, patch_size: 14}\ndata: {shards: a.tar}\n"
LEAVES = sorted(flatten(load(NAME).config))


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path | str, *overrides: str) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        load(path, overrides)
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("010", 10),
        ("0o10", "0o10"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("2026-01-02", "2026-01-02"),
        (".inf", ".inf"),
        ("1e", "1e"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    assert scalar(text) == value and type(scalar(text)) is type(value)


def test_scalars_mean_the_same_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "schedule: {lr: {peak: 1e-3}}\nrun: {name: '010'}\ntracking: {experiment: on}\n")
    config = load(path, ["optim.eps=1e-3", "run.seed=010"]).config
    assert (config.schedule.lr.peak, config.optim.eps, config.run.name, config.run.seed) == (1e-3, 1e-3, "010", 10)
    assert config.tracking.experiment == "on"


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        (1500, 1500),
        (1e6, 1_000_000),
        ("1.5M samples", 1_500_000),
        ("2k", 2000),
        ("500 steps", 500 * 32),
        ("1 step", 32),
        ("3 epochs", 3000),
        ("0.5 epochs", 500),
        ("1e3 samples", 1000),
        (0, 0),
    ],
)
def test_a_length_counts_samples(text: int | float | str, samples: int) -> None:
    length = Length.parse(text)
    assert length.samples(epoch_samples=1000, global_batch=32) == samples
    assert length.steps(1000, 32) == -(-samples // 32)
    assert Length.parse(length.plain()) == length


@pytest.mark.parametrize(
    "text", ["", "many", "-1", "1.5", "1.5 steps", "3 weeks", "steps", "1..2", "1e99", True, None, [1], "5 k", "3 epochs 2"]
)
def test_what_is_no_length_is_refused(text: Any) -> None:
    if text == "5 k":
        assert Length.parse(text).amount == 5000
        return
    with pytest.raises(ValueError, match="must be"):
        Length.parse(text)


@settings(deadline=None)
@given(st.integers(0, 10**15), st.sampled_from(["samples", "steps", "epochs"]))
def test_a_length_survives_being_written(amount: int, unit: Any) -> None:
    assert Length.parse(Length(float(amount), unit).plain()) == Length(float(amount), unit)


def test_all_problems_of_a_file_are_told_at_once_with_their_place(tmp_path: Path) -> None:
    text = "optim:\n  epss: 3\n  eps: -1\ntrain:\n  duration: many\n  precision: fp16\n"
    text += "data:\n  shards: a.tar\n  num_workers: 2\n  num_workers: 3\n"
    error = refused(write(tmp_path, text), "train.lr=1e-3", "nonsense")
    found = {problem.path: problem for problem in error.problems}
    assert set(found) == {
        "optim.epss",
        "optim.eps",
        "train.duration",
        "train.precision",
        "data.num_workers",
        "model",
        "train.lr",
        "",
    }
    assert found["optim.epss"].origin.endswith("run.yaml:2:3")
    assert "did you mean 'optim.eps'" in found["optim.epss"].message and "betas, eps, lr_scaling" in found["optim.epss"].message
    assert found["optim.eps"].message.startswith("optim.eps = -1: must be greater than 0")
    assert "fp32, bf16" in found["train.precision"].message and '"fp16"' in found["train.precision"].message
    assert "3 epochs" in found["train.duration"].message
    assert "given twice" in found["data.num_workers"].message and found["data.num_workers"].origin.endswith(":10:3")
    assert found["train.lr"].origin == "command line" and "schedule.lr" in found["train.lr"].message
    assert all(str(problem) in str(error) for problem in error.problems) and error.exit_code == 2


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(LEAVES),
    st.integers(0, 200),
    st.sampled_from(string.ascii_lowercase + "_"),
    st.sampled_from(["add", "drop", "change"]),
)
def test_any_typo_in_a_key_is_refused_and_named(path: str, place: int, letter: str, kind: str) -> None:
    at = place % len(path)
    typo = path[:at] + {"add": letter + path[at], "drop": "", "change": letter}[kind] + path[at + 1 :]
    known = set(schema())
    if typo in known or typo.count(".") != path.count(".") or not all(typo.split(".")):
        return
    error = refused(NAME, f"{typo}=1")
    first = next(".".join(typo.split(".")[: n + 1]) for n in range(len(typo)) if ".".join(typo.split(".")[: n + 1]) not in known)
    assert [problem.path for problem in error.problems] == [first]
    assert repr(first) in str(error) and "command line" in str(error)


@pytest.mark.parametrize("path", LEAVES)
def test_a_dropped_letter_is_answered_with_the_right_name(path: str) -> None:
    parent, _, leaf = path.rpartition(".")
    if len(leaf) > 3:
        assert nearest(f"{parent}.{leaf[:-2]}{leaf[-1]}") == path


PATHS = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]))


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "run.seed": st.integers(0, 2**63 - 1),
            "schedule.lr.peak": st.floats(1e-300, 1e300),
            "optim.betas": st.tuples(st.floats(0, 1), st.floats(0, 1)),
            "tracking.experiment": PATHS.filter(bool),
            "tracking.uri": st.none() | PATHS,
            "data.shards": st.lists(PATHS, min_size=1, max_size=3),
            "data.verify_checksums": st.booleans(),
            "train.duration": st.integers(1, 10**15) | st.sampled_from(["30 epochs", "7 steps", "5.25 epochs"]),
            "evaluation.knn.k": st.lists(st.integers(1, 10**4), min_size=1, max_size=3),
        },
    )
)
def test_what_is_shown_loads_to_the_same_settings(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    loaded = load(NAME)
    config = loaded.config
    for key, value in changes.items():
        config = changed(config, key.split("."), value)
    loaded = type(loaded)(config, loaded.provenance, loaded.source)
    again = load(write(tmp_path_factory.mktemp("shown"), show(loaded)))
    assert again.config == absolute_paths(config) and fingerprint(again.config) == fingerprint(config)


def changed(config: Any, path: list[str], value: Any) -> Any:
    plain = config.model_dump(mode="json")
    inner = plain
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return Config.model_validate(plain)


@pytest.mark.parametrize("name", sorted(available()))
def test_each_config_that_comes_with_fovea_loads_and_says_what_it_is(name: str) -> None:
    loaded = load(name)
    assert loaded.config.run.name in (name.rpartition("/")[2], name.replace("/", "_"))
    assert set(loaded.provenance) == set(flatten(loaded.config))
    head = resolve(name).read_text().splitlines()[:12]
    assert (
        head[0].startswith("# ")
        and any(line.startswith("#   command") for line in head)
        and any("reached" in line for line in head)
    )


def test_show_tells_where_each_value_came_from(tmp_path: Path) -> None:
    write(tmp_path, "optim: {eps: 1e-7, momentum: 0.1}\n", "below.yaml")
    path = write(tmp_path, MINIMAL + "base: below.yaml\noptim: {momentum: 0.2}\n")
    lines = {line.split(":")[0].strip(): line for line in show(load(path, ["train.zero_stage=2"])).splitlines()}
    assert "below.yaml:1:9" in lines["eps"] and "run.yaml:4:9" in lines["momentum"]
    assert lines["zero_stage"].endswith("# command line") and lines["betas"].endswith("# default")
    assert load(path).config.optim.momentum == 0.2


def test_bases_merge_in_order_and_lists_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, "evaluation: {knn: {k: [1, 2, 3], image_size: 32}}\noptim: {momentum: 0.1, eps: 1e-4}\n", "a.yaml")
    write(tmp_path, "optim: {momentum: 0.2}\n", "b.yaml")
    path = write(tmp_path / "deep", "base: [../a.yaml, ../b.yaml]\n" + MINIMAL + "evaluation: {knn: {k: [7]}}\n")
    config = load(path).config
    assert (config.optim.momentum, config.optim.eps) == (0.2, 1e-4)
    assert (config.evaluation.knn.k, config.evaluation.knn.image_size) == ((7,), 32)


def test_a_circle_of_bases_and_a_missing_base_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="its own base"):
        load(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"c\.yaml:1:1: base 'none\.yaml' does not exist"):
        load(write(tmp_path, "base: none.yaml\n", "c.yaml"))


@pytest.mark.parametrize("text", ["a: [1, 2", "a: 'x", "\tb: 1", "- 1\n- 2", "just text", "a: *nowhere", "a: b: c"])
def test_what_is_no_mapping_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(path)


def test_aliases_that_contain_themselves_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        load(write(tmp_path, "a: &x {b: *x}\n"))
    with pytest.raises(ConfigError, match="nested too deeply"):
        load(write(tmp_path, "a: &x [*x]\n"))


def test_an_unknown_config_is_answered_with_near_names() -> None:
    with pytest.raises(ConfigError, match="dinov2/cifar10_vit_tiny"):
        resolve("dinov2/cifar_vit_tiny")
    assert resolve(NAME) == resolve(f"configs/{NAME}.yaml").resolve() == ROOT / "configs" / f"{NAME}.yaml"


def test_overrides_take_lists_mappings_and_quoted_text(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load(
        path,
        [
            "evaluation.knn.k=[1, 2]",
            "method={prototypes: 9, views: {local_size: 28}}",
            "run.name='7'",
            "data.shards={a,b}/x-{0..9}.tar",
        ],
    ).config
    assert isinstance(config.method, Dinov2Settings)
    assert (config.evaluation.knn.k, config.method.prototypes, config.method.views.local_size) == ((1, 2), 9, 28)
    assert (config.run.name, config.data.shards) == ("7", (f"{Path.cwd()}/{{a,b}}/x-{{0..9}}.tar",))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.global_batch_size=255", "254 or 256"),
        ("train.micro_batch_size=100", "2 ranks times train.micro_batch_size = 100"),
        ("model.num_heads=5", "is not divisible by model.num_heads = 5"),
        ("method.views.local_size=15", "12 or 16"),
        ("method.views.global_scale=[0.9, 0.1]", "0.9 is above 0.1"),
        ("method.prototypes=1", "greater than 1"),
        ("method.name=dinov3", "did you mean dinov2"),
        ("model.timm_name=vit_tiny_patch16_224", "has no effect beside model.timm_name"),
        ("model.embed_dim=null", "model.embed_dim is required"),
        ("evaluation.knn.max_train=5", "more neighbours"),
        ("schedule.lr.warmup=60 epochs", "longer than the run"),
        ("checkpoint.every=0", "longer than 0"),
        ("train.zero_stage=4", "0, 1, 2 or 3"),
        ("run.name=../up", "pattern"),
        ("schedule.lr.peak=true", "valid number"),
        ("data.verify_checksums=yes", "true or false"),
        ("train.global_batch_size='128'", "valid integer"),
        ("evaluation.knn.k=[]", "at least 1"),
        ("optim.betas=[0.9]", "too few"),
        ("schedule=5", "section"),
        ("schedule.lr.peak=1e999", "finite"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_key_and_mend(override: str, words: str) -> None:
    error = refused(NAME, override)
    assert words in str(error)
    assert override.partition("=")[0].split(".")[0] in str(error)


def test_ranks_are_checked_again_once_their_number_is_known() -> None:
    config = load(NAME, ["train.global_batch_size=256"]).config
    assert not check_ranks(config, 4)
    assert check_ranks(config, 3) == [
        ("train.global_batch_size", "train.global_batch_size = 256: is not divisible by 3 ranks; 255 or 258 would")
    ]


def test_the_fingerprint_knows_what_is_computed_and_nothing_else() -> None:
    one = load(NAME).config
    other = load(
        NAME,
        [
            "run.directory=/else",
            "run.name=x",
            "launch.num_processes=1",
            "tracking.enabled=false",
            "data.num_workers=4",
            "data.shards=b.tar",
            "train.zero_stage=2",
        ],
    ).config
    assert fingerprint(one) == fingerprint(other) and difference(one, other) == {}
    assert "data.num_workers" in difference(one, other, runtime=True)
    for change in (
        "schedule.lr.peak=1",
        "run.seed=1",
        "method.views.local_count=3",
        "train.duration=9 epochs",
        "data.shuffle_block_size=1",
        "model.stem=patch",
    ):
        other = load(NAME, [change]).config
        assert fingerprint(one) != fingerprint(other) and list(difference(one, other)) == [change.partition("=")[0]]


def test_every_setting_is_described_and_says_what_is_allowed() -> None:
    for path, info in schema().items():
        assert info.description and info.description[0].islower() | (info.description[:1].isupper()), path
        assert allowed(info) and "typing" not in allowed(info) and "pydantic" not in allowed(info), (path, allowed(info))


def test_runtime_settings_are_not_part_of_the_identity() -> None:
    keys = set(identity(load(NAME).config))
    assert not {key for key in keys if key.startswith(("launch.", "tracking.", "evaluation.", "checkpoint."))}
    assert {"run.seed", "train.global_batch_size", "schedule.lr.peak", "data.shuffle_block_size", "method.name"} <= keys


def test_settings_are_frozen_and_strict() -> None:
    config = load(NAME).config
    with pytest.raises(ValidationError):
        config.optim.eps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        CurveSettings(start=1, en=2)  # type: ignore[call-arg]


def test_another_method_brings_its_settings_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.config import load as module
    from pipeline.config import schema as tree
    from pipeline.methods import settings as base

    methods = {"dinov2": Dinov2Settings}
    monkeypatch.setattr(tree, "METHODS", methods)
    monkeypatch.setattr(base, "REGISTERED", methods)
    monkeypatch.setattr(module, "METHODS", methods)

    @register("toy")
    class Toy(MethodSettings):
        name: str = "toy"
        queue: int = 5

    path = write(tmp_path, MINIMAL + "method: {name: dinov2, prototypes: 7}\n")
    upper = write(tmp_path, "base: run.yaml\nmethod: {name: toy, queue: 6}\n", "toy.yaml")
    loaded = load(upper)
    assert isinstance(loaded.config.method, Toy) and loaded.config.method.queue == 6
    assert load(write(tmp_path, show(loaded), "again.yaml")).config == loaded.config
    assert "method.queue" in schema("toy") and "method.prototypes" not in schema("toy")
    assert isinstance(load(path).config.method, Dinov2Settings)
    with pytest.raises(ValueError, match="two methods"):
        register("toy")(Dinov2Settings)


def test_validation_shards_lie_beside_the_training_shards(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load(path).config.validation_shards == (f"{Path.cwd()}/*val-*.tar",)
    assert load(path, ["data.shards=/x/train-{00..09}.tar"]).config.validation_shards == ("/x/*val-*.tar",)
    assert load(path, ["evaluation.knn.val_shards=v.tar"]).config.validation_shards == (f"{Path.cwd()}/v.tar",)
    assert load(path).config.voting_shards == (f"{Path.cwd()}/a.tar",)


def test_the_run_is_called_after_its_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL, "my run.yaml")).config
    assert (config.run.name, config.run.folder) == ("my-run", Path.cwd() / "runs/my-run")


def test_peak_learning_rate_follows_the_rule() -> None:
    assert LrScalingSettings(rule="sqrt").scaled(4e-3, 2048) == pytest.approx(5.657e-3, rel=1e-4)
    assert LrScalingSettings(rule="linear").scaled(1.0, 128) == 0.5
    assert LrScalingSettings(rule="linear", reference_batch=64).scaled(1.0, 128) == 2.0
    assert LrScalingSettings(rule="none").scaled(1.0, 128) == 1.0


def test_importing_the_config_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "nvidia", "deepspeed", "mlflow")
    code = f"import sys, pipeline.config.load; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_section_is_a_strict_settings_class() -> None:
    found = []
    for path in [*ROOT.glob("pipeline/**/*settings.py"), ROOT / "pipeline/config/schema.py"]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        found += [getattr(importlib.import_module(module), name) for name in names if name.endswith(("Settings", "Curve"))]
    assert len(found) > 40 and all(issubclass(section, Settings) for section in found)


@pytest.mark.parametrize(
    ("shards", "validation"),
    [
        ("/d/train-{000..009}.tar", "/d/*val-*.tar"),
        ("/d/train-*.tar", "/d/*val-*.tar"),
        ("train-0.tar", "*val-*.tar"),
        ("/d/shards", "/d/shards/*val-*.tar"),
        ("/d/shards/", "/d/shards/*val-*.tar"),
        ("s3://bucket/web", "s3://bucket/web/*val-*.tar"),
        ("/d/{a,b}/train-*.tar", "/d/*val-*.tar"),
        ("/d/x[v2]/train-*.tar", "/d/x[v2]/*val-*.tar"),
    ],
)
def test_validation_shards_lie_beside_the_training_shards_or_in_their_folder(shards: str, validation: str) -> None:
    config = Config.model_validate({"model": {"timm_name": "vit_small_patch16_224"}, "data": {"shards": shards}})
    assert config.validation_shards == (validation,)


def test_a_copy_of_a_shown_config_has_its_directory_from_its_own_name(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "first.yaml")
    copy = tmp_path / "second.yaml"
    copy.write_text(show(load(tmp_path / "first.yaml")).replace("name: first", "name: other"))
    assert load(copy).config.run.directory.name == "other"
    assert load(copy, ["run.directory=/runs/mine"]).config.run.directory == Path("/runs/mine")
    assert "directory: /runs/mine" in show(load(copy, ["run.directory=/runs/mine"]))
