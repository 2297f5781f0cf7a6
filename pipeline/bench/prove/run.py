"""Compares a run that was killed with SIGKILL and resumed with an undisturbed one, bit for bit."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.bench.prove.stage import Check, Setup
from pipeline.data.pack import synthetic
from pipeline.runtime.interpreter import alone_environment, module_command

_TOY = """
run: {{name: prove, seed: 1}}
method:
  name: dinov2
  views: {{global_size: {size}, local_count: 2, local_size: {local}}}
  prototypes: 256
  head_hidden: 64
  head_bottleneck: 32
model: {{embed_dim: {width}, depth: {depth}, num_heads: 2, patch_size: 8, drop_path: 0.1}}
data: {{num_workers: 0, canonical_streams: 4, shuffle_block_size: 64}}
schedule: {{lr: {{peak: 1.0e-3, warmup: 4 steps}}}}
train:
  {{global_batch_size: {batch}, duration: {steps} steps, record_batches: true, log_every: 1, deterministic: true}}
checkpoint: {{every: {every} steps}}
evaluation: {{knn: {{enabled: false}}}}
tracking: {{enabled: false}}
launch: {{num_processes: 1}}
"""
_LIMIT = 900.0  # seconds until a run that should reach its kill is given up


def checks(setup: Setup) -> Iterator[Check]:
    """An undisturbed run and a killed and resumed one: crops, losses and weights."""
    steps = 12 if setup.toy else 30
    sizes = {"size": 32, "local": 16, "width": 32, "depth": 1, "batch": 16} if setup.toy else {}
    config = setup.folder / "prove.yaml"
    sizes = sizes or {"size": 224, "local": 96, "width": 384, "depth": 12, "batch": 32}
    config.write_text(_TOY.format(steps=steps, every=steps // 3, **sizes))
    synthetic.write(
        setup.folder / "data", train=sizes["batch"] * 8, val=8, size=max(sizes["size"], 64), seed=2, samples_per_shard=32
    )
    undisturbed, killed = setup.folder / "whole", setup.folder / "killed"
    began = time.perf_counter()
    done = _start(config, undisturbed, setup).wait()
    yield Check("an undisturbed run", f"code {done}, {time.perf_counter() - began:.0f} s", "code 0", done == 0)
    process = _start(config, killed, setup)
    reached = _reach(process, killed, 2 * steps // 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    yield Check(f"killed after step {2 * steps // 3}", "killed" if reached else "did not get there", "killed", reached)
    done = _start(config, killed, setup).wait()
    yield Check("the same command again", f"code {done}", "code 0", done == 0)
    ours, theirs = _recorded(killed), _recorded(undisturbed)
    differing = [step for step in theirs if ours.get(step) != theirs[step]]
    message = "the same" if not differing else f"the first that differs is {differing[0]}"
    yield Check(f"crops and losses of {len(theirs)} steps", message, "the same", not differing and len(theirs) == steps)
    same = (ours_at_end := _weights(killed, steps)) == _weights(undisturbed, steps) and bool(ours_at_end)
    yield Check("weights, moments and teacher at the end", "the same bits" if same else "others", "the same bits", same)


def _start(config: Path, directory: Path, setup: Setup) -> subprocess.Popen[bytes]:
    arguments = ["train", str(config), f"run.directory={json.dumps(str(directory))}"]
    arguments += [f"data.shards={json.dumps(str(setup.folder / 'data' / '*train-*.tar'))}"]
    environment = alone_environment() | ({"CUDA_VISIBLE_DEVICES": ""} if setup.device == "cpu" else {})
    with (setup.folder / f"{directory.name}.log").open("ab") as log:
        return subprocess.Popen(
            module_command("launch.cli.main", *arguments), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def _reach(process: subprocess.Popen[bytes], directory: Path, step: int) -> bool:
    end = time.monotonic() + _LIMIT
    while process.poll() is None and time.monotonic() < end:
        if len(_recorded(directory)) > step:
            return True
        time.sleep(0.02)
    return False


def _recorded(directory: Path) -> dict[int, dict[str, object]]:
    """Each step's recorded samples, pixel digest and loss terms."""
    steps: dict[int, dict[str, object]] = {}
    for path in sorted((directory / "batches").glob("attempt-*-rank-0.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut by the kill
                continue
            steps[int(row["step"])] = row
    return steps


def _weights(directory: Path, step: int) -> dict[str, str]:
    folder = directory / "checkpoints" / f"step_{step:09d}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}
