"""A simulated job of many ranks: start, steps, checkpoint, and resume on another number of ranks; what each rank sends and opens.

Each start runs in a process of its own, :mod:`pipeline.bench.large_job_probe`. The number of messages and bytes carries over to
a cluster; times are those of this host, which has far fewer cores than ranks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.bench.probes import run_probe
from pipeline.errors import ConfigError
from pipeline.runtime.interpreter import ROOT

LOCAL = 8
"""Ranks of a simulated node."""
_PROBE = Path(__file__).with_name("large_job_probe.py")
_LIMIT = 3600.0  # seconds for one start
_SHARD = 256  # samples
_COLUMNS = ("sent", "received", "messages_in", "messages_out", "opened")


@dataclass(frozen=True)
class Options:
    """Sizes of the jobs.

    Attributes:
        worlds: numbers of ranks; each job resumes on three quarters of them.
        mesh: numbers of ranks of starts in which gloo connects each rank with each, for comparison.
        steps: steps of each start.
        batch: global batch size, divisible by all numbers of ranks.
        shards: training shards of 256 samples.
    """

    worlds: tuple[int, ...] = (64, 128, 256, 512)
    mesh: tuple[int, ...] = (64, 128)
    steps: int = 10
    batch: int = 1536
    shards: int = 16

    @classmethod
    def smoke(cls) -> Options:
        """Sizes of a test."""
        return cls((8,), (8,), 2, 24, 2)


@dataclass(frozen=True)
class Start:
    """One start of a job.

    Attributes:
        folder: of data, index, run and results.
        world: number of ranks.
        steps: steps to run.
        batch: global batch size.
        port: where rank 0 listens.
        resume: step to resume from; 0 for a new run.
        mesh: gloo connects each rank with each.
    """

    folder: str
    world: int
    steps: int
    batch: int
    port: int
    resume: int = 0
    mesh: bool = False


@dataclass(frozen=True)
class Started:
    """What a start cost.

    Attributes:
        world: number of ranks.
        resumed: whether it was a resume.
        phases: costs by phase of the first rank, the largest of the others, and the sum.
        right: whether the ranks' samples make the global batches of the order.
        wrong: elements of weights and moments that differ from what was saved.
        quarantine, seen: bad samples and samples in the checkpoint; -1 if ranks have different ones.
        streams: number of streams of the order.
        mesh: gloo connected each rank with each.
    """

    world: int
    resumed: bool
    phases: dict[str, dict[str, dict[str, float]]]
    right: bool
    wrong: int
    quarantine: int
    seen: int
    streams: int
    mesh: bool = False


@dataclass
class Result:
    """Starts and resumes of all jobs."""

    starts: list[Started] = field(default_factory=list)


def measure(options: Options, *, log: Callable[[str], None]) -> Result:
    """Run all jobs.

    Args:
        options: the sizes.
        log: called with a line after each start.

    Raises:
        ConfigError: a start failed, or did not end in time.
    """
    from pipeline.data.pack import synthetic

    result = Result()
    jobs = [(world, True) for world in options.mesh] + [(world, False) for world in options.worlds]
    for world, mesh in jobs:
        with tempfile.TemporaryDirectory(prefix="fovea-large-job-") as folder:
            synthetic.write(f"{folder}/data", train=options.shards * _SHARD, val=16, size=16, seed=0, samples_per_shard=_SHARD)
            for ranks, done in ((world, 0),) if mesh else ((world, 0), (world * 3 // 4, options.steps)):
                start = Start(folder, ranks, options.steps, options.batch, _free_port(), done, mesh)
                one = Started(world=ranks, resumed=bool(done), mesh=mesh, **_probe(start))
                result.starts.append(one)
                log(f"{'resumed' if done else 'started'} on {ranks} ranks{', each with each' if mesh else ''}: {_line(one)}")
    return result


def _line(one: Started) -> str:
    sent = sum(phase["first"]["sent"] for phase in one.phases.values())
    other = max(sum(phase["others"]["sent"] for phase in one.phases.values()), 1)
    return f"rank 0 sent {sent / 1e6:.2f} MB, no other rank more than {other / 1e6:.2f} MB"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _probe(start: Start, limit: float = _LIMIT) -> dict[str, Any]:
    lazy = "0" if start.mesh else "1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["TORCH_GLOO_LAZY_INIT"] = lazy  # otherwise small jobs would be connected in another way than large ones
    argv = [sys.executable, "-P", str(_PROBE), json.dumps(asdict(start))]
    what, where = f"the start on {start.world} ranks", "bench large-job"
    done = run_probe(argv, environment, limit=limit, what=what, where=where)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"{what} failed ({last})", where=where, hint="See the message")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def markdown(result: Result, options: Options, machine: Mapping[str, str], command: str) -> str:
    """Render the page: for each phase, what the first rank and the busiest other one send, receive and open."""
    from pipeline.bench.scale import exponent

    lines = ["# A job of many ranks", "", f"`{command}`", ""]
    lines += [*(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += [
        f"Ranks are forks on this host without a model, {LOCAL} to a simulated node: the real rendezvous, index, order, reads of "
        f"encoded samples, collectives of a step, checkpoint and resume over gloo. Global batch {options.batch}, {options.steps} "
        "steps a start. Bytes and messages (segments with data) of all TCP connections of a rank, the store's included; *opened* "
        "are files in the run's folder. The exponent is that of bytes sent in the number of ranks.",
        "",
    ]
    titles = {
        (False, False): "Start",
        (True, False): "Resume on three quarters of the ranks",
        (False, True): "Start where gloo connects each rank with each",
    }
    for kind, title in titles.items():
        starts = [one for one in result.starts if (one.resumed, one.mesh) == kind]
        for phase in ("rendezvous",) if kind[1] and starts else starts[0].phases if starts else ():
            lines += [f"## {title}: {phase}", ""]
            lines += [
                "| ranks | rank 0 sends | receives | messages in | out | opened | any other sends | receives | messages in | out "
                "| opened |",
                f"|{'---:|' * 11}",
            ]
            for one in starts:
                cells = [_cell(one.phases[phase][who], column) for who in ("first", "others") for column in _COLUMNS]
                lines.append(f"| {one.world} | {' | '.join(cells)} |")
            if len(starts) > 1:
                growth = [exponent({one.world: one.phases[phase][who]["sent"] for one in starts}) for who in ("first", "others")]
                lines.append(f"| exponent | {growth[0]:.2f} | | | | | {growth[1]:.2f} | | | | |")
            lines.append("")
    lines += ["## What came out", "", "| start | batches of the order | elements that differ | bad samples | samples |"]
    lines.append("|---|---|---:|---:|---:|")
    for one in result.starts:
        name = f"{'resumed' if one.resumed else 'started'} on {one.world}{', each with each' if one.mesh else ''}"
        same = "equal" if one.right else "different"
        lines.append(f"| {name} | {same} | {one.wrong} | {one.quarantine} | {one.seen} |")
    return "\n".join([*lines, ""])


def _cell(costs: Mapping[str, float], column: str) -> str:
    value = costs[column]
    if column in ("sent", "received"):
        return f"{value / 1e6:,.2f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"
    return f"{value:,.0f}"
