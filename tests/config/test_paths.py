"""Paths of a configuration hold in any working directory, and every setting that names files is known to do so."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.load import InvalidConfig, difference, load, schema, show
from pipeline.config.paths import absolute, patterns, same
from pipeline.config.schema import METHODS, Config
from pipeline.config.types import path_marker, path_values
from tests.helpers.runs import TOY

# Texts that name no files. A new setting that is a text belongs here, or gets one of the path types of pipeline/config/types.py.
PLAIN = {
    *(
        "run.name",
        "data.sources.name",
        "data.image_extensions",
        "guidance.columns.name",
        "guidance.columns.values",
        "data.caption_extension",
        "data.label_extension",
        "data.storage.endpoint",
        "data.storage.region",
    ),
    *(
        "model.timm_name",
        "method.teacher_model.timm_name",
        "method.students.timm_name",
        "method.students.name",
        "method.text.architecture",
    ),
    *(
        "notify.email_to",
        "notify.email_from",
        "notify.smtp",
        "notify.smtp_user",
        "notify.smtp_password_env",
        "notify.webhook_env",
    ),
    "notify.command",  # looked up on the PATH, as in a shell
    *(f"data.channels.{name}" for name in ("names", "members", "rgb", "groups", "composite")),
    *("method.text.tokenizer", "checkpoint.keep_best", "tracking.experiment", "evaluation.segmentation.class_names"),
}


def kinds(annotation: typing.Any) -> set[typing.Any]:
    inner = {kind for part in typing.get_args(annotation) for kind in kinds(part)}
    return inner | ({annotation} if isinstance(annotation, type) else set())


def test_every_text_of_the_settings_names_files_or_is_known_not_to() -> None:
    unknown, marked = set(), set()
    for method in METHODS:
        for key, info in schema(method).items():
            if path_marker(info) is not None:
                marked.add(key)
            elif kinds(info.annotation) & {str, Path} and key not in PLAIN:
                unknown.add(key)
    assert not unknown, f"give these a type of pipeline/config/types.py that marks paths, or list them in PLAIN: {unknown}"
    assert len(marked) >= 18 and not marked & PLAIN


OLD = """
run: {name: toy, directory: runs/a}
method:
  name: distill
  teacher_weights: runs/teacher
  gram_weights: ../gram
  gram_weight: 1.0
  views: {global_size: 32, local_size: 16}
init_from: {source: weights.safetensors}
data: {shards: [train-*.tar, 's3://bucket/x-*.tar', /there/y.tar, 'file://z.tar'], index: ix, storage: {cache: ../kept}}
checkpoint: {mirror: copies, resume: runs/a/checkpoints/step_000000006}
tracking: {uri: 'sqlite:///all.db'}
evaluation:
  knn: {train_shards: vote, val_shards: './v-{00..03}.tar'}
  segmentation: {train_shards: [a.tar, b.tar], val_shards: c.tar}
  zeroshot: {class_names: names.txt, templates: /t.txt}
model: {embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8}
train: {global_batch_size: 16}
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = tmp_path / "home" / "work"
    work.mkdir(parents=True)
    (work / "my.yaml").write_text(OLD)
    monkeypatch.chdir(work)
    return work


def test_every_path_is_absolute_once_it_is_loaded(written: Path) -> None:
    config = load("my.yaml").config
    up = written.parent
    assert path_values(config) == {
        "run.directory": written / "runs/a",
        "method.teacher_weights": f"{written}/runs/teacher",
        "method.gram_weights": f"{up}/gram",
        "init_from.source": f"{written}/weights.safetensors",
        "data.shards": (f"{written}/train-*.tar", "s3://bucket/x-*.tar", "/there/y.tar", f"file://{written}/z.tar"),
        "data.index": written / "ix",
        "data.storage.cache": up / "kept",
        "checkpoint.mirror": f"{written}/copies",
        "checkpoint.resume": f"{written}/runs/a/checkpoints/step_000000006",
        "tracking.uri": f"sqlite:///{written}/all.db",
        "evaluation.knn.train_shards": (f"{written}/vote",),
        "evaluation.knn.val_shards": (f"{written}/v-{{00..03}}.tar",),
        "evaluation.segmentation.train_shards": (f"{written}/a.tar", f"{written}/b.tar"),
        "evaluation.segmentation.val_shards": (f"{written}/c.tar",),
        "evaluation.zeroshot.class_names": written / "names.txt",
        "evaluation.zeroshot.templates": Path("/t.txt"),
    }
    sources = load("my.yaml", ["data.shards=[]", "data.sources=[{name: a, shards: a.tar}]"]).config.data.sources
    assert sources is not None and sources[0].shards == (f"{written}/a.tar",)


def test_they_are_shown_as_typed_and_kept_absolute(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("my.yaml", ["evaluation.zeroshot.class_names=other.txt"])
    shown = show(loaded)
    assert str(written) not in shown and "class_names: other.txt" in shown and "teacher_weights: runs/teacher" in shown
    assert load_text(written, shown) == loaded.config
    kept = show(loaded, absolute=True)
    monkeypatch.chdir(tmp_path)
    assert load_text(tmp_path, kept) == loaded.config


def load_text(folder: Path, text: str) -> Config:
    (folder / "again.yaml").write_text(text)
    return load(folder / "again.yaml").config


def test_a_run_begun_with_relative_paths_is_the_same_run(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings as they were written before paths were made absolute are no other settings, from any folder."""
    new = load("my.yaml").config
    raw = json.loads(json.dumps(new.model_dump(mode="json")).replace(f"{written}/", ""))
    old = Config.model_validate(raw)
    assert old.init_from.source == "weights.safetensors"
    assert difference(old, new) == {}
    monkeypatch.chdir(tmp_path)
    assert difference(old, new) == {}
    other = new.replace(init_from=new.init_from.model_copy(update={"source": f"{written}/others.safetensors"}))
    assert set(difference(old, other)) == {"init_from.source"}


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("a/b", "path", "/w/a/b"),
        ("../a/../b", "path", "/a/../b"),
        ("./a", "path", "/w/a"),
        (".", "path", "/w"),
        ("..", "path", "/"),
        ("/a", "path", "/a"),
        ("a:b", "path", "/w/a:b"),
        ("timm:vit_tiny", "name", "timm:vit_tiny"),
        ("s3://b/k", "name", "s3://b/k"),
        ("a/b:c", "name", "/w/a/b:c"),
        ("az://a/c/{0..3}.tar", "patterns", "az://a/c/{0..3}.tar"),
        ("x-{00..03}[ab]?*.tar", "patterns", "/w/x-{00..03}[ab]?*.tar"),
        ("http://host:5000", "uri", "http://host:5000"),
        ("databricks", "uri", "databricks"),
        ("databricks://me", "uri", "databricks://me"),
        ("sqlite:///a.db", "uri", "sqlite:////w/a.db"),
        ("sqlite:////a.db", "uri", "sqlite:////a.db"),
        ("sqlite://", "uri", "sqlite://"),
        ("mlruns", "uri", "/w/mlruns"),
        ("file:mlruns", "uri", "file:///w/mlruns"),
        ("file:///mlruns", "uri", "file:///mlruns"),
        ("postgresql://u:p@h/db", "uri", "postgresql://u:p@h/db"),
    ],
)
def test_what_is_a_path_and_what_is_none(text: str, kind: typing.Any, expected: str) -> None:
    assert absolute(text, kind, "/w") == expected
    assert absolute(expected, kind, "/elsewhere") == expected


def test_braces_that_begin_with_folders_are_taken_apart() -> None:
    assert patterns(("{/a,b}/x-{0..2}.tar",), "/w") == ("/a/x-{0..2}.tar", "/w/b/x-{0..2}.tar")
    assert patterns(("{s3://k,/d}/x.tar",), "/w") == ("s3://k/x.tar", "/d/x.tar")
    assert patterns(("{a,b}/x.tar", "{00..03}.tar"), "/w") == ("/w/{a,b}/x.tar", "/w/{00..03}.tar")


def test_the_home_directory_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/me")
    assert absolute("~/a", "path", "/w") == "/me/a"
    assert patterns(("~/a-*.tar",), "/w") == ("/me/a-*.tar",)


def test_a_folder_whose_name_reads_as_a_pattern_is_not_put_in_front_of_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "exp[1]"
    work.mkdir()
    (work / "toy.yaml").write_text(TOY)
    monkeypatch.chdir(work)
    config = load("toy.yaml", ["data.shards=train-*.tar", "data.index=ix"]).config
    assert config.data.shards == ("train-*.tar",) and config.data.index == work / "ix"
    assert load("toy.yaml", ["data.shards=../train-*.tar"]).config.data.shards == (f"{tmp_path}/train-*.tar",)


@given(st.lists(st.sampled_from(["a", "b c", "..", ".", "x-*"]), min_size=1, max_size=5))
def test_a_path_made_absolute_is_where_it_was(parts: list[str]) -> None:
    text = "/".join(parts)
    there = absolute(text, "path", "/q/r/s/t/u/v")
    assert there.startswith("/") and same(there, there)
    assert Path(there).resolve() == Path("/q/r/s/t/u/v", text).resolve()
    assert absolute(there, "path", "/else") == there


@pytest.mark.parametrize("bad", ["a\nb", "a\x1b[2Jb", "a\rb", "a\u2028b", "a\x7f"])
@pytest.mark.parametrize(
    "key",
    [
        *("run.name", "run.directory", "data.index", "data.shards", "data.storage.cache", "init_from.source", "tracking.uri"),
        *("checkpoint.mirror", "checkpoint.resume", "evaluation.knn.val_shards", "evaluation.zeroshot.class_names"),
    ],
)
def test_control_characters_in_paths_are_refused(tmp_path: Path, key: str, bad: str) -> None:
    (tmp_path / "toy.yaml").write_text(TOY)
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path / "toy.yaml", ["data.shards=a.tar", f"{key}={bad}"])
    assert key in str(caught.value) and bad not in str(caught.value)


def test_a_run_that_was_moved_is_the_run_that_lies_there(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(TOY)
    first = load(tmp_path / "toy.yaml", ["data.shards=/d/a.tar", f"run.directory={tmp_path / 'old'}"])
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.yaml").write_text(show(first, absolute=True))
    assert load(new).config.run.folder == tmp_path / "old"  # a config as any other, as long as no run has begun there
    (new / "config.json").write_text("{}")
    for name in (new, new / "config.yaml"):
        assert load(name).config.run.folder == new
    assert load(new, ["run.directory=/x/y"]).config.run.folder == Path("/x/y")


def test_what_nobody_chose_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load("dinov2/cifar10_vit_tiny", ["data.shards=/d/a.tar"])
    assert "cifar10_vit_tiny.yaml:" in shipped.nobodys_choice("launch.num_processes")
    assert not shipped.nobodys_choice("data.shards") and not shipped.nobodys_choice("launch.timeout")
    assert not load("dinov2/cifar10_vit_tiny", ["data.shards=/d/a.tar", "launch.num_processes=2"]).nobodys_choice(
        "launch.num_processes"
    )
    (tmp_path / "mine.yaml").write_text(TOY)
    mine = load("mine.yaml", ["data.shards=/d/a.tar"])
    assert not mine.nobodys_choice("launch.num_processes")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(show(mine))
    (run / "config.json").write_text("{}")
    assert load(run).nobodys_choice("launch.num_processes")
