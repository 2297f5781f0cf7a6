"""Choices of the command line are those of the library; help lists them, and others are rejected before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from enum import EnumMeta
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from launch.cli import choices
from launch.cli.main import main
from pipeline.bench.checkpoint import MODELS
from pipeline.bench.collapse_ablation import QUESTIONS
from pipeline.bench.step import METHODS as STEP_METHODS
from pipeline.config.schema import METHODS
from pipeline.data.curation.balance import BalanceOptions
from pipeline.data.curation.retrieve import RetrieveOptions
from pipeline.data.embeddings.document import Pooling
from pipeline.data.index.labels import LABEL_MODES
from pipeline.data.pack.layouts import LAYOUTS
from pipeline.data.pack.shifts import SHIFTS
from pipeline.data.pack.transcode import FORMS
from pipeline.weights.export.write import FORMATS
from pipeline.weights.settings import AdaptSettings
from tests.helpers.runs import ROOT

LIBRARY = {
    "BalanceMode": get_args(get_type_hints(BalanceOptions)["mode"]),
    "CoarseLevels": get_args(get_type_hints(BalanceOptions)["coarse"]),
    "ExportFormat": FORMATS,
    "ImageFormat": FORMS,
    "Labels": LABEL_MODES,
    "Method": METHODS,
    "Pooling": get_args(Pooling),
    "Question": QUESTIONS,
    "RetrieveMode": get_args(get_type_hints(RetrieveOptions)["mode"]),
    "SourceLayout": LAYOUTS,
    "SceneShift": SHIFTS,
    "Spectral": ("all", "rgb"),
    "StepMethod": STEP_METHODS,
    "Trained": get_args(AdaptSettings.model_fields["train"].annotation),
    "VitSize": MODELS,
}
OPTIONS = [
    (["demo"], "--method", "Method"),
    (["export", "run"], "--to", "ExportFormat"),
    (["export", "run", "--to", "timm"], "--network", "Network"),
    (["checkpoint", "convert", "run", "out"], "--weights", "Weights"),
    (["checkpoint", "convert", "run", "out"], "--dtype", "Precision"),
    (["shards", "pack", "in", "out"], "--layout", "SourceLayout"),
    (["shards", "pack", "in", "out"], "--transcode", "ImageFormat"),
    (["shards", "pack", "in", "out"], "--labels", "Labels"),
    (["shards", "index", "in"], "--on-truncated-shard", "OnTruncated"),
    (["shards", "balance", "in", "--out", "out", "--target", "1"], "--mode", "BalanceMode"),
    (["shards", "balance", "in", "--out", "out", "--target", "1"], "--coarse", "CoarseLevels"),
    (["shards", "retrieve", "in", "--out", "out", "--like", "x"], "--mode", "RetrieveMode"),
    (["embed", "run", "in", "--out", "out"], "--pooling", "Pooling"),
    (["embed", "run", "in", "--out", "out"], "--dtype", "StoredType"),
    (["runs"], "--sort", "RunOrder"),
    (["shards", "synthesize", "out"], "--shift", "SceneShift"),
    (["shards", "synthesize", "out"], "--spectral", "Spectral"),
    (["adapt", "in", "--from", "weights"], "--train", "Trained"),
    (["bench", "step"], "--method", "StepMethod"),
    (["bench", "step"], "--device", "Device"),
    (["bench", "checkpoint"], "--model", "VitSize"),
]


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_choices_are_those_of_the_library(name: str) -> None:
    assert sorted(getattr(choices, name)) == sorted(LIBRARY[name])


def test_every_choice_is_tested() -> None:
    names = {name for name, value in vars(choices).items() if isinstance(value, EnumMeta) and name != "StrEnum"}
    assert names == {name for *_, name in OPTIONS} | {"Question"}


@pytest.mark.parametrize(("words", "option", "name"), OPTIONS)
def test_an_unknown_value_is_rejected_with_all_choices(
    words: list[str], option: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as left:
        main([*words, option, "wrong"])
    error = capsys.readouterr().err
    assert left.value.code == 2 and option in error
    assert all(f"'{value}'" in error for value in getattr(choices, name))


def test_the_choices_load_no_library() -> None:
    command = "import sys, launch.cli.choices; sys.exit(any(n in sys.modules for n in ('pydantic', 'numpy', 'torch', 'yaml')))"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("verb", [["prove", "--device", "cpu"], ["bench", "data"], ["bench", "methods", "dino"]], ids=" ".join)
@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_an_output_path_that_names_no_file_is_refused_before_anything_is_measured(
    verb: list[str], path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--out", path])
    assert ended.value.code == 2 and "names no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["shards", "synthesize", "gs://lab/scenes"],
        ["shards", "preview", "dinov2/cifar10_vit_tiny", "--out", "s3://lab/p.html"],
        ["checkpoint", "convert", "run", "s3://lab/teacher.safetensors"],
        ["export", "run", "--to", "timm", "--out", "az://lab/x"],
        ["report", "run", "--out", "https://lab/report.html"],
        ["visualize", "run", "photos", "--out", "s3://lab/images.html"],
        ["demo", "--directory", "s3://lab/demo"],
        ["bench", "checkpoint", "--out", "s3://lab/checkpoint"],
    ],
)
def test_a_url_as_output_is_refused_and_makes_no_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "://lab" in (said := capsys.readouterr().err) and "is a URL" in said
    assert list(tmp_path.iterdir()) == []
