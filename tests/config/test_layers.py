"""Config files that are no help: whatever stands in them ends in one ConfigError, soon and in little memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.layers import compose, scalar
from pipeline.config.load import load
from pipeline.errors import ConfigError


def refused(tmp_path: Path, text: str | bytes, match: str = ".") -> str:
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=match) as caught:
        load(file)
    assert len(str(caught.value)) < 100_000
    return str(caught.value)


@pytest.mark.parametrize("width", [9, 40])
def test_aliases_that_unfold_to_millions_are_refused(tmp_path: Path, width: int) -> None:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, 9)]
    refused(tmp_path, "\n".join(lines), "must not have more than")
    refused(tmp_path, "\n".join(line.replace("[", "{k: [").replace("]", "]}") for line in lines), "must not have more than")


def test_an_alias_of_itself_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "a: &a [*a]", "nested too deeply")
    refused(tmp_path, "a: &a {b: *a}", "nested too deeply")


def test_few_aliases_are_fine(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("data: {shards: &s [a.tar]}\nevaluation: {knn: {val_shards: *s}}\nmethod: {name: clip}\n")
    assert refused(tmp_path, "data: {shards: &s [a.tar]}\nx: *s", "unknown key 'x'")


def test_bases_in_diamonds_are_counted(tmp_path: Path) -> None:
    (tmp_path / "d0.yaml").write_text("run: {name: x}\n")
    for n in range(1, 20):
        (tmp_path / f"d{n}.yaml").write_text(f"base: [d{n - 1}.yaml, d{n - 1}.yaml, d{n - 1}.yaml]\n")
    with pytest.raises(ConfigError, match=r"more than .* base files"):
        load(tmp_path / "d19.yaml")


@pytest.mark.parametrize("depth", [30, 900, 5000, 100_000])
@pytest.mark.parametrize("form", ["[", "{a: ", "- ", "!x ["])
def test_deep_nesting_is_refused(tmp_path: Path, depth: int, form: str) -> None:
    closing = {"[": "]", "{a: ": "}", "!x [": "]"}.get(form, "")
    refused(tmp_path, f"a: {form * depth}{closing * depth}" if closing else form * depth)
    with pytest.raises(ConfigError):
        load("clip/scenes", [f"data.shards={'[' * depth}{']' * depth}"])


@pytest.mark.parametrize(
    "text",
    [
        "train: {global_batch_size: " + "9" * 5000 + "}",
        "train: {global_batch_size: 1" + "0" * 300 + "}",
        "schedule: {lr: {peak: 1e" + "9" * 5000 + "}}",
        "x" * 3_000_000 + ": 1",
        "run: {name: " + "x" * 3_000_000 + "}",
        "\n".join(f"key{n}: 1" for n in range(20_000)),
        'a: "\\UFFFFFFFF"',
        'run: {name: "\\ud800"}',
        "? [a, b]\n: 1",
        b"\xff\xfe",
        b"a: \x00",
        "a: !!python/object/apply:os.system [touch x]",
        "&a a: *b",
    ],
    ids=lambda text: str(text[:20]),
)
def test_absurd_values_are_refused(tmp_path: Path, text: str | bytes) -> None:
    refused(tmp_path, text)


def test_only_regular_files_of_a_moderate_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_bytes(b"#" * (5 << 20))
    for name in ("pipe", "zero", "large"):
        (tmp_path / "top.yaml").write_text(f"base: {name}.yaml\n")
        with pytest.raises(ConfigError):
            load(tmp_path / "top.yaml")


def test_a_long_number_is_a_text() -> None:
    assert scalar("9" * 5000) == "9" * 5000 and scalar("12") == 12 and scalar("1e-3") == 0.001


VALUE = st.recursive(
    st.sampled_from(["1", "x", "null", '"\\x00"', "1e999", "-0", "[]", "{}", "!!binary x", "*a", "&a 1", "9" * 500]),
    lambda inner: st.lists(inner, max_size=3).map(lambda p: f"[{', '.join(p)}]") | inner.map(lambda v: f"{{k: {v}}}"),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(
        ["run", "data", "data.shards", "method", "method.name", "schedule.lr.peak", "train.duration", "model", "base", "x"]
    ),
    value=VALUE | st.text(max_size=12),
)
def test_any_value_is_refused_or_taken(tmp_path: Path, key: str, value: str) -> None:
    file = tmp_path / "any.yaml"
    first, _, second = key.partition(".")
    file.write_bytes(f"{first}: {f'{{{second}: {value}}}' if second else value}\n".encode("utf-8", "surrogatepass"))
    for words in ((file, []), ("clip/scenes", [f"{key}={value}"])):
        try:
            load(*words)
        except ConfigError as error:
            str(error).encode()


@pytest.mark.parametrize("text", ["data: {shards: [" + "x," * 1_500_000 + "]}\n", "".join(f"k{n}: 1\n" for n in range(200_000))])
def test_a_huge_file_is_given_up_early(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, before = [], yaml.SafeLoader.compose_scalar_node
    monkeypatch.setattr(yaml.SafeLoader, "compose_scalar_node", lambda *given: made.append(before(*given)) or made[-1])
    with pytest.raises(ConfigError, match="must not have more than 50000 values"):
        compose(text, "x.yaml")
    assert len(made) <= 50_000


@pytest.mark.parametrize("name", ["a\\0b.yaml", "\\0", "a\\nb.yaml", "\\e[31m.yaml"])
def test_a_base_with_control_characters_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "own.yaml").write_text(f'base: "{name}"\n')
    with pytest.raises(ConfigError, match="control characters") as caught:
        load(tmp_path / "own.yaml")
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


def test_a_base_with_a_name_that_is_too_long_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"base: {'a' * 5000}\n")
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "x.yaml", [])


@pytest.mark.parametrize("key", ["tracking.experiment", "data.label_extension", "data.storage.endpoint", "model.timm_name"])
def test_no_text_holds_control_characters(key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        load("clip/scenes", ["data.shards=x.tar", f"{key}=a\nb\x1b]0;x\x07"])
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("key", ["train.global_batch_size", "checkpoint.keep_last"])
def test_numbers_fit_64_bits(key: str) -> None:
    with pytest.raises(ConfigError, match="must be less than"):
        load("clip/scenes", ["data.shards=x.tar", f"{key}={'9' * 390}"])


@pytest.mark.parametrize("name", ["hf-hub:somebody/x", "local-dir:/tmp"])
def test_a_model_is_a_name_of_timm_not_a_place(name: str) -> None:
    with pytest.raises(ConfigError, match="timm"):
        load("clip/scenes", ["data.shards=x.tar", f"model.timm_name={name}"])
