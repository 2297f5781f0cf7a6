"""``fovea embed`` as typed: runs, timm names and buckets; killed at any moment, on any number of ranks, the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.embeddings.reader import Embeddings
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import ConfigError
from tests.helpers.commands import fovea
from tests.helpers.embeddings import content
from tests.helpers.evaluation import toy, write_run
from tests.helpers.limits import deadline
from tests.helpers.runs import ROOT, environment
from tests.helpers.s3 import KEYS, upload


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of weights that no seed gives; its shards have 40 samples."""
    loaded = toy(tmp_path_factory.mktemp("embed"), "launch.backend=gloo", "tracking.enabled=false")
    return write_run(loaded)


def words(run: Path, out: Path, *more: str, shards: str = "") -> list[str]:
    return ["embed", str(run), shards or f"{run.parent}/scenes/*train-*.tar", "--out", str(out), *more]


def started(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli.main", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes, **options)


def done(*arguments: str, code: int = 0) -> str:
    with started(*arguments) as process:
        output = process.communicate()[0]
    assert process.returncode == code, output
    return output


def test_a_run_is_embedded_and_said_to_be_complete(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea(*words(run, tmp_path / "out", "--batch-size", "16")) == 0
    output = capsys.readouterr().out
    assert "embedded 40 of 40 images as 40 x 32 float16 in 1 files" in output and "images/s" in output
    before = content(tmp_path / "out")
    assert fovea(*words(run, tmp_path / "out", "--batch-size", "16")) == 0
    assert "is complete already: 40 embeddings of 40 images; nothing was done" in capsys.readouterr().out
    assert content(tmp_path / "out") == before
    assert fovea(*words(run, tmp_path / "out", "--batch-size", "16", "--dtype", "fp32")) == 2
    assert "holds embeddings with dtype float16, not float32. Choose another --out" in capsys.readouterr().err
    assert fovea(*words(run, tmp_path / "out", "--pooling", "patches", "--patches", "2", "--overwrite")) == 0
    assert "40 of 40 images as 80 x 32 float16" in capsys.readouterr().out


def test_a_checkpoint_and_a_timm_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    assert fovea(*words(Path("step_000000024"), tmp_path / "one", shards=f"{run.parent}/scenes/*val-*.tar")) == 0
    assert Embeddings.open(tmp_path / "one").spec.weights.name == "step_000000024"
    import timm

    real = timm.create_model
    calls: list[str] = []

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        calls.append(name)
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    source = "timm:vit_tiny_patch16_224.augreg_in21k"
    from pipeline.weights import init_from

    state = real("vit_tiny_patch16_224.augreg_in21k", pretrained=False).state_dict()
    monkeypatch.setattr(init_from, "find", lambda name: name)
    monkeypatch.setattr(init_from, "weights_of", lambda found: state)
    shards = f"{run.parent}/scenes/*val-*.tar"
    more = ["--size", "32", "launch.backend=gloo", f"data.index={tmp_path}/index"]
    assert fovea("embed", source, shards, "--out", str(tmp_path / "two"), *more) == 0
    spec = Embeddings.open(tmp_path / "two").spec
    assert (spec.dim, spec.image.size, spec.weights.source) == (192, 32, source)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shard of three parts, one of two, and a small one."""
    folder = tmp_path_factory.mktemp("large")
    for name, count in (("a", 4500), ("b", 2100), ("c", 50)):
        scenes.write(folder / name, train=count, val=1, size=16, seed=3, samples_per_shard=count)
    return f"{folder}/*/*train-*.tar"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_it_gives_the_same_bytes(seed: int, run: Path, large: str, tmp_path: Path) -> None:
    """SIGKILL to the launcher (its ranks die with it) once some files more are there; then with another number of ranks."""
    rng = random.Random(seed)
    more = ["--batch-size", "64", "--size", "16", "data.max_bad_fraction=0.5"]
    done(*words(run, tmp_path / "plain", *more, shards=large))
    expected = content(tmp_path / "plain")
    assert len(expected) == 5
    out, killed = tmp_path / "out", 0
    for ranks in (1, 3, 2, 1, 3, 2, 2, 1):
        present = len(list(out.rglob("*.parquet")))
        target = present + rng.choice([0, 1, 1])
        with started(*words(run, out, *more, "--ranks", str(ranks), shards=large), start_new_session=True) as process:
            end = deadline()
            while process.poll() is None and not (
                (out / ".progress" / "settings.json").exists() and len(list(out.rglob("*.parquet"))) >= target
            ):
                assert time.monotonic() < end
                time.sleep(0.01)
            time.sleep(rng.random() * 0.3)  # any moment
            killed += process.poll() is None
            process.kill()
            process.communicate()
        if (out / "embeddings.json").exists():
            break
    done(*words(run, out, *more, "--ranks", "2", shards=large))
    assert content(out) == expected and killed >= 2


def test_a_signal_stops_all_ranks_and_the_same_command_continues(run: Path, large: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--batch-size", "64", "--size", "16", "--ranks", "2"]
    with started(*words(run, out, *more, shards=large)) as process:
        end = deadline()
        while not list((out / ".progress").rglob("*.parquet")):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
    assert process.returncode == 3 and f"stopped; the same command continues {out}" in output, output
    assert "Traceback" not in output and not (out / "embeddings.json").exists()
    output = done(*words(run, out, *more, shards=large))
    assert "embedded 6,650 of 6,650 images" in output


def test_a_bucket(run: Path, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    shards = sorted((run.parent / "scenes").glob("*train-*.tar"))
    upload(s3_port, "embed", {f"set/{path.name}": path for path in shards})
    more = [f"data.storage.endpoint=http://127.0.0.1:{s3_port}", f"data.storage.cache={tmp_path}/cache", "--batch-size", "16"]
    assert fovea(*words(run, tmp_path / "far", *more, shards="s3://embed/set/*.tar")) == 0
    assert fovea(*words(run, tmp_path / "near", "--batch-size", "16")) == 0
    far, near = Embeddings.open(tmp_path / "far"), Embeddings.open(tmp_path / "near")
    assert far.shards[0].url == f"s3://embed/set/{shards[0].name}" and far.fingerprint == near.fingerprint
    assert far.shards[0].sha256 == near.shards[0].sha256
    assert np.array_equal(far.read(0)["embedding"], near.read(0)["embedding"])
    assert fovea(*words(run, tmp_path / "none", *more, shards="s3://embed/nothing/*.tar")) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere", "x.tar"], "nowhere: is neither a run nor weights"),
        (["{run}", "/nowhere/*.tar"], "no shard matches"),
        (["{run}", "{shards}", "--model", "vit_tiny"], "--model: is for a weights file"),
        (["{run}", "{shards}", "--patches", "3"], "--patches: is for --pooling patches, not cls"),
        (["{run}", "{shards}", "--size", "30"], "30 must be a multiple of the patch size 8"),
        (["{run}", "{shards}", "cluster.nodes=2"], "cluster.nodes=2: is for a job on a cluster"),
        (["{run}", "{shards}", "data.nonsense=1"], "data.nonsense"),
        (["{run}", "{shards}", "data.shards=other.tar"], "data.shards=other.tar: is given by SHARDS here"),
        (["{run}", ""], "must be a path or URL|no shard"),
        (["{run}", "{broken}"], "ends|truncated|damaged"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], text: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = (run.parent / "scenes").glob("*train-*.tar")
    (tmp_path / "broken.tar").write_bytes(shard.read_bytes()[:3000])
    fill = {"run": str(run), "shards": str(shard), "broken": str(tmp_path / "broken.tar")}
    assert fovea("embed", *(word.format(**fill) for word in arguments), "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in text.split("|")) and "Traceback" not in error, error
    assert not (tmp_path / "out" / "embeddings.json").exists()


def test_a_folder_that_cannot_be_written_is_one_message(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea(*words(run, Path("/proc/embeddings"))) in (1, 2)
    error = capsys.readouterr().err
    assert "/proc/embeddings" in error and "Traceback" not in error
    (tmp_path / "file").write_text("x")
    assert fovea(*words(run, tmp_path / "file")) == 2
    assert "must be a folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is a URL"):
        from launch.cli.choices import local_only

        local_only(Path("s3://bucket/out"))


def test_a_rank_that_fails_ends_all_with_its_message(run: Path, large: str, tmp_path: Path) -> None:
    """The disk is full for one rank: files may not grow beyond what one part needs."""
    out = tmp_path / "out"
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); import signal; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from launch.cli.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, *words(run, out, "--size", "16", "--ranks", "2", shards=large)]
    finished = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert finished.returncode != 0 and "File too large" in finished.stderr + finished.stdout, finished.stderr
    assert not (out / "embeddings.json").exists() and not list(out.rglob("*.tmp")), os.listdir(out)


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea("embed", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "fovea embed runs/vitl16 'train-{00000..00099}.tar' --out embeddings" in text and "--cluster" in text
