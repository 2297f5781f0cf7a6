"""Compares the data path with that of an earlier checkout: CPU time per image in the same run, and the pixels, bit for bit."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from pipeline.bench import data
from pipeline.errors import ConfigError
from pipeline.runtime.interpreter import ROOT

_HUES = ("off", "hsv")


@dataclass
class Result:
    """What both versions cost and made.

    Attributes:
        about: description of images and settings.
        milliseconds: CPU milliseconds per image of ``now`` and ``before``, one of each round, by hue.
        equal: whether the pixels of all views are the same, bit for bit, by hue.
    """

    about: dict[str, str]
    milliseconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    equal: dict[str, bool] = field(default_factory=dict)

    def ratio(self, hue: str) -> tuple[float, float]:
        """Time now relative to before: the mean of the rounds' ratios, and half of its 95 % interval (normal)."""
        both = self.milliseconds[hue]
        ratios = [now / before for now, before in zip(both["now"], both["before"], strict=True)]
        spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        return statistics.mean(ratios), 1.96 * spread / math.sqrt(len(ratios))


def measure(options: data.Options, before: Path, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Run both versions in turns.

    Args:
        options: as for :func:`pipeline.bench.data.measure`.
        before: checkout of the earlier version.
        log: called with a description of each stage.

    Raises:
        ConfigError: the folder is no checkout, or its version does not run.
    """
    if not (before / "pipeline" / "__init__.py").is_file():
        raise ConfigError("is not a checkout of fovea", where=str(before), hint="Give a folder made by `git worktree add`")
    steps = max(options.images // options.batch, 1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fovea-bench-")))
        manifest, about = data.prepare(options, folder)
        shards = [shard.url for shard in manifest.shards]
        rows = {"batch": str(options.batch), "images of a round": str(steps * options.batch), "rounds": str(options.rounds)}
        result = Result({"before": _commit(before), "images packed": about, **rows})
        for hue in _HUES:
            settings = {"shards": shards, "batch": options.batch, "steps": steps, "hue": hue}
            versions = {
                name: stack.enter_context(_Version(root, {**settings, "folder": str(folder / f"{name}-{hue}")}))
                for name, root in (("now", ROOT), ("before", before))
            }
            pixels = {name: version.ask("pixels") for name, version in versions.items()}
            result.equal[hue] = pixels["now"] == pixels["before"]
            costs: dict[str, list[float]] = {name: [] for name in versions}
            for number in range(options.rounds):
                log(f"hue {hue}, round {number + 1} of {options.rounds}")
                for name in sorted(versions, reverse=number % 2 == 1):
                    costs[name].append(1000 * float(versions[name].ask("seconds")) / (steps * options.batch))
            result.milliseconds[hue] = costs
        return result


def _commit(root: Path) -> str:
    """The commit of a checkout, as far as git knows it."""
    answer = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return f"commit {answer.stdout.strip()}" if answer.returncode == 0 else "no commit"


class _Version:
    """A process that runs the data path of a checkout."""

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self._root = root
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("data_probe.py")), json.dumps(settings)],
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> _Version:
        return self

    def __exit__(self, *_: object) -> None:
        cast(IO[str], self._process.stdin).close()
        self._process.wait()

    def ask(self, what: str) -> Any:
        """One answer of it."""
        stdin, stdout = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        try:
            print(what, file=stdin, flush=True)
            return json.loads(stdout.readline())
        except (OSError, ValueError) as error:
            raise ConfigError(
                "its data path cannot be measured; its messages are above",
                where=str(self._root),
                hint="Choose a version whose pipeline/bench/data.py is like this one",
            ) from error


def markdown(result: Result, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    lines = ["# The data path beside an earlier version", "", f"`{command}`", ""]
    lines += [f"- {name}: {value}" for name, value in {**machine, **result.about}.items()]
    lines += [
        "",
        "Views of DINOv2 (2 of 224 and 8 of 96 pixels) of 8-bit RGB images; the versions take turns, each in its own process.",
        "",
        "| hue | CPU ms per image, before | now | now / before | pixels |",
        "|---|---:|---:|---:|---|",
    ]
    for hue, both in result.milliseconds.items():
        mean, half = result.ratio(hue)
        medians = " | ".join(f"{statistics.median(both[name]):.2f}" for name in ("before", "now"))
        pixels = "equal, bit for bit" if result.equal[hue] else "NOT EQUAL"
        lines.append(f"| {hue} | {medians} | {mean:.3f} ± {half:.3f} | {pixels} |")
    return (
        "\n".join([*lines, "", "Medians of the rounds; the ratio is the mean of the rounds' ratios with its 95 % interval."])
        + "\n"
    )
