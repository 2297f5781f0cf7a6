"""Adding an evaluator takes its file and its section of the settings, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import show
from pipeline.methods.registry import build_seeded_method
from tests.helpers.evaluation import CPU, changed, toy, write_checkpoint
from tests.helpers.runs import ROOT

EVALUATOR = '''
"""Mean norm of the class tokens."""

from pipeline.evaluation.base import Evaluator
from pipeline.evaluation.features import all_gather_table, extract
from pipeline.evaluation.settings import TokenNormSettings
from pipeline.models.eval_model import EvalModel


class TokenNorm(Evaluator[TokenNormSettings]):
    """Mean norm of the class tokens of the queries."""

    def __call__(self, model: EvalModel) -> dict[str, float]:
        """``mean``."""
        table = all_gather_table(extract(self.data.queries, model.cls), self.data.group)
        return {"mean": self.settings.factor * float(table.values.norm(dim=1).mean())}
'''
SECTION = '''
class TokenNormSettings(EvaluatorSettings):
    """Mean norm of class tokens."""

    needs = frozenset(("queries",))

    factor: Positive = Field(default=1.0, description="factor of the norm")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The mean norm."""
        return (Metric("mean", fraction=False),)


'''
FIELD = '    token_norm: TokenNormSettings = Field(default=TokenNormSettings(), description="norm of class tokens")\n'


def install(folder: Path) -> Path:
    """A copy of the packages with one more evaluator: two files are touched."""
    for package in ("pipeline", "launch", "configs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.pyc.*"))
    (folder / "pipeline" / "evaluation" / "token_norm.py").write_text(EVALUATOR)
    settings = folder / "pipeline" / "evaluation" / "settings.py"
    before, header, fields = settings.read_text().partition("class EvaluationSettings(")
    first = fields.index("    knn: ")
    settings.write_text(before.rstrip() + "\n\n" + SECTION + header + fields[:first] + FIELD + fields[first:])
    return folder


def fovea(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli.main", *words],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


@pytest.mark.slow
def test_a_file_and_a_section_are_all_that_an_evaluator_takes(tmp_path: Path) -> None:
    root, data = install(tmp_path / "root"), tmp_path / "data"
    files = {path.relative_to(root): path.read_bytes() for path in root.rglob("*.py")}
    touched = {
        str(name) for name, content in files.items() if not (ROOT / name).exists() or (ROOT / name).read_bytes() != content
    }
    assert touched == {"pipeline/evaluation/settings.py", "pipeline/evaluation/token_norm.py"}
    data.mkdir()
    loaded = toy(data, "launch.backend=gloo", "launch.num_processes=1", "train.duration=2 steps", "schedule.lr.warmup=1 steps")
    (data / "own.yaml").write_text(show(loaded))
    words = ["evaluation.token_norm={enabled: true, every: 2 steps, factor: 2.0}", "evaluation.knn.every=2 steps"]
    words += ["schedule.teacher_temperature.warmup=1 steps", "checkpoint.every=2 steps", "checkpoint.keep_best=token_norm/mean"]
    done = fovea(root, "train", str(data / "own.yaml"), *words)
    assert done.returncode == 0, done.stderr + done.stdout
    run = data / "run"
    scores = json.loads((run / "outcome.json").read_text())["scores"]
    assert scores["token_norm/mean"] > 0 and scores["baseline/random_init/token_norm/mean"] > 0
    assert json.loads((run / "checkpoints" / "best.json").read_text())["score"] == scores["token_norm/mean"]
    done = fovea(root, "eval", str(run), "--only", "token_norm", "--baselines")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "token_norm/mean" in done.stdout
    (file,) = (run / "evaluations").glob("*.json")
    results = json.loads(file.read_text())["scores"]
    assert results == {name: scores[name] for name in ("token_norm/mean", "baseline/random_init/token_norm/mean")}
    done = fovea(root, "report", str(run), "--out", str(tmp_path / "report.html"))
    assert done.returncode == 0, done.stderr
    assert "token_norm/mean, fovea eval" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_an_evaluator_without_its_file_is_refused(tmp_path: Path) -> None:
    root, data = install(tmp_path / "root"), tmp_path / "data"
    (root / "pipeline" / "evaluation" / "token_norm.py").write_text('"""No evaluator."""\n')
    data.mkdir()
    loaded = toy(data, "launch.backend=gloo")
    run = loaded.config.run.folder
    write_checkpoint(run, changed(build_seeded_method(loaded.config, CPU), 1))
    (run / "config.yaml").write_text(show(loaded))
    done = fovea(root, "eval", str(run), "--only", "token_norm")
    assert done.returncode != 0 and "token_norm must define one subclass of Evaluator, and defines 0" in done.stderr
