"""A Slurm that keeps accounts (slurmdbd), with limits, chains, other people's jobs and a second user of the machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.slurm import job_end, site
from launch.slurm import slurm_commands as tools
from launch.slurm.doctor import examine
from launch.slurm.submit import living
from pipeline.errors import LaunchError
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.cluster_runs import SITE, Start, causes, fovea, queue, ranks_of, reach, start_now, starter, until, verdict
from tests.helpers.second_user import NOBODY, fovea_as
from tests.helpers.slurm import NEEDS_ACCOUNTS, PREEMPTION, Cluster, cluster, preempting

pytestmark = NEEDS_ACCOUNTS
ME = "root" if os.getuid() == 0 else os.environ.get("USER", "")
ACCOUNTS = [
    *("add account lab", "add account guests", "add account poor", "modify account poor set GrpTRES=node=1"),
    *("add qos short", "modify qos short set MaxWall=00:10:00", "add qos narrow", "modify qos narrow set MaxTRESPerUser=node=1"),
    *("add qos single", "modify qos single set MaxSubmitJobsPerUser=1", "add qos secret"),
    *(f"add user {ME} account=lab DefaultAccount=lab", f"add user {ME} account=poor", "add user nobody account=guests"),
    f"modify user {ME} set qos=normal,short,narrow,single",
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="fovea-accounts-"))  # not below pytest's, which other users cannot enter
    folder.chmod(0o755)
    extra = {**PREEMPTION, "ProctrackType": "proctrack/linuxproc", "JobAcctGatherType": "jobacct_gather/linux"}
    with cluster(folder / "c", extra=extra, partitions=preempting(), defaults=True, accounts=ACCOUNTS) as made:
        yield made
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder(slurm: Cluster) -> Iterator[Path]:
    """Where a run lies that another user may look at."""
    path = Path(tempfile.mkdtemp(dir=slurm.folder.parent))
    path.chmod(0o755)
    yield path
    slurm.call("scancel", "--me", check=False)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def start(slurm: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    return starter(slurm, folder, monkeypatch)


@pytest.mark.parametrize(
    ("profile", "text"),
    [
        ({"account": "nobody"}, "account nobody is not one of yours (lab, poor"),
        ({"account": "guests"}, "account guests is not one of yours"),
        ({"qos": "secret"}, "QOS secret is not one of yours with account lab (narrow, normal, short, single)"),
        ({"qos": "short", "time": "20"}, "time 20 exceeds the limit of 10:00 of QOS short"),
        ({"qos": "narrow"}, "2 nodes exceed the limit of 1 of QOS narrow"),
        ({"account": "poor"}, "2 nodes exceed the limit of 1 of account poor"),
    ],
)
def test_what_an_account_or_its_limits_never_admit_is_refused(
    slurm: Cluster, start: Start, folder: Path, profile: dict[str, str], text: str
) -> None:
    with pytest.raises(LaunchError, match="the job can never run") as refused:
        start(**profile)
    assert text in refused.value.what
    assert not (folder / "run").exists() and not slurm.call("squeue", "--me", "-h").strip()


def test_what_is_admitted_runs_with_its_account_and_the_accounting_knows_its_end(
    slurm: Cluster, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, job = start(steps=5000, account="lab", qos="short", time="5")
    reach(run, 4)
    until(lambda: len(queue(run)) == 2, "no successor was submitted")
    rows = slurm.call("squeue", "--me", "-h", "-o", "%a %q").split("\n")[:2]
    assert rows == ["lab short", "lab short"]
    slurm.call("scancel", str(job))
    until(lambda: not queue(run), "a job of a cancelled run is left")
    assert verdict(run)["state"] == "stopped" and causes(run) == ["cancelled"]
    monkeypatch.setattr(tools, "facts", lambda *_, **__: {})  # as after MinJobAge
    until(lambda: job_end.of_ended(job) == "CANCELLED", "the accounting does not know it")


def test_where_a_limit_admits_one_job_the_run_is_requeued(
    slurm: Cluster, start: Start, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    run, job = start({"0": [6, "kill"]}, steps=30, qos="single")
    assert "QOS single admits one job in the queue" in capfd.readouterr().err
    until(lambda: "ended_at" in (record.endings(run) or [{}])[0], "the attempt did not end")
    until(lambda: queue(run) == [(job, "PENDING")], "the job is not requeued")
    log = (run.path / "logs" / f"batch-{job}.log").read_text()
    assert "QOSMaxSubmitJobPerUserLimit" in log and "requeued instead" in log
    start_now(slurm, job)
    assert verdict(run)["state"] == "finished" and causes(run) == ["crash", "finished"]


def test_doctor_compares_accounts_and_limits(slurm: Cluster, folder: Path, start: Start) -> None:
    assert set(site.ask().accounts or {}) >= {"lab", "poor"}

    def findings(**profile: str) -> str:
        (folder / "site.yaml").write_text(yaml.safe_dump({**SITE, "local_paths": [], **profile}))
        return "\n".join(f"{state} {what}" for state, what, _ in examine(str(folder / "site.yaml")))

    assert "bad account: nobody is not an account of yours" in findings(account="nobody")
    assert "the job can never run" not in findings(account="nobody"), "told twice"
    assert "bad qos: secret is not one of yours" in findings(qos="secret")
    assert "bad the job can never run: time 20 exceeds the limit of 10:00 of QOS short" in findings(qos="short", time="20")
    assert "note QOS single admits one job in the queue" in findings(qos="single")
    fine = findings(account="lab", qos="short", time="5")
    assert "ok account: lab" in fine and "bad the job" not in fine and "ok the profile fits partition main" in fine


def test_a_chain_is_succeeded_at_once_and_cannot_be_requeued(slurm: Cluster, start: Start, folder: Path) -> None:
    run, job = start(steps=60, requeue_mode="chain")
    reach(run, 6)
    until(lambda: len(queue(run)) == 2, "no successor was submitted")
    assert "disabled" in slurm.call("scontrol", "requeue", str(job), check=False)
    urgent = folder / "urgent.sh"
    urgent.write_text("#!/bin/bash\n#SBATCH --partition=urgent --nodes=2 --exclusive --output=/dev/null\nsleep 3\n")
    slurm.call("sbatch", str(urgent))
    assert verdict(run)["state"] == "finished" and causes(run) == ["preempted", "finished"]
    assert slurm.state(job) == "PREEMPTED" and record.endings(run)[1]["job"] != job
    until(lambda: not queue(run), "a job of a finished run is left")


def test_arrays_of_jobs_are_nobodys_run(slurm: Cluster, start: Start, folder: Path) -> None:
    other = folder / "array.sh"
    other.write_text("#!/bin/bash\n#SBATCH --array=1-6%2 --ntasks=1 --mem=10 --output=/dev/null\nsleep 600\n")
    array = int(slurm.call("sbatch", "--parsable", str(other)))
    until(lambda: slurm.call("squeue", "-h", "-t", "R", "-o", "%i").split().count(f"{array}_1"), "the array does not run")
    run, job = start(steps=5000)
    reach(run, 4)
    assert living(run)[0].id == job and {number for number, _ in queue(run)} >= {job}
    assert fovea("status", str(run.path)).startswith("run: running")
    assert "running" in fovea("runs", str(folder))
    fovea("cancel", str(run.path))
    until(lambda: not queue(run), "a job of the run is left")
    assert f"{array}_1" in slurm.call("squeue", "-h", "-o", "%i").split(), "the array was cancelled"


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_a_second_user_sees_a_run_and_changes_nothing(slurm: Cluster, start: Start, folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    run, job = start(steps=5000)
    reach(run, 4)
    until(lambda: len(queue(run)) == 2, "no successor was submitted")
    jobs = queue(run)
    files = {path: path.read_bytes() for path in (run.path / "submit").iterdir()}

    code, text = fovea_as(NOBODY, home, "status", str(run.path))
    assert code == 0 and text.startswith("run: running: on n[1-2]") and f"job {job} running" in text, text
    code, text = fovea_as(NOBODY, home, "runs", str(folder))
    assert code == 0 and "running" in text and "idle" not in text, text
    code, text = fovea_as(NOBODY, home, "logs", str(run.path))
    assert code == 0 and "rank 0 of attempt 0 begins" in text, text
    for words in (["stop"], ["stop", "--now"], ["cancel"], ["requeue"], ["requeue", "--now"], ["resume"]):
        code, text = fovea_as(NOBODY, home, *words, str(run.path))
        assert code in (1, 2) and "Traceback" not in text, (words, text)
        assert "Permission denied" in text or "of this run is running" in text, (words, text)
    assert queue(run) == jobs and len(ranks_of(run)) == 2 and not (run.path / "control").exists()
    assert {path: path.read_bytes() for path in (run.path / "submit").iterdir()} == files
    fovea("cancel", str(run.path))
    assert record.final_state(RunDirectory(run.path))["state"] == "stopped"
