"""What cannot work is refused in a sentence: what, where and how to fix it, with exit code 2, before any rank starts."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import local
from launch.cli import main as cli
from pipeline.data.pack import synthetic as scenes
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.runs import TOY

Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    scenes.write(folder, train=40, val=8, size=32, seed=0, samples_per_shard=20)
    return folder


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    config = tmp_path / "toy.yaml"
    config.write_text(TOY)

    def never(*_: object, **__: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(local, "start", never)

    def refuse(shards: Path | str, *overrides: str) -> str:
        words = [
            "train",
            str(config),
            f"data.shards={shards}",
            f"run.directory={tmp_path / 'run'}",
            f"data.index={tmp_path / 'index'}",
        ]
        monkeypatch.setattr(sys, "argv", ["fovea", *words, *overrides])
        with pytest.raises(SystemExit) as stop:
            sys.exit(cli.main())
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert "torch" not in message
        return message

    return refuse


def test_a_missing_shard_is_named(refused: Refusal, shards: Path) -> None:
    message = refused(str(shards / "nothing-{00000..00003}.tar"))
    assert "nothing-00000.tar" in message


def test_a_pattern_that_matches_nothing_is_shown(refused: Refusal, tmp_path: Path) -> None:
    assert "none-*.tar" in refused(str(tmp_path / "none-*.tar"))


def test_a_shard_that_is_no_tar_is_named(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("hello " * 1000)
    assert "text.tar" in refused(str(tmp_path / "text.tar"))


def test_a_compressed_shard_is_told_apart_from_rubbish(refused: Refusal, tmp_path: Path, shards: Path) -> None:
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(next(shards.glob("*train-00000.tar")).read_bytes()))
    assert "compressed" in refused(str(packed)).lower()


def test_a_truncated_shard_is_refused(refused: Refusal, tmp_path: Path, shards: Path) -> None:
    short = tmp_path / "short.tar"
    short.write_bytes(next(shards.glob("*train-00000.tar")).read_bytes()[:20_000])
    message = refused(str(short))
    assert "short.tar" in message
    assert "truncated" in message.lower() or "cut" in message.lower() or "ends" in message.lower()


def test_a_global_batch_that_the_ranks_cannot_share_is_refused(refused: Refusal, shards: Path) -> None:
    message = refused(str(shards / "*train-*.tar"), "train.global_batch_size=15", "data.canonical_streams=15")
    assert "train.global_batch_size" in message
    assert "14 or 16" in message


def test_streams_that_do_not_divide_are_refused_with_those_that_do(refused: Refusal, shards: Path) -> None:
    message = refused(str(shards / "*train-*.tar"), "data.canonical_streams=3")
    assert "data.canonical_streams" in message
    assert "8" in message


def test_a_data_set_smaller_than_a_batch_is_refused(refused: Refusal, shards: Path) -> None:
    assert "64" in refused(str(shards / "*train-*.tar"), "train.global_batch_size=64", "data.canonical_streams=4")


def test_a_typo_is_refused_with_the_nearest_name(refused: Refusal, shards: Path) -> None:
    message = refused(str(shards / "*train-*.tar"), "schedule.lr.peek=1")
    assert "schedule.lr.peek" in message
    assert "schedule.lr.peak" in message


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(refused: Refusal, shards: Path, tmp_path: Path) -> None:
    from pipeline.config.load import load

    other = load(
        tmp_path / "toy.yaml", [f"data.shards={shards}/*train-*.tar", "model.embed_dim=64", "run.directory=/nowhere"]
    ).config
    saved = tmp_path / "other" / "step_000000006"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(
        json.dumps({"format": 1, "step": 6, "files": [], "config": other.model_dump(mode="json"), "data": {}})
    )
    message = refused(str(shards / "*train-*.tar"), f"checkpoint.resume={saved}")
    assert "model.embed_dim" in message
    assert "64" in message
    assert "32" in message


def test_a_directory_that_is_no_checkpoint_is_refused(refused: Refusal, shards: Path, tmp_path: Path) -> None:
    assert "manifest" in refused(str(shards / "*train-*.tar"), f"checkpoint.resume={tmp_path / 'nothing'}")


def test_a_run_directory_of_other_settings_is_refused(refused: Refusal, shards: Path, tmp_path: Path) -> None:
    from pipeline.config.load import load

    old = load(tmp_path / "toy.yaml", [f"data.shards={shards}/*train-*.tar", "schedule.lr.peak=5e-3"]).config
    RunDirectory(tmp_path / "run").write("config.json", old.model_dump(mode="json"))
    message = refused(str(shards / "*train-*.tar"))
    assert "schedule.lr.peak" in message
    assert "0.005" in message


def test_a_second_live_attempt_on_a_run_is_refused(refused: Refusal, shards: Path, tmp_path: Path) -> None:
    from launch.cli.train import alone

    with alone(RunDirectory(tmp_path / "run")):
        assert "is running" in refused(str(shards / "*train-*.tar"))
