"""``fovea eval`` on several ranks and its way to MLflow: table, file and server say the same, whoever started the ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.cli.eval_ranks import ranks_for
from pipeline.errors import LaunchError
from pipeline.evaluation.reporter import EvalReporter
from pipeline.evaluation.results import by_network
from pipeline.evaluation.standalone import broadcast_each
from pipeline.tracking import Journal, Shipper
from pipeline.tracking.journal import read
from tests.helpers.commands import fovea
from tests.helpers.evaluation import toy, write_run
from tests.helpers.rank_pool import pool
from tests.helpers.runs import ROOT, environment

DEAD = "http://127.0.0.1:9"
FLAGS = ["--knn", "--linear", "--logistic"]
SETTINGS = ["evaluation.linear={learning_rates: [1.0], layers: [1], epochs: 4, batch_size: 8}", "evaluation.logistic.C=[1.0]"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a checkpoint of weights that no seed gives, to be told to a server of its own."""
    loaded = toy(tmp_path, "launch.backend=gloo", "tracking.enabled=true", *SETTINGS)
    return write_run(loaded)


def tracked(run: Path) -> Any:
    """The run's own MLflow run, as its training leaves it."""
    journal = Journal(run / "tracking" / "journal-0000.jsonl")
    journal.metrics(1, {"train/loss": 2.0})
    journal.tags({"fovea.state": "finished"})
    journal.close()
    Shipper(run / "tracking", uri=f"sqlite:///{run.resolve()}/mlflow.db", experiment="fovea", name="toy").ship()
    return json.loads((run / "tracking" / "cursor.json").read_text())["run_id"]


def journalled(run: Path) -> dict[str, float]:
    """What the journals of evaluations by hand say."""
    found: dict[str, float] = {}
    for file in sorted(run.glob("tracking/eval*/journal-*.jsonl")):
        for _, record in read(file):
            found |= record["values"] if record["kind"] == "metrics" else {}
    return found


# ---- who starts the ranks ---------------------------------------------------------------------------------------------------


def test_a_rank_starts_no_ranks_and_gloo_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.rank_environment.gpus", lambda _: 4)
    settings: dict[str, Any] = {name: SimpleNamespace(launch=SimpleNamespace(backend=name)) for name in ("auto", "gloo")}
    assert (ranks_for(settings["auto"], None), ranks_for(settings["auto"], 2), ranks_for(settings["gloo"], None)) == (4, 2, 1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks_for(settings["auto"], None) == ranks_for(settings["auto"], 2) == 1
    with pytest.raises(LaunchError, match="--ranks = 8, but this process is rank 0 of 2"):
        ranks_for(settings["auto"], 8)


def _broadcast() -> list[Any]:
    import torch.distributed as dist

    rank = dist.get_rank()
    items = iter([None, "first", None, "second"]) if rank == 0 else iter(["ignored"])
    return list(broadcast_each(items, SimpleNamespace(rank=rank, control=None)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_all_ranks_evaluate_what_the_first_one_lists_and_none_waits_in_silence() -> None:
    assert pool(2).run(_broadcast) == [["first", "second"]] * 2


# ---- what is told -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_is_away_costs_nothing_and_gets_everything_later(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fovea("eval", str(run), "--knn", "--output", str(run / "out.json"), "--track", DEAD) == 0
    assert "fovea mlflow sync" in capsys.readouterr().err
    scores: dict[str, float] = json.loads((run / "out.json").read_text())["scores"]
    assert journalled(run) == {f"eval/{name}": value for name, value in scores.items()} and scores


def test_baselines_have_names_of_their_own(run: Path) -> None:
    from pipeline.config.schema import Config

    config = Config.model_validate(json.loads((run / "config.json").read_text()))
    untracked = config.replace(tracking=config.tracking.model_copy(update={"enabled": False}))
    assert EvalReporter.of_run(run, untracked, None, log=print) is None
    assert EvalReporter.of_weights("x", config, None, log=print) is None
    reporter = EvalReporter.of_run(run, config, None, log=print)
    assert reporter is not None
    reporter(3, {"knn/k1": 0.5, "baseline/random_init/knn/k1": 0.25})
    reporter.close()  # at once: the run itself was never sent anywhere
    assert journalled(run) == {"eval/knn/k1": 0.5, "eval/baseline/random_init/knn/k1": 0.25}


def test_scores_of_other_evaluators_of_a_checkpoint_are_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--knn", "--linear"):
        assert fovea("eval", str(run), flag, "tracking.enabled=false") == 0
    kept = json.loads((run / "evaluations" / "step_000000024.json").read_text())
    assert {"knn/k1", "linear/top1"} <= set(kept["scores"])
    assert (kept["queries"], kept["bank"], kept["classes"]) == (20, 40, 10)
    assert "20 queries, feature bank of 40 images, 10 classes; chance is 10.0 %" in capsys.readouterr().out


def in_process_of_its_own(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "launch.cli.main", *words]
    env = {**environment(), "COLUMNS": "160"}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=2800, check=False)


@pytest.mark.slow
def test_one_rank_two_ranks_and_torchrun_say_the_same_in_table_file_and_mlflow(run: Path) -> None:
    from mlflow import MlflowClient

    run_id = tracked(run)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    ways: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "one": ([], ()),
        "two": (["--ranks", "2"], ()),
        "torchrun": ([], torchrun),
    }
    scores: dict[str, dict[str, float]] = {}
    for name, (ranks, launcher) in ways.items():
        out = run / f"{name}.json"
        done = in_process_of_its_own("eval", str(run), *FLAGS, "--output", str(out), *ranks, launcher=launcher)
        assert done.returncode == 0, done.stderr
        scores[name] = json.loads(out.read_text())["scores"]
        for key in ("knn/k1", "knn/k5", "linear/top1", "logistic/top1"):
            row = next(line for line in done.stdout.splitlines() if key in line)
            assert f"{100 * scores[name][key]:.1f} %" in row and done.stdout.count(f" {key} ") == 1
        client = MlflowClient(tracking_uri=f"sqlite:///{run.resolve()}/mlflow.db")
        for key, value in scores[name].items():
            point = client.get_metric_history(run_id, f"eval/{key}")[-1]
            assert (point.step, point.value) == (24, value)
    assert scores["two"] == pytest.approx(scores["one"], abs=1e-9)
    assert scores["torchrun"] == scores["two"]
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and found.data.metrics["train/loss"] == 2.0
    assert "step_000000024.json" in [file.path for file in client.list_artifacts(run_id)]
    assert len(client.search_runs([found.info.experiment_id])) == 1


@pytest.mark.slow
def test_without_names_too_two_ranks_say_what_one_says(run: Path) -> None:
    assert fovea("eval", str(run), "tracking.enabled=false") == 0
    file = run / "evaluations" / "step_000000024.json"
    one = file.read_text()
    done = in_process_of_its_own("eval", str(run), "--ranks", "2", "tracking.enabled=false")
    assert done.returncode == 0, done.stderr
    assert file.read_text() == one and set(by_network(json.loads(one)["scores"])) == {"", "random_init", "pixels"}


def test_what_cannot_be_evaluated_is_refused_before_ranks_are_started(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    assert fovea("eval", str(run), "--knn", "--ranks", "2") != 0
    assert "no checkpoint yet" in capsys.readouterr().err
    assert not (run / "logs").exists()


@pytest.mark.slow
def test_weights_get_an_mlflow_run_to_themselves_and_what_is_left_is_sent_by_track_sync(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    saved = str(next((run / "checkpoints").iterdir()))
    assert fovea("export", saved, "--to", "timm", "--out", str(tmp_path / "peer")) == 0
    data = [f"data.shards={tmp_path}/scenes/*train-*.tar", f"evaluation.knn.val_shards={tmp_path}/scenes/*val-*.tar"]
    words = ["eval", str(tmp_path / "peer"), "--knn", "evaluation.knn.k=[1]", "launch.backend=gloo", *data]
    assert fovea(*words, "--track", DEAD, "--output", str(tmp_path / "scores.json")) == 0
    (folder,) = (tmp_path / "runs" / "evaluations").iterdir()
    uri = f"sqlite:///{tmp_path}/elsewhere.db"
    assert fovea("mlflow", "sync", str(folder), "--uri", uri) == 0
    client = MlflowClient(tracking_uri=uri)
    (only,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert only.data.metrics == {f"eval/{name}": value for name, value in scores.items()}
    assert only.info.status == "FINISHED" and only.data.params["weights"] == "peer"
    assert os.environ.get("RANK") is None
