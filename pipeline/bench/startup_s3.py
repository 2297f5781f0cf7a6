"""What the start of a run asks of an S3 server: requests and bytes, counted by a proxy before a real server (moto)."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pipeline.bench.probes import run_probe
from pipeline.bench.startup_runs import settings, write_shards
from pipeline.errors import ConfigError
from pipeline.runtime.interpreter import ROOT

_WHERE, _BUCKET = "bench startup", "startup"


@dataclass(frozen=True)
class Counts:
    """What one start asked for.

    Attributes:
        shards, ranks: sizes.
        start: which one.
        heads, gets, lists, puts: requests.
        read: bytes of shards in their answers.
        held: bytes of all shards.
        steps: steps of the start.
    """

    shards: int
    ranks: int
    start: str
    heads: int
    gets: int
    lists: int
    puts: int
    read: int
    held: int
    steps: int


def measure(sizes: Sequence[int], *, limit: float, log: Callable[[str], None]) -> tuple[list[Counts], str]:
    """Start runs on shards in a bucket: without an index, with it, and from a checkpoint; on 2 ranks, and the largest set on 4.

    Returns:
        The counts; why there are none.

    Raises:
        ConfigError: a start failed or did not end in time.
    """
    from pipeline.bench.chaos.site import helper

    if find_spec("moto") is None:
        return [], "moto is not installed (pip install -e '.[test]')"
    try:
        s3, warm = helper("s3"), helper("warm")
    except ConfigError:
        return [], "the tests of fovea, which start the server, are not here: it needs a checkout"
    counts: list[Counts] = []
    python, own = sys.executable, "FOVEA_WARM_PYTHON" not in os.environ
    sys.executable = warm.prepare() or python  # times are not measured here
    try:
        with tempfile.TemporaryDirectory(prefix="fovea-startup-s3-") as name, s3.server() as port:
            for shards in sizes:
                for ranks in (2, 4) if shards == max(sizes) else (2,):
                    folder = Path(name) / f"{shards}-{ranks}"
                    folder.mkdir()
                    counts += _starts(s3, port, folder, shards, ranks, limit, log)
    finally:
        sys.executable = python
        if own:
            warm.remove()
    return counts, ""


def _starts(s3: Any, port: int, folder: Path, shards: int, ranks: int, limit: float, log: Callable[[str], None]) -> list[Counts]:
    files = sorted(write_shards(folder, shards).glob("*.tar"))
    s3.upload(port, _BUCKET, {f"{folder.name}/{path.name}": path for path in files})
    held = sum(path.stat().st_size for path in files)
    counts = []
    with s3.proxy(port) as proxy:
        for start, run, pause in (
            ("first, without an index", "a", True),
            ("second, on another node, with the index", "b", True),
            ("resume", "b", False),
        ):
            proxy.seen, proxy.sent = Counter(), Counter()
            if start != "resume":
                shutil.rmtree(folder / "cache", ignore_errors=True)
            _train(folder, run, pause, shards, ranks, {**s3.KEYS, "AWS_ENDPOINT_URL": proxy.endpoint}, limit)
            total = {method: proxy.total(method) for method in ("HEAD", "GET", "PUT")}
            lists = sum(n for name, n in proxy.seen.items() if name.rstrip("/") == f"GET /{_BUCKET}")
            read = sum(n for name, n in proxy.sent.items() if name.startswith("GET ") and name.endswith(".tar"))
            one = Counts(shards, ranks, start, total["HEAD"], total["GET"] - lists, lists, total["PUT"], read, held, 2)
            counts.append(one)
            log(f"S3: {shards} shards, {ranks} ranks, {start}: {one}")
    return counts


def _train(folder: Path, run: str, pause: bool, shards: int, ranks: int, variables: dict[str, str], limit: float) -> None:
    document = settings(ROOT, f"s3://{_BUCKET}/{folder.name}/train-*.tar", ranks, folder / "index", folder / run)
    document["train"] |= {"duration": "4 steps", **({"pause_at": "2 steps"} if pause else {})}
    document["data"]["storage"] = {"cache": str(folder / "cache"), "free_gb": 0.0}  # on any disk
    config = folder / "startup.yaml"
    config.write_text(yaml.safe_dump(document))
    command = [sys.executable, "-P", "-m", "launch.cli", "train", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **variables}
    what = f"the start with {shards} shards in a bucket on {ranks} ranks"
    done = run_probe(command, environment, limit=limit, what=what, where=_WHERE, cwd=folder)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"{what} failed ({last})", where=_WHERE, hint="See the message")


def markdown(counts: Sequence[Counts], reason: str) -> list[str]:
    """The lines of the page."""
    lines = ["## Requests to S3", ""]
    if not counts:
        return [*lines, f"Not counted: {reason}.", ""] if reason else []
    lines += [
        "One node, two steps of 16 samples a start, 24 samples a shard, shards cached on the node's disk. *Read* is what the "
        "server sent of shards, relative to the bytes of all shards. A resume keeps its node's cache. A shard that is not there "
        "yet is read by range, sample by sample, so that the number of GETs depends on how soon downloads end.",
        "",
        "| shards | ranks | start | HEAD | GET | LIST | PUT | read | relative |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in counts:
        requests = f"{one.heads} | {one.gets} | {one.lists} | {one.puts}"
        amount = f"{one.read / 1e6:.2f} MB | {one.read / one.held:.2f} x"
        lines.append(f"| {one.shards} | {one.ranks} | {one.start} | {requests} | {amount} |")
    return [*lines, ""]
