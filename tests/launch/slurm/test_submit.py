"""What a submission consists of, without a Slurm: profile, batch script, refusals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from pydantic import ValidationError

from launch.slurm import profile as profiles
from launch.slurm import render
from launch.slurm.profile import ClusterProfile, ContainerSettings
from launch.slurm.steps import filled
from launch.slurm.submit import submit
from pipeline.config.load import InvalidConfig, load, show
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import CheckpointError, ConfigError, LaunchError
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.runs import ROOT, TOY

GOLDEN = Path(__file__).with_name("golden.sbatch")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return path


def rendered(toy: Path, profile: ClusterProfile) -> str:
    config = load(toy, ["data.shards=/data/train.tar", "run.directory=/shared/runs/toy"]).config
    return render.script(
        config, profile, Path("/shared/runs/toy"), command="fovea submit toy.yaml", code_state="commit 0123456789ab"
    )


def test_the_batch_script_is_the_one_that_was_looked_at(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "passed_on", lambda *_: ["AWS_PROFILE"])
    monkeypatch.setattr(render, "fingerprint", lambda _: "70c900412753")
    profile = ClusterProfile(
        nodes=2, account="vision", partition="gpu", setup=("module load cuda",), environment={"NCCL_SOCKET_IFNAME": "^docker,lo"}
    )
    assert rendered(toy, profile) == GOLDEN.read_text(), f"look at the difference, then write it to {GOLDEN.name}"


@pytest.mark.parametrize("changes", [{}, {"gpus_per_node": 0, "exclusive": False}, {"environment": {"A": "b c; $(rm -rf x)"}}])
def test_shellcheck_finds_nothing(toy: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    script = tmp_path / "script.sh"
    script.write_text(rendered(toy, ClusterProfile(**changes)))  # type: ignore[arg-type]
    checker = shutil.which("shellcheck") or str(Path(sysconfig.get_path("scripts")) / "shellcheck")
    done = subprocess.run(
        [checker, "--shell=bash", "--severity=warning", str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("/shared/runs/toy", "/shared/runs/toy/logs/batch-%j.log"),
        ("/w/my runs/a b", '"/w/my runs/a b/logs/batch-%j.log"'),
        ("/w/50%done", "/w/50%%done/logs/batch-%j.log"),
        ("/w/x#1", '"/w/x\\#1/logs/batch-%j.log"'),
        ("/w/it's", '"/w/it\'s/logs/batch-%j.log"'),
        ('/w/"q"', '"/w/\\"q\\"/logs/batch-%j.log"'),
        ("/w/été [a]", '"/w/été [a]/logs/batch-%j.log"'),
    ],
)
def test_the_jobs_log_is_named_whatever_the_run_is_called(toy: Path, folder: str, line: str) -> None:
    config = load(toy, ["data.shards=/data/train.tar"]).config
    script = render.script(config, ClusterProfile(), Path(folder), command="fovea\nsubmit\x1b[2J", code_state="c")
    assert f"#SBATCH --output={line}\n" in script
    assert "# sbatch" not in script and "\x1b" not in script
    assert f"cd {shlex.quote(folder)} || exit 1" in script


def test_a_percent_sign_is_doubled_in_patterns_of_srun_only() -> None:
    assert filled("--output=%LOGS%/rank-%t.log", Path("/w/50%done/logs")) == "--output=/w/50%%done/logs/rank-%t.log"
    assert filled("%LOGS%/links.json", Path("/w/50%done/logs")) == "/w/50%done/logs/links.json"


@pytest.mark.parametrize("bad", ["x\ny", "x\r", "x\x1b[2J", "x\u2028y"])
@pytest.mark.parametrize(
    "key",
    ["memory", "partition", "account", "qos", "constraint", "reservation", "options", "export_env", "host_python", "python"],
)
def test_a_profile_brings_no_lines_of_its_own_into_the_script(key: str, bad: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} must not contain line breaks"):
        ClusterProfile.model_validate({key: bad})


def test_names_of_variables_are_names() -> None:
    for name in ("A\ntouch x", "A B", "1A", "A;B", "", "A=1"):
        with pytest.raises(ValidationError, match="not a variable name"):
            ClusterProfile(environment={name: "1"})


def test_a_run_in_a_folder_with_a_backslash_is_refused(toy: Path, tmp_path: Path) -> None:
    loaded = load(toy, ["data.shards=/nowhere/x.tar", f"run.directory={tmp_path}/a\\b"])
    with pytest.raises(ConfigError, match="must not contain a backslash"):
        submit(loaded, ClusterProfile(nodes=1, gpus_per_node=2), dry=True)


def test_relative_shards_reach_the_job_by_a_name_that_holds_there(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes.write(tmp_path / "data", train=40, val=8, size=32, samples_per_shard=20)
    programs(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    loaded = load(toy, ["data.shards=data/*train-*.tar", "run.directory=run", "data.index=ix"])
    profile = ClusterProfile(nodes=1, gpus_per_node=2, local_paths=())
    assert submit(loaded, profile).job == 4711
    monkeypatch.chdir(tmp_path / "run")
    config = load("config.yaml").config
    assert config.data.shards == (f"{tmp_path}/data/*train-*.tar",)
    assert config == loaded.config
    magic = tmp_path / "exp[1]"
    shutil.copytree(tmp_path / "data", magic / "data")
    monkeypatch.chdir(magic)
    loaded = load(toy, ["data.shards=data/*train-*.tar", f"run.directory={tmp_path}/other", "data.index=ix"])
    with pytest.raises(ConfigError, match="whose name reads as a pattern"):
        submit(loaded, profile)


def test_every_profile_of_ours_loads() -> None:
    assert {"example", "one_node_8gpu"} <= set(profiles.available())
    for name in profiles.available():
        assert profiles.load(name).world >= 1


@pytest.mark.parametrize(
    ("time", "seconds"), [("90", 5400), ("1:30:00", 5400), ("2-00:00:00", 172800), ("1-12", 129600), ("30:15", 1815)]
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert ClusterProfile(time=time).seconds == seconds


def test_a_time_is_a_time_and_no_number_to_base_sixty(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("time: 12:30:00\nmemory: 0\n")
    assert profiles.load(str(path)).seconds == 45000


def test_what_is_wrong_with_a_profile_is_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("nodes: 0\npartitoin: gpu\ntime: soon\ncontainer: {image: x.sqsh}\n")
    with pytest.raises(InvalidConfig) as caught:
        profiles.load(str(path))
    text = str(caught.value)
    assert "c.yaml:1" in text and "did you mean 'partition'" in text and "H:M:S" in text and "absolute path" in text
    with pytest.raises(ConfigError, match="example"):
        profiles.load("exampel")
    with pytest.raises(ConfigError, match="not below the time limit"):
        profiles.load("example", ["time=4"])


def test_ranks_are_started_one_a_task_and_die_together() -> None:
    words = render.step(ClusterProfile(nodes=3, gpus_per_node=4), Path("/r"))
    assert words[0] == "srun" and "--ntasks=12" in words and "--kill-on-bad-exit=1" in words and "--wait=60" in words
    assert words[-3:] == ["launch.cli.main", "train", "/r/config.yaml"]


def test_a_container_sees_the_run_and_hears_the_environment() -> None:
    container = ContainerSettings(image="/i/fovea.sqsh", mounts=("/data:/data:ro",))
    words = render.step(ClusterProfile(container=container, environment={"NCCL_DEBUG": "WARN"}), Path("/r"))
    assert "--container-image=/i/fovea.sqsh" in words and "--container-mounts=/r:/r,/data:/data:ro" in words
    assert any(word.startswith("--container-env=NCCL_DEBUG,") for word in words)


def test_a_dry_run_leaves_no_trace(toy: Path, tmp_path: Path) -> None:
    loaded = load(toy, ["data.shards=/nowhere/x.tar", f"run.directory={tmp_path / 'run'}"])
    done = submit(loaded, ClusterProfile(nodes=1, gpus_per_node=2), dry=True)
    assert done.job is None and done.script.startswith("#!/bin/bash") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (ClusterProfile(nodes=1, gpus_per_node=5), "is not divisible by 5 ranks"),
        (ClusterProfile(nodes=2, gpus_per_node=1), "on a disk of one machine only"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(toy: Path, profile: ClusterProfile, words: str) -> None:
    loaded = load(toy, ["data.shards=/nowhere/x.tar", "run.directory=/tmp/somewhere/run"])
    with pytest.raises(ConfigError, match=words):
        submit(loaded, profile, dry=True)


def test_a_finished_run_is_not_submitted_again(toy: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    record.end(run, "finished", "all 24 steps are done")
    loaded = load(toy, ["data.shards=/nowhere/x.tar", f"run.directory={run.path}"])
    with pytest.raises(LaunchError, match="all 24 steps"):
        submit(loaded, ClusterProfile(nodes=1, gpus_per_node=2), dry=True)


def test_a_run_that_must_begin_from_nothing_but_has_checkpoints_is_refused(toy: Path, tmp_path: Path) -> None:
    """Its job would be refused only when it runs; later jobs of a submission go on with what the first has written."""
    words = ["data.shards=/nowhere/x.tar", f"run.directory={tmp_path / 'run'}", "checkpoint.resume=never"]
    folder = tmp_path / "run" / "checkpoints" / "step_000000010"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 10, "files": [], "config": {}}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume=never, but the run has checkpoints"):
        submit(load(toy, words), ClusterProfile(nodes=1, gpus_per_node=2), dry=True)


def test_steps_that_a_gpu_cannot_repeat_are_not_submitted_for_verification(toy: Path, tmp_path: Path) -> None:
    words = ["data.shards=/nowhere/x.tar", f"run.directory={tmp_path / 'run'}", "train.verify_every=10"]
    with pytest.raises(ConfigError, match=r"train\.deterministic=true"):
        submit(load(toy, words), ClusterProfile(nodes=1, gpus_per_node=2), dry=True)
    with pytest.raises(ConfigError, match=r"train\.deterministic=true"):
        load(toy, [*words, "launch.backend=nccl"])
    for profile, more in (
        (ClusterProfile(nodes=1, gpus_per_node=0), []),
        (ClusterProfile(nodes=1, gpus_per_node=2), ["train.deterministic=true"]),
    ):
        assert submit(load(toy, [*words, *more]), profile, dry=True).job is None


def test_nodes_that_stand_by_are_asked_for_and_keep_the_job_when_one_is_lost(toy: Path) -> None:
    text = rendered(toy, ClusterProfile(nodes=2, spare_nodes=1))
    assert "#SBATCH --nodes=3\n#SBATCH --no-kill\n" in text
    assert "--no-kill" not in rendered(toy, ClusterProfile(nodes=2)) and "--nodes=2" in render.step(
        ClusterProfile(nodes=2, spare_nodes=1), Path("/r")
    )


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **answers: str) -> None:
    """Programs of a Slurm that accepts everything, or as given."""
    (folder / "bin").mkdir()
    for name, text in {"sbatch": "echo 4711", "squeue": "", "scontrol": "", "sinfo": "", **answers}.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_a_full_disk_is_told_and_leaves_no_job(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch)
    words = [
        sys.executable,
        "-m",
        "launch.cli.main",
        "submit",
        str(toy),
        "--cluster",
        "one_node_8gpu",
        "--no-index",
        "train.global_batch_size=64",
    ]
    words += ["data.shards=/nowhere/x.tar", f"run.directory={tmp_path / 'run'}"]
    limit = (
        "import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", limit, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-500:]
    assert "cannot be written" in done.stderr and "Free space" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "submit" / "job.json").exists()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_submission_that_slurm_refuses_leaves_no_new_run(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    refuse = 'case "$*" in *test-only*) ;; *) echo "sbatch: error: Job violates accounting/QOS policy" >&2; exit 1;; esac'
    programs(tmp_path, monkeypatch, sbatch=refuse)
    run = RunDirectory(tmp_path / "run")
    loaded = load(toy, ["data.shards=/nowhere/x.tar", f"run.directory={run.path}"])
    if not is_new:
        run.write_settings(loaded.config)
    with pytest.raises(LaunchError, match="violates accounting/QOS policy"):
        submit(loaded, ClusterProfile(nodes=1, gpus_per_node=2, local_paths=()), index=False)
    assert run.path.exists() is not is_new and run.config.exists() is not is_new


def test_a_tracking_server_that_does_not_answer_is_named_and_stops_nothing(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    programs(tmp_path, monkeypatch, sbatch="echo 77")
    profile = ClusterProfile(nodes=1, gpus_per_node=2, local_paths=())

    def said(name: str, *settings: str) -> str:
        common = ["data.shards=/nowhere/x.tar", f"run.directory={tmp_path / name}", "tracking.enabled=true"]
        assert submit(load(toy, [*common, *settings]), profile, index=False).job == 77
        return capsys.readouterr().err

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        dead = said("a", f"tracking.uri={address}")
        assert f"MLflow at {address} (tracking.uri) does not answer from here" in dead and "mlflow sync" in dead
        assert f"MLflow at {address} (MLFLOW_TRACKING_URI) does not answer" in said("b")
        server.listen()
        assert not said("c", f"tracking.uri={address}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert not said("d"), "a database in the run directory is nobody's server"


def test_a_job_knows_its_code_whatever_becomes_of_the_checkout(tmp_path: Path) -> None:
    state = render.snapshot(tmp_path / "code")
    assert state and (tmp_path / "code" / "pipeline" / "errors.py").read_text() == (ROOT / "pipeline" / "errors.py").read_text()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import launch.slurm.supervisor as a, json; "
        "print(json.dumps([a.__file__, [m for m in ('pydantic', 'torch', 'yaml', 'numpy') if m in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path / "code")], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    file, heavy = json.loads(done.stdout)
    assert file.startswith(str(tmp_path)) and heavy == []


def test_shown_settings_of_a_run_load_again(toy: Path, tmp_path: Path) -> None:
    loaded = load(toy, ["data.shards=/nowhere/x.tar", f"run.directory={tmp_path / 'run'}"])
    path = tmp_path / "again.yaml"
    path.write_text(show(loaded))
    assert load(path).config == loaded.config
