"""Renders the batch script and the job's configuration from a config and a cluster profile."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2

from launch import send_end
from launch.notifications import VARIABLE
from launch.slurm.profile import ClusterProfile
from pipeline.config.load import fingerprint
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.untrusted import printable

ROOT = Path(__file__).resolve().parents[2]
_TEMPLATE = "train.sbatch"


def template() -> Path:
    """Path of the batch script's template: in the checkout, or installed."""
    for folder in (ROOT / "slurm", Path(sys.prefix) / "share" / "fovea" / "slurm"):
        if (folder / _TEMPLATE).is_file():
            return folder / _TEMPLATE
    raise ConfigError(
        "the batch script's template is missing",
        where=f"slurm/{_TEMPLATE}",
        hint="Install fovea again; the template belongs to the package",
    )


def script(config: Config, profile: ClusterProfile, run: Path, *, command: str, code_state: str) -> str:
    """Render the batch script.

    Args:
        config: the run's settings.
        profile: the cluster.
        run: the run directory, absolute.
        command: the submitted command line, for the script's header.
        code_state: version of the submitted code, for the script's header.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["quote"] = shlex.quote
    environment.filters["word"] = sbatch_word
    return environment.from_string(template().read_text()).render(
        name=config.run.name,
        profile=profile,
        run=str(run),
        output=sbatch_word(f"{str(run).replace('%', '%%')}/logs/batch-%j.log"),
        code=str(run / "code"),
        lead=round(profile.checkpoint_lead_time),
        threads=config.train.threads or max(profile.cpus_per_rank // 2, 1),
        environment=profile.environment,
        command=printable(" ".join(command.split())),
        fingerprint=fingerprint(config)[:12],
        code_state=code_state,
        passed_on=",".join(passed_on(config, profile)) or "NONE",
    )


def sbatch_word(text: str) -> str:
    """Quote a value for a ``#SBATCH`` line if it holds blanks, quotes or a ``#``."""
    if not re.search(r"""[\s"'#\\]""", text):
        return text
    return '"' + re.sub(r'(["\\#])', r"\\\1", text) + '"'


def passed_on(config: Config, profile: ClusterProfile) -> list[str]:
    """Names of this process's environment variables that the job inherits."""
    required = (VARIABLE, *config.notify.variables, *profile.notify.variables)
    patterns = (*profile.export_env, *required)
    return sorted(name for name in os.environ if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def facts(config: Config, profile: ClusterProfile, run: Path, notify: dict[str, Any] | None = None) -> dict[str, Any]:
    """Facts for the supervisor as JSON values, first of all the command of the ranks; ``notify`` as it may be used."""
    return {
        "notify": notify or {},
        "ranks": profile.world,
        "restarts": config.launch.restarts,
        "snapshots": snapshots_of(config, profile),
        "nodes": profile.nodes,
        "spare": profile.spare_nodes,
        "gpus_per_node": profile.gpus_per_node,
        "after": profile.requeue_mode,
        "exclude_hours": profile.exclude_hours,
        "lead": profile.checkpoint_lead_time,
        "hang": profile.hang_timeout,
        "budgets": profile.budgets.model_dump(),
        "preflight": profile.preflight.model_dump(),
        "host_python": profile.host_python,
        "srun": step(profile, run),
        "links": step(
            profile, run, ["launch.slurm.bandwidth_check", "%LOGS%/links.json", "64" if profile.gpus_per_node else "4"]
        ),
        "send_end": end_step(profile, run) if config.tracking.enabled else [],
        "fingerprint": fingerprint(config),
        "profile": profile.model_dump(mode="json"),
    }


def snapshots_of(config: Config, profile: ClusterProfile) -> bool:
    """Whether snapshots are taken: a container cannot read those of the host."""
    needed = config.launch.restarts and config.checkpoint.snapshot_every is not None
    return bool(needed and profile.container is None)


def end_step(profile: ClusterProfile, run: Path) -> list[str]:
    """The ``srun`` command that informs the trackers of a run that failed: one task, as a rank's otherwise."""
    own = {"--nodes": 1, "--ntasks": 1, "--ntasks-per-node": 1, "--cpus-per-task": 1}
    arguments = step(profile, run, [send_end.MODULE, str(run)], "send-end.log")
    names = [argument.partition("=")[0] for argument in arguments]
    return [f"{name}={own[name]}" if name in own else argument for name, argument in zip(names, arguments, strict=True)]


def step(profile: ClusterProfile, run: Path, module: list[str] | None = None, log: str = "links-%t.log") -> list[str]:
    """The ``srun`` command: one task per rank; ``%LOGS%`` stands for the attempt's log directory.

    Args:
        profile: the cluster.
        run: the run directory.
        module: a module of ours and its arguments, instead of the training.
        log: log file of the module's ranks.
    """
    log = log if module else "rank-%t.log"
    command = [
        "srun",
        f"--nodes={profile.nodes}",
        f"--ntasks={profile.world}",
        f"--ntasks-per-node={profile.tasks_per_node}",
        "--distribution=block",  # ranks are numbered node by node
        f"--cpus-per-task={profile.cpus_per_rank}",
        "--unbuffered",
        "--kill-on-bad-exit=1",  # otherwise the ranks would wait for a dead one until the time limit
        "--wait=60",  # likewise for one that exited early
        "--open-mode=append",
        f"--output=%LOGS%/{log}",
    ]
    python = profile.python or sys.executable
    if profile.container is not None:
        c = profile.container
        mounts = ",".join((f"{run}:{run}", *c.mounts))
        names = ",".join(
            (*profile.environment, "PYTHONPATH", "PYTHONSAFEPATH", "MASTER_PORT", "FOVEA_ATTEMPT", "OMP_NUM_THREADS")
        )
        command += [
            f"--container-image={c.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={run}",
            "--no-container-mount-home",
            f"--container-env={names}",  # otherwise a value in the image would take precedence
        ]
        python = c.python
    return [*command, python, "-m", *(module or ["launch.cli.main", "train", str(run / "config.yaml")])]


def snapshot(target: Path) -> str:
    """Copy the code into the run directory; returns a description of its version.

    Args:
        target: directory of the copy; an older copy is replaced.
    """
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    for name in ("pipeline", "launch", "configs", "slurm"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, fresh / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    state = code_state()
    (fresh / "STATE").write_text(state + "\n")
    patch = _git("diff", "HEAD", "--binary")
    if patch:
        (fresh / "uncommitted.patch").write_text(patch)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return state


def code_state() -> str:
    """The commit and whether there are uncommitted changes; or the installed version."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        from pipeline.runtime.versions import fovea_version

        return f"fovea {fovea_version()}, installed"
    return f"commit {commit.strip()}" + (
        " with uncommitted changes (code/uncommitted.patch)" if _git("status", "--porcelain") else ""
    )


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
