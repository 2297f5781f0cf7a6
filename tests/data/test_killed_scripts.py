"""The recipes of the page, run as they stand there, and killed with -9: the weights are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.recipes import recipes, written
from tests.helpers.s3 import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STEPS = 30  # two epochs
STEP = "            optimizer.step()\n"
LOOP = {
    "plain": [(STEP, STEP + "            shown(loader.step)\n")],
    "accelerate": [(STEP, STEP + "            shown(loader.step)\n")],
    "lightning": [
        ("        return cross_entropy", "        shown(self.global_step + 1)\n        return cross_entropy"),
        ("    trainer.fit(Classifier(),", "    classifier = Classifier()\n    trainer.fit(classifier,"),
    ],
}
# Engines of other tests in this process leave some of them behind.
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "ACCELERATE", "TORCHELASTIC", "SLURM_", "PL_", "NODE_RANK")
# A script that is to be killed waits for it: on a busy machine it would otherwise reach its next checkpoint first.
SHOWN = """import os
import signal

left = int(os.environ.get("KILL_AFTER", 0))


def shown(step: int) -> None:
    global left
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(step, flush=True)
    left -= 1
    while left == 0:
        signal.pause()


"""
END = {"plain": "model", "accelerate": "accelerator.unwrap_model(model)", "lightning": "classifier.model"}


def environment(folder: Path, kill_after: int | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    ours = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}
    return {**kept, **ours, "KILL_AFTER": str(kill_after or 0)}


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kills the process and all below it, also those that a launcher put into sessions of their own."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def attempt(script: Path, folder: Path, kill_after: int | None, launcher: tuple[str, ...] = ()) -> list[int]:
    """Runs the script until it has printed so many steps, then kills all its processes with -9; returns the steps."""
    folder.mkdir(exist_ok=True)
    with (folder / "errors.txt").open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(script)],
            cwd=folder,
            env=environment(script.parent, kill_after),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    steps: list[int] = []
    for line in process.stdout:
        if line.strip().isdigit():
            steps.append(int(line))
        if len(steps) == kill_after:
            kill_all(process)
            break
    process.stdout.close()
    code = process.wait()
    assert code == (0 if kill_after is None else -signal.SIGKILL), (folder / "errors.txt").read_text()
    return steps


def script_of(name: str, folder: Path, shards: str) -> Path:
    script = written(name, folder, shards, *LOOP[name])
    script.write_text(SHOWN + script.read_text() + f'    torch.save({END[name]}.state_dict(), "final.pt")\n')
    return script


@pytest.fixture(scope="module")
def weights(shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Those of the plain recipe that was not killed; the others train the same network on the same batches."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert attempt(script_of("plain", folder, shards), folder / "run", None) == list(range(1, STEPS + 1))
    return torch.load(folder / "run" / "final.pt")


@pytest.mark.parametrize("name", ["plain", "accelerate", "lightning"])
def test_a_script_that_is_killed_ends_with_the_weights_of_one_that_was_not(
    name: str, shards: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    script, run = script_of(name, tmp_path, shards), tmp_path / "run"
    assert attempt(script, run, 7) == list(range(1, 8))
    if name == "plain":
        assert attempt(script, run, 12) == list(range(6, 18))  # saved after step 5; dies in the second epoch
    first = 16 if name == "plain" else 6
    assert attempt(script, run, None) == list(range(first, STEPS + 1))
    final = torch.load(run / "final.pt")
    assert final.keys() == weights.keys()
    assert all(torch.equal(final[key], weights[key]) for key in weights)


DEVICES = {1: "", 2: 'accelerator="cpu", devices=2, strategy="ddp", '}


def launched(name: str, ranks: int) -> tuple[str, ...]:
    """What starts a script on several ranks; Lightning starts them itself."""
    if name == "lightning" or ranks == 1:
        return ()
    words = (
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    )
    return (*words, "--num_processes", str(ranks), "--main_process_port", str(free_port()))


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_two_ranks_killed_and_continued_by_two_or_one_train_the_same_network(
    name: str, shards: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Equal to one rank within the rounding of the averaged gradients; a sample read twice or not at all is far beyond that."""
    run, steps = tmp_path / "run", []
    for ranks, kill_after in ((2, 7), (2, 4), (1, None)):
        script = script_of(name, tmp_path, shards)
        script.write_text(script.read_text().replace("lightning.Trainer(", f"lightning.Trainer({DEVICES[ranks]}"))
        steps.append(attempt(script, run, kill_after, launched(name, ranks)))
    assert steps == [list(range(1, 8)), list(range(6, 10)), list(range(6, STEPS + 1))]
    final = torch.load(run / "final.pt")
    assert all(torch.allclose(final[key], weights[key], atol=1e-5) for key in weights)


@pytest.mark.parametrize("name", ["webdataset", "random access"])
def test_a_recipe_runs_as_it_stands_on_the_page(name: str, shards: str, tmp_path: Path) -> None:
    script = written(name, tmp_path, shards)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_recipe_of_the_page_is_run() -> None:
    assert set(recipes()) == {*LOOP, "webdataset", "random access"}
