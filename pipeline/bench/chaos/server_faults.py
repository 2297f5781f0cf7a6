"""Faults of the servers that a run uses: S3 (errors, cut bodies, replaced objects, lost credentials) and MLflow (dead, slow)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

from pipeline.bench.chaos.kinds import SAME, Case, Kind
from pipeline.bench.chaos.runs import Run, failed, kill_group
from pipeline.bench.chaos.site import helper
from pipeline.runtime.interpreter import module_command

_ALL = 1_000_000
_SYNC = "fovea mlflow sync"


def _prepare_s3(case: Case) -> None:
    module, bucket = helper("s3"), f"chaos-{os.getpid()}-{case.folder.name}".lower()
    module.upload(case.site.s3(), bucket, {path.name: path for path in case.site.shards})
    proxy = case.site.proxy(case.stack)
    case.shards = f"s3://{bucket}/*train-*.tar"
    case.environment |= module.KEYS
    case.overrides += [f"data.storage.endpoint={proxy.endpoint}", "data.storage.access=range_read", "data.storage.timeout=15"]
    case.overrides += ["data.storage.outage_timeout=30", f"data.storage.cache={case.folder / 'cache'}"]
    case.overrides += [f"data.index={case.folder / 'index'}"]
    case.proxy, case.bucket = proxy, bucket


def _trouble(kind: str, case: Case) -> str:
    """As many requests at most as are drawn: the run may not make so many more, so that those that were hit are counted."""
    times = round(10 ** case.rng.uniform(0, 2))
    trouble = helper("s3").Trouble(kind, times=times)
    case.proxy.troubles = [trouble]
    what = {"503": "503", "cut": "half of the body"}[kind]
    case.happened = lambda: f"{what} to {trouble.hit} requests of at most {times}" if trouble.hit else ""
    return f"{what} to at most {times} requests"


def _errors(case: Case, run: Run) -> str:
    return _trouble("503", case)


def _cut(case: Case, run: Run) -> str:
    return _trouble("cut", case)


def _credentials(case: Case, run: Run) -> str:
    seconds = 10 ** case.rng.uniform(-0.5, 1.7)
    trouble = helper("s3").Trouble("403", times=_ALL)
    case.proxy.troubles = [trouble]
    case.repair, case.action = lambda: setattr(case.proxy, "troubles", []), f"new credentials, {SAME}"
    end = time.monotonic() + seconds
    while run.running() and time.monotonic() < end:
        time.sleep(0.02)
    how_long = "until the run ended"
    if run.running():
        case.proxy.troubles, how_long = [], f"for {seconds:.1f} s"
    return f"403 to {trouble.hit} requests, all {how_long}" if trouble.hit else ""


def _replaced(case: Case, run: Run) -> str:
    module, bucket, shard = helper("s3"), case.bucket, case.rng.choice(case.site.shards)
    other = case.folder / "other.tar"
    shutil.copyfile(shard, other)
    with other.open("r+b") as file:
        file.seek(2000)
        file.write(b"other bytes")
    module.upload(case.site.s3(), bucket, {shard.name: other})
    case.repair = lambda: module.upload(case.site.s3(), bucket, {shard.name: shard})
    case.action = f"the object put back, {SAME}"
    return f"{shard.name} replaced"


def _prepare_mlflow(case: Case) -> None:
    server = case.site.mlflow()
    case.overrides += ["tracking.enabled=true", f"tracking.uri={server.uri}"]
    case.finish = lambda run: _sync(case, run)


def _sync(case: Case, run: Run) -> str:
    """Send what the server has not taken, if the run says that there is something."""
    case.site.mlflow()  # running again
    if _SYNC not in run.log.read_text(errors="replace"):
        return ""
    command = module_command("launch.cli.main", "mlflow", "sync", str(run.directory))
    done = subprocess.run(command, env=run.environment, cwd=run.root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise failed(f"fovea mlflow sync failed: {(done.stderr or done.stdout)[-200:]}")
    return f"`{_SYNC}`"


def _dead(case: Case, run: Run) -> str:
    case.site.mlflow().stop()
    return "the server was killed, and was back after the run"


def _slow(case: Case, run: Run) -> str:
    group, seconds = case.site.mlflow().group, 10 ** case.rng.uniform(-0.5, 1)
    if not kill_group(group, signal.SIGSTOP):
        return ""
    try:
        end = time.monotonic() + seconds
        while run.running() and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        kill_group(group, signal.SIGCONT)
    return f"the server did not answer for {seconds:.1f} s"


KINDS = (
    Kind("s3-503", "S3: 503 to 1 to 100 requests", _errors, _prepare_s3, margin=6),
    Kind("s3-cut", "S3: half of the body to 1 to 100 requests", _cut, _prepare_s3, margin=6),
    Kind("s3-replaced", "S3: an object is replaced", _replaced, _prepare_s3, margin=10),
    Kind("s3-credentials", "S3: credentials refused for 0.3 to 50 s", _credentials, _prepare_s3, margin=10),
    Kind("mlflow-dead", "MLflow is killed", _dead, _prepare_mlflow),
    Kind("mlflow-slow", "MLflow does not answer for 0.3 to 10 s", _slow, _prepare_mlflow),
)
