"""Shared by all tests: where the real data lies, and which tests this machine can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Four test processes on two cores are slower with four threads each than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a CUDA device where there is none; torch is imported only if such a test was collected."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of a real S3 server."""
    from tests.s3 import server

    with server() as port:
        yield port
