"""Shared by all tests: where the real data lies, and which tests this machine can run."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.helpers import warm
from tests.helpers.costs import free_memory, longest_first, pytest_runtest_protocol  # noqa: F401  - a hook
from tests.helpers.limits import HANGS, hang_limit
from tests.helpers.shared import made_once

# Four test processes on two cores are slower with four threads each than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell ignores these for what it runs in the background, and what a test starts would inherit that.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# No test writes into the state of the user who runs them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="fovea-tests-state-")

# No example of a property has a time limit: machines may be slow and busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]


# Processes that tests start come from a server that has imported the heavy packages.
sys.executable = warm.prepare() or sys.executable


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    """A fixture that hangs fails its test, instead of the whole run when its time is over."""
    with hang_limit(HANGS):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Likewise a test."""
    with hang_limit(HANGS):
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Keeps variables that packages set when a test imports them from the processes of the next, and large tensors from it."""
    warm.restore_variables()
    free_memory()


def pytest_unconfigure() -> None:
    """Removes what was made for the session, by the process that made it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        warm.remove()


def data_folder() -> Path:
    """Where real shards and pictures lie: FOVEA_TEST_DATA, else ../shared/data beside the checkout."""
    return Path(os.environ.get("FOVEA_TEST_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real shards and pictures."""
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(
            f"no real data in {folder}; set FOVEA_TEST_DATA to the folder that holds cifar10/, photos/, camvid/ and hostile/"
        )
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the rest of matrices to full runs, starts the longest files first, skips what needs a CUDA device without one."""
    if os.environ.get("FOVEA_TESTS") != "full" and (rest := [item for item in items if item.get_closest_marker("full")]):
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=rest)
    if "PYTEST_XDIST_WORKER" in os.environ:
        longest_first(items)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # only if such a test was collected

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of a real S3 server."""
    from tests.helpers.s3 import server

    with server() as port:
        yield port


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a run small enough for a test."""
    from tests.helpers.runs import TOY

    path = tmp_path_factory.mktemp("config") / "toy.yaml"
    path.write_text(TOY)
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards for it."""
    from pipeline.data.pack import synthetic as scenes

    def make(folder: Path) -> None:
        scenes.write(folder, train=120, val=24, size=32, seed=3, samples_per_shard=40)

    return str(made_once(tmp_path_factory, "scenes", make) / "*train-*.tar")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: str, config: Path) -> Path:
    """That run on those shards, to its end; others are compared with it, so nobody may write into it."""
    from tests.helpers.runs import train

    def make(folder: Path) -> None:
        done = train(config, shards, folder / "run")
        assert done.returncode == 0, done.stderr + done.stdout

    return made_once(tmp_path_factory, "undisturbed", make) / "run"
