"""Every stage of ``fovea prove`` runs on a CPU at toy size, tells what is wrong, and goes on after a failure."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from launch.cli.main import main
from pipeline.bench.prove import decode, methods, runner
from pipeline.bench.prove.stage import STAGES, Check, Setup, at_least, at_most
from tests.helpers import warm
from tests.helpers.limits import deadline
from tests.helpers.rank_pool import pool
from tests.helpers.runs import environment


def found(stage: str, folder: str, device: Literal["cpu", "cuda"] = "cpu") -> list[Check]:
    """On a rank: a stage's rows."""
    module: Any = importlib.import_module(f"pipeline.bench.prove.{stage}")
    return list(module.checks(Setup(device, toy=True, folder=Path(folder))))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_holds_on_a_cpu(stage: str, tmp_path: Path) -> None:
    own_processes = stage in ("run", "data", "ranks")
    rows = found(stage, str(tmp_path)) if own_processes else pool(1).run(found, stage=stage, folder=str(tmp_path))[0]
    assert rows and [row for row in rows if row.ok is False] == []


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_holds_on_a_gpu(stage: str, tmp_path: Path) -> None:
    (outcome,) = runner.run(Setup("cuda", True, tmp_path), [stage], show=lambda *_: None)
    assert outcome.checks and outcome.ok, outcome


def test_every_method_and_every_operator_is_among_the_checks() -> None:
    from pipeline.config.load import load
    from pipeline.config.schema import METHODS
    from pipeline.data.augment.operators import OPERATORS, Augment

    assert {load(config, ["data.shards=x.tar"]).config.method.name for config in methods.CONFIGS.values()} == set(METHODS)
    augments = [Augment(**{"flip_probability": 0.0} | changes) for changes in decode._OPERATORS.values()]
    assert all(any(operator.used(augment) for augment in augments) for operator in OPERATORS)


@pytest.mark.slow
def test_a_method_whose_loss_is_another_in_bf16_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = pool(1).run(_with_a_wrong_loss, folder=str(tmp_path))[0]
    assert [row.name.partition(":")[0] for row in rows if row.ok is False] == ["clip", "nothing"]
    assert sum(row.ok is True for row in rows) == 3


def _with_a_wrong_loss(folder: str) -> list[Check]:
    from unittest import mock

    real = methods._loss

    def wrong(method: Any, batch: Any, *, bf16: bool) -> float:
        return real(method, batch, bf16=bf16) * (1.1 if bf16 and batch.tokens is not None else 1.0)

    chosen = {"clip": "clip/vit_b16_cc12m", "nothing": "no/such", "simclr": "simclr/cifar10_vit_tiny"}
    with mock.patch.object(methods, "CONFIGS", chosen), mock.patch.object(methods, "_loss", wrong):
        return list(methods.checks(Setup("cpu", toy=True, folder=Path(folder))))


def test_bars_are_inclusive_and_nan_is_below_and_above_all() -> None:
    assert at_most("a", 1.0, 1.0).ok and at_least("a", 1.0, 1.0).ok
    assert not at_most("a", 1.1, 1.0).ok and not at_least("a", 0.9, 1.0).ok
    assert not at_most("a", float("nan"), 1.0).ok and not at_least("a", float("nan"), 1.0).ok


def test_a_picture_that_is_not_decoded_or_of_another_shape_fails_its_row() -> None:
    whole = decode.example_images(1, 16)[0]
    assert not at_most("x", decode._apart(None, whole), 3.0).ok
    assert not at_most("x", decode._apart(whole[:8], whole), 3.0).ok
    assert decode._apart(whole, whole) == 0.0


@pytest.mark.slow
def test_the_command_goes_on_after_a_failure_and_takes_results_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--device", "cpu", "--out", str(tmp_path / "page")]
    with pytest.raises(SystemExit) as ended:
        main(["prove", *out, "--stages", "data,decode", "--photos", str(tmp_path / "nowhere")])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "failed: data" in said and "decode" in said
    document = json.loads((tmp_path / "page.json").read_text())
    by_name = {stage["stage"]: stage for stage in document["stages"]}
    assert (
        list(by_name) == ["decode", "data"] and by_name["data"]["error"].startswith("code 1: ") and not by_name["decode"]["error"]
    )
    assert "Traceback" not in (tmp_path / "page.md").read_text()
    with pytest.raises(SystemExit) as ended:
        main(["prove", *out, "--stages", "data"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "kept from" in said and "all checks passed" in said
    page = (tmp_path / "page.md").read_text()
    assert page.index("## decode") < page.index("## data") and "FAILED" not in page


@pytest.mark.parametrize(
    ("words", "says"), [(["--stages", "imports,decod"], "'decod'"), (["--from", "x"], "'x'"), (["--stages", ","], "no stage")]
)
def test_what_is_no_stage_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prove", "--device", "cpu", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert says in error and "imports, decode" in error


def test_a_stage_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "module_command", lambda *_: ["sleep", "3600"])
    (outcome,) = runner.run(Setup("cpu", True, tmp_path), ["decode"], show=lambda *_: None, limit=0.5)
    assert outcome.error == "not finished after 0 s" and not outcome.ok


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"device": "cpu", "toy": true}',
        '{"device": "cpu", "toy": true, "stages": [{"stage": "run"}]}',
        '{"device": "cpu", "toy": true, "stages": [{"stage": "run", "seconds": "x", "checks": [], "error": ""}]}',
        '{"device": "cpu", "toy": true, "stages": [{"stage": "run", "seconds": 1, "checks": [3], "error": ""}]}',
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_a_page_of_something_else_is_not_taken_up(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["prove", "--device", "cpu", "--out", str(tmp_path / "page"), "--stages", "imports"])
    error = capsys.readouterr().err
    assert (
        ended.value.code == 2 and "is not a result of fovea prove" in error and "page.json" in error and "Traceback" not in error
    )


def test_without_a_gpu_the_way_to_a_cpu_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(["prove"])
    assert ended.value.code == 2 and "--device cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_ends_with_the_command_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.bench.prove import runner, stage\n"
        "list(runner.run(stage.Setup('cpu', True, Path(sys.argv[1])), ['ranks'], show=lambda *_: None))"
    )
    with subprocess.Popen(
        [warm.REAL, "-c", code, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as command:
        stages: list[int] = []
        end = deadline()
        while not stages:
            assert time.monotonic() < end and command.poll() is None
            children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
            stages = [int(number) for number in children if b"prove.runner" in Path(f"/proc/{number}/cmdline").read_bytes()]
        while not list(tmp_path.glob("ranks-*/tmp*")):  # it is at work
            assert time.monotonic() < end and command.poll() is None
        os.kill(stages[0], signal.SIGSTOP)  # it cannot end by itself, neither done nor of a broken pipe
        command.kill()
        command.wait()
        while Path(f"/proc/{stages[0]}").exists() and " Z " not in Path(f"/proc/{stages[0]}/stat").read_text():
            assert time.monotonic() < end, "the stage goes on alone"
