"""Checks of the nodes before the ranks start: each node (preflight.py), and their connections. Standard library only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.slurm import slurm_commands as tools
from launch.slurm.steps import Step, filled, free_port
from pipeline.errors import LaunchError
from pipeline.runtime import job_record as record

Look = Callable[[], str]


@dataclass(frozen=True)
class NodeProblems:
    """What is wrong with the nodes of a job.

    Attributes:
        bad: nodes at fault, with the reasons.
        everywhere: whether it is all of several nodes: then no single one is at fault.
        full: that the run directory lacks space, if every node says so and nothing else is wrong.
    """

    bad: dict[str, str] = field(default_factory=dict)
    everywhere: bool = False
    full: str = ""


def check_nodes(
    job: int,
    run: Path,
    logs: Path,
    facts: dict[str, Any],
    environment: dict[str, str],
    look: Look,
    placement: Sequence[str] = (),
) -> NodeProblems:
    """Check every node of the job.

    Args:
        job: job ID.
        run: run directory.
        logs: the attempt's log directory.
        facts: as :func:`launch.slurm.render.facts` returns them.
        environment: variables of the batch step.
        look: see :meth:`launch.slurm.steps.Step.wait`.
        placement: options of ``srun`` that name the nodes, if not all of the job are meant.
    """
    settings = facts["preflight"]
    if not settings["enabled"]:
        return NodeProblems()
    folder = logs / "preflight"
    folder.mkdir(parents=True, exist_ok=True)
    options = {**settings, "folder": str(folder), "run": str(run), "gpus": facts["gpus_per_node"]}
    command = [
        *("srun", *placement, "--kill-on-bad-exit=0", f"--ntasks={facts['nodes']}", "--ntasks-per-node=1"),
        *(f"--output={str(folder).replace('%', '%%')}/%N.log", "--overlap"),
        *(facts["host_python"], "-m", "launch.slurm.preflight", json.dumps(options)),
    ]
    began = time.time()
    Step(job, command, environment).wait(look, settings["seconds"] + 30)
    ended = time.time()
    answers = {path.stem: record.read(path) for path in folder.glob("*.json")}
    try:
        expected = tools.nodes(environment.get("SLURM_JOB_NODELIST", ""))
    except LaunchError:
        expected = list(answers)
    bad = {}
    for node in expected:
        if node not in answers:
            bad[node] = f"preflight did not answer in {settings['seconds']:.0f} s"
            continue
        problems = list(answers[node].get("problems", ()))
        away = clock_error(answers[node], began, ended)
        if abs(away) > settings["clock_skew"]:
            problems.append(f"its clock is {away:.0f} s away from the first node's")
            answers[node]["full"] = False
        if problems:
            bad[node] = "; ".join(problems)
    lacking = [answers[node].get("full") for node in expected if node in answers]
    full = f"{run} lacks space" if bad and len(lacking) == len(expected) and all(lacking) else ""
    return NodeProblems(bad, len(bad) == len(expected) > 1, full)


def clock_error(answer: dict[str, Any], began: float, ended: float) -> float:
    """Seconds by which a node's clock is ahead of this one, at the least; 0 if its times lie within those of the check.

    Args:
        answer: ``began`` and ``ended`` by the node's clock.
        began, ended: the check's beginning and end by this node's clock.
    """
    first, last = float(answer.get("began", began)), float(answer.get("ended", ended))
    return max(last - ended, 0.0) if last > ended else min(first - began, 0.0)


def check_links(
    job: int,
    logs: Path,
    attempt: int,
    facts: dict[str, Any],
    environment: dict[str, str],
    look: Look,
    placement: Sequence[str] = (),
) -> str | None:
    """Measure an all-reduce over all ranks; returns what is wrong, or ``None`` where it is fast enough or not measured.

    Args:
        job: job ID.
        logs: the attempt's log directory.
        attempt: the attempt's number.
        facts: as :func:`launch.slurm.render.facts` returns them.
        environment: variables of the batch step.
        look: see :meth:`launch.slurm.steps.Step.wait`.
        placement: options of ``srun`` that name the nodes, if not all of the job are meant.
    """
    settings = facts["preflight"]
    required = float(settings["bandwidth_gbps"])
    if not settings["enabled"] or not required:
        return None
    logs.mkdir(parents=True, exist_ok=True)
    command = [filled(argument, logs) for argument in facts["links"]]
    command[1:1] = placement
    own = {**environment, "MASTER_PORT": str(free_port()), "FOVEA_ATTEMPT": str(attempt)}
    Step(job, command, own).wait(look, settings["seconds"] + 60)
    bandwidth = record.read(logs / "links.json").get("gbps")
    if bandwidth is None:
        return "an all-reduce over all ranks did not end"
    if float(bandwidth) < required:
        return f"an all-reduce over all ranks ran at {float(bandwidth):.3f} GB/s of {required:g} required"
    return None
