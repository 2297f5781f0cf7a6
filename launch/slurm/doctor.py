"""Diagnoses the host, its GPUs, Slurm and a cluster profile, with advice."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from launch.slurm import account_limits, limits, site
from launch.slurm import slurm_commands as tools
from launch.slurm.compare_profile import Finding, bad_fields, compare
from launch.slurm.profile import ClusterProfile, load
from pipeline.errors import LaunchError
from pipeline.runtime.gpus import shown, visible


def examine(cluster: str | None) -> Iterator[Finding]:
    """Findings about Python, GPUs, Slurm and a cluster profile.

    Args:
        cluster: a profile to compare with Slurm's configuration, or ``None``.
    """
    yield "ok", f"Python {sys.version.split()[0]} at {sys.executable}", ""
    for package in ("torch", "deepspeed", "nvidia.dali", "mlflow", "timm"):
        installed = _there(package)
        yield (
            ("ok" if installed else "bad"),
            f"{package} is {'there' if installed else 'missing'}",
            "" if installed else "install fovea again",
        )
    yield from _gpus()
    if shutil.which("sbatch") is None:
        yield "note", "no Slurm on this machine", "fovea train works here; fovea submit needs a login node"
        return
    try:
        settings = tools.settings()
    except LaunchError as error:
        yield "bad", f"the Slurm controller does not answer ({error})", ""
        return
    yield from _slurm(settings)
    if cluster is not None:
        profile = load(cluster)
        grace = _seconds(settings.get("KillWait", "30"))
        if grace < 30:
            yield (
                "note",
                f"jobs have {grace:.0f} s to end after SIGTERM (KillWait)",
                "steps that are not saved by then are repeated",
            )
        findings: list[Finding] = []
        try:
            findings += compare(profile, site.ask())
        except LaunchError as error:
            findings.append(("bad", error.what, error.hint))
        yield from findings
        yield from _limits(profile, membership=not bad_fields(findings) & {"account", "qos"})
        if profile.container and not _pyxis():
            yield (
                "bad",
                "the profile names a container and srun has no --container-image",
                "install pyxis, or leave container out",
            )


def _limits(profile: ClusterProfile, *, membership: bool) -> Iterator[Finding]:
    """Whether the profile's job could run in its partition, and, if wanted, whether account and QOS are the user's."""
    try:
        available = limits.partition(profile.partition)
        refused, note = account_limits.check(profile, available, membership=membership)
    except LaunchError:
        return
    reasons = limits.never_runs(profile, available) if available is not None else []
    for reason in [*reasons, *refused]:
        yield "bad", f"the job can never run: {reason}", str(available or "")
    if note:
        yield "note", note, "ask for a higher limit, or set requeue_mode: requeue"
    if available is not None and not reasons:
        yield "ok", f"the profile fits {available}", ""


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _gpus() -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        yield "note", "no NVIDIA driver on this machine", "a login node has none either; ranks would train on the CPU here"
        return
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU")]
    yield ("ok" if lines else "bad"), f"{len(lines)} GPUs: {lines[0] if lines else done.stderr.strip()}", ""
    if lines and (count := visible(len(lines), os.environ.get("CUDA_VISIBLE_DEVICES"))) < len(lines):
        yield "note", f"{count} of them are visible to programs{shown()}", "fovea train starts a rank on each visible one"


def _slurm(settings: dict[str, str]) -> Iterator[Finding]:
    yield "ok", f"Slurm {settings.get('SLURM_VERSION', '?')}, cluster {settings.get('ClusterName', '?')}", ""
    requeues = settings.get("JobRequeue") == "1"
    yield (
        "ok" if requeues else "note",
        f"jobs may be requeued: {'yes' if requeues else 'not by default'} (JobRequeue={settings.get('JobRequeue')})",
        "" if requeues else "fovea requests it for each job with --requeue",
    )
    mode = settings.get("PreemptMode", "OFF")
    yield "ok", f"preemption: {mode} by {settings.get('PreemptType', 'nothing')}", ""
    user = "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
    if mode not in ("OFF", "(null)"):
        advice = "" if user else "without it the batch script receives SIGTERM at the start or the end of GraceTime"
        yield ("ok" if user else "note"), f"preemption signals the batch script beforehand: {'yes' if user else 'no'}", advice
    yield "ok", f"KillWait {settings.get('KillWait')}, SlurmdTimeout {settings.get('SlurmdTimeout')}", ""
    accounts = settings.get("AccountingStorageType", "") if tools.keeps_accounts(settings) else "none"
    yield ("ok" if accounts != "none" else "note"), f"accounting: {accounts}", ""
    yield ("ok" if _pyxis() else "note"), f"containers by pyxis: {'yes' if _pyxis() else 'no'}", ""


def _pyxis() -> bool:
    try:
        return "--container-image" in tools.call("srun", "--help")
    except LaunchError:
        return False


def _seconds(text: str) -> float:
    number = text.split()[0]
    return float(number) if number.replace(".", "").isdigit() else 0.0
