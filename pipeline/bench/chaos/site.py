"""The servers and files of the chaos benchmark: Slurm, S3 and MLflow as the tests start them, shards, the undisturbed run."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from pipeline.bench.chaos.observe import weights
from pipeline.bench.chaos.runs import PATIENCE, failed
from pipeline.bench.probes import run_probe
from pipeline.data.pack import synthetic
from pipeline.errors import ConfigError
from pipeline.runtime.interpreter import ROOT, module_command

BATCH, RANKS = 16, 2
_PREEMPTION = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
_PROFILE: dict[str, Any] = {
    **{"nodes": RANKS, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_rank": 1, "memory": "100", "time": "30"},
    **{"checkpoint_lead_time": 60, "exclusive": False, "local_paths": [], "preflight": {"disk_gb": 0.001}},
}


def helper(name: str) -> ModuleType:
    """A module of the tests' helpers, which start the servers.

    Raises:
        ConfigError: the tests are not here: fovea was installed without its checkout, or without what they need.
    """
    if (ROOT / "tests" / "helpers").is_dir() and str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"tests.helpers.{name}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the servers of the tests are not available ({error.name} is missing)",
            where="fovea bench chaos",
            hint="Run it in a checkout of fovea, after pip install -e '.[test]'",
        ) from None


class Site:
    """What the runs share; each server is started when a run first needs it.

    Args:
        directory: shards and the undisturbed run, used again by later benchmarks.
        every: steps between two checkpoints.
    """

    def __init__(self, directory: Path, every: int = 5) -> None:
        self.directory, self.every = directory, every
        self._stack = contextlib.ExitStack()
        self._servers: dict[str, Any] = {}
        self.scratch = Path(tempfile.mkdtemp(prefix="fovea-chaos-"))
        self._runs: ModuleType = helper("runs")
        self._warm: ModuleType = helper("warm")
        self._python, self._own = sys.executable, "FOVEA_WARM_PYTHON" not in os.environ

    def __enter__(self) -> Site:
        sys.executable = self._warm.prepare() or sys.executable
        self.config = self.scratch / "chaos.yaml"
        self.config.write_text(self._runs.TOY)
        self._make()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        sys.executable = self._python
        if self._own:
            self._warm.remove()
        shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def shards(self) -> list[Path]:
        """The training shards."""
        return sorted((self.directory / "scenes").glob("*train-*.tar"))

    def _make(self) -> None:
        """Shards, once; complete before their folder has its name."""
        self.directory.mkdir(parents=True, exist_ok=True)
        scenes = self.directory / "scenes"
        if not scenes.exists():
            made = Path(tempfile.mkdtemp(prefix=".scenes-", dir=self.directory))
            synthetic.write(made, train=320, val=24, size=32, seed=3, samples_per_shard=40)
            _claim(made, scenes)

    def reference(self, steps: int) -> Path:
        """The undisturbed run of a length, trained at the first call.

        Raises:
            TrainingError: it failed.
            ConfigError: it did not end in time.
        """
        reference = self.directory / f"undisturbed-{steps}-{self.every}"
        if not reference.exists():
            made = Path(tempfile.mkdtemp(prefix=".undisturbed-", dir=self.directory))
            command = self.command("train", steps, self.config, f"{self.directory / 'scenes'}/*train-*.tar", made)
            limit, what, where = 6 * PATIENCE, "the undisturbed run", "fovea bench chaos"
            done = run_probe(command, self.environment(), limit=limit, what=what, where=where, cwd=ROOT)
            if done.returncode or not weights(made, steps):
                raise failed(f"the undisturbed run failed: {(done.stderr or done.stdout)[-500:]}")
            _claim(made, reference)
        return reference

    def command(self, verb: str, steps: int, config: Path, shards: str, run: Path, *overrides: str) -> list[str]:
        """The words of a command for a run of some steps."""
        command = module_command("launch.cli.main", verb, str(config), f"data.shards={shards}", f"run.directory={run}")
        command += [f"data.index={self.scratch / 'index'}", f"train.duration={steps} steps", "train.record_batches=false"]
        command += [f"checkpoint.every={self.every} steps", "launch.timeout=120"]
        return [*command, *overrides]

    def environment(self, **more: str) -> dict[str, str]:
        """Variables of its processes."""
        return {**self._runs.environment(), **more}

    def profile(self, folder: Path, **values: Any) -> Path:
        """A cluster profile for the two nodes."""
        path = folder / "site.yaml"
        path.write_text(yaml.safe_dump({**_PROFILE, "host_python": sys.executable, **values}))
        return path

    # ---- servers --------------------------------------------------------------------------------------------------------

    def s3(self) -> Any:
        """Port of the S3 server."""
        if "s3" not in self._servers:
            self._servers["s3"] = self._stack.enter_context(helper("s3").server())
        return self._servers["s3"]

    def proxy(self, stack: contextlib.ExitStack) -> Any:
        """A proxy before the S3 server, for one run."""
        return stack.enter_context(helper("s3").proxy(self.s3()))

    def mlflow(self) -> Any:
        """The MLflow server, running; started again if a fault has ended it."""
        if "mlflow" not in self._servers:
            server = helper("mlflow_server").MlflowServer(self.scratch / "mlflow")
            server.start()
            self._stack.callback(server.stop)
            self._servers["mlflow"] = server
        elif not self._servers["mlflow"].group:
            self._servers["mlflow"].start()
        return self._servers["mlflow"]

    def slurm(self) -> Any:
        """The Slurm cluster of two nodes."""
        if "slurm" not in self._servers:
            module = helper("slurm")
            if lacking := module.missing():
                raise ConfigError(
                    f"Slurm is not installed ({', '.join(lacking)})",
                    where="fovea bench chaos",
                    hint="Install slurmctld, slurmd, slurm-client and munge, or name the kinds to measure",
                )
            cluster = module.cluster(self.scratch / "slurm", extra=_PREEMPTION, partitions=module.preempting(30))
            self._servers["slurm"] = self._stack.enter_context(cluster)
        return self._servers["slurm"]

    def clock(self) -> Path | None:
        """The library that shifts the wall clock of a process; ``None`` without a C compiler."""
        if "clock" not in self._servers:
            self._servers["clock"] = helper("clock").build(self.scratch)
        library: Path | None = self._servers["clock"]
        return library


def _claim(made: Path, name: Path) -> None:
    """Give a finished folder its name, unless another process was first."""
    try:
        made.rename(name)
    except OSError:
        shutil.rmtree(made)


def may_mount() -> bool:
    """Whether file systems can be mounted and unmounted: root in a container may not be allowed to."""
    with tempfile.TemporaryDirectory(prefix="fovea-mount-") as folder:
        mount, unmount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], ["umount", folder]
        try:
            return not any(subprocess.run(command, check=False, capture_output=True).returncode for command in (mount, unmount))
        except OSError:
            return False
