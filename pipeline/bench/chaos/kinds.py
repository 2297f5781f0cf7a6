"""Kinds of fault, by name: how the run is set up, what is done to it, and what its user does when it does not go on by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from pipeline.bench.chaos.runs import Run
from pipeline.bench.chaos.site import Site

SAME = "the same command again"


@dataclass
class Case:
    """One fault and its run.

    Attributes:
        site: servers and shards.
        folder: files of this run alone.
        rng: random numbers of all choices.
        stack: what is undone when the run has ended.
        overrides: settings of the run.
        shards: pattern of its shards; empty for those on disk.
        directory: run directory, if it is not in the folder.
        environment: variables of the run.
        proxy, bucket: proxy before the S3 server, and the run's bucket.
        repair: what the user does before typing the command again, for example making space; then ``action`` names it.
        action: in words.
        happened: what the fault did in fact, asked when the run has ended, in place of what was planned; empty for nothing.
        finish: what remains to be done after the run's end; returns what the user did, or an empty text.
    """

    site: Site
    folder: Path
    rng: Random
    stack: contextlib.ExitStack
    overrides: list[str] = field(default_factory=list)
    shards: str = ""
    directory: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    proxy: Any = None
    bucket: str = ""
    repair: Callable[[], None] | None = None
    action: str = ""
    happened: Callable[[], str] | None = None
    finish: Callable[[Run], str] | None = None


Prepare = Callable[[Case], None]
Inject = Callable[[Case, Run], str]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: its name on the command line.
        title: what happens, for the page.
        inject: does it, and returns what exactly it did; empty if it could not.
        prepare: completes the case before the run starts.
        slurm: whether the run is a job.
        steps: length of the run.
        first, margin: it is injected after this many steps at the earliest, and this many before the end at the latest.
        missing: why it cannot be injected on this machine; empty if it can.
    """

    name: str
    title: str
    inject: Inject
    prepare: Prepare = lambda case: None
    slurm: bool = False
    steps: int = 32
    first: int = 1
    margin: int = 3
    missing: Callable[[Site], str] = lambda site: ""
