"""From a config and a cluster profile to a batch script, and to the facts that the job itself reads."""

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

from launch.slurm.profile import ClusterProfile
from pipeline.config.load import fingerprint
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.untrusted import printable

ROOT = Path(__file__).resolve().parents[2]
_TEMPLATE = "train.sbatch"


def template() -> Path:
    """The batch script's template: the checkout's, or the installed one."""
    for folder in (ROOT / "slurm", Path(sys.prefix) / "share" / "fovea" / "slurm"):
        if (folder / _TEMPLATE).is_file():
            return folder / _TEMPLATE
    raise ConfigError("the batch script's template is missing", where=f"slurm/{_TEMPLATE}", hint="install fovea again")


def script(config: Config, profile: ClusterProfile, run: Path, *, command: str, code_state: str) -> str:
    """The batch script.

    Args:
        config: the run's settings.
        profile: the cluster.
        run: the run's directory, absolute.
        command: what the person typed, for the script's head.
        code_state: which code was submitted, for the script's head.
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
        passed_on=",".join(passed_on(profile)) or "NONE",
    )


def sbatch_word(text: str) -> str:
    """A value as ``sbatch`` reads it in a ``#SBATCH`` line: in quotes if it holds blanks, quotes or a ``#``."""
    if not re.search(r"""[\s"'#\\]""", text):
        return text
    return '"' + re.sub(r'(["\\#])', r"\\\1", text) + '"'


def passed_on(profile: ClusterProfile) -> list[str]:
    """Names of this process's variables that the job takes over."""
    return sorted(name for name in os.environ if any(fnmatch.fnmatchcase(name, pattern) for pattern in profile.export_env))


def facts(config: Config, profile: ClusterProfile, run: Path) -> dict[str, Any]:
    """What the attendant has to know, as JSON values: the command of the ranks first of all."""
    return {
        "ranks": profile.world,
        "nodes": profile.nodes,
        "gpus_per_node": profile.gpus_per_node,
        "after": profile.requeue_mode,
        "lead": profile.checkpoint_lead_time,
        "hang": profile.hang_timeout,
        "budgets": profile.budgets.model_dump(),
        "preflight": profile.preflight.model_dump(),
        "host_python": profile.host_python,
        "srun": step(profile, run),
        "links": step(
            profile, run, ["launch.slurm.bandwidth_check", "%LOGS%/links.json", "64" if profile.gpus_per_node else "4"]
        ),
        "fingerprint": fingerprint(config),
        "profile": profile.model_dump(mode="json"),
    }


def step(profile: ClusterProfile, run: Path, module: list[str] | None = None) -> list[str]:
    """``srun`` and what it starts: one task a rank; ``%LOGS%`` stands for the attempt's folder of logs.

    Args:
        profile: the cluster.
        run: the run's directory.
        module: a module of ours and its arguments, instead of the training.
    """
    log = "links-%t.log" if module else "rank-%t.log"
    command = [
        "srun",
        f"--nodes={profile.nodes}",
        f"--ntasks={profile.world}",
        f"--ntasks-per-node={profile.tasks_per_node}",
        f"--cpus-per-task={profile.cpus_per_rank}",
        "--unbuffered",
        "--kill-on-bad-exit=1",  # without it a rank that died leaves the others waiting until the limit
        "--wait=60",  # likewise for one that ended too early
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
            f"--container-env={names}",  # an image's own value would win otherwise
        ]
        python = c.python
    return [*command, python, "-m", *(module or ["launch.cli.main", "train", str(run / "config.yaml")])]


def snapshot(target: Path) -> str:
    """Copies the code that is to run into the run's directory; which code it is, in words.

    Args:
        target: the copy's folder; an older copy is replaced.
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
    """The commit, and whether there is more than that; or the installed version."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        from importlib.metadata import version

        return f"fovea {version('fovea')}, installed"
    return f"commit {commit.strip()}" + (
        " with uncommitted changes (code/uncommitted.patch)" if _git("status", "--porcelain") else ""
    )


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
