"""The library where the packages of the trainer are not installed, and what importing it loads. Its examples are run, too."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helpers.library import make

ROOT = Path(__file__).resolve().parents[2]
LIGHT = {"torch", "numpy", "pydantic", "pillow", "braceexpand", "xxhash", "obstore"}  # as the page says

SCRIPT = """
import importlib.abc, json, sys

BLOCKED = set(sys.argv[3].split(","))


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED or name.startswith(("nvidia.dali", "nvidia.nvimgcodec")):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


sys.meta_path.insert(0, Blocker())
import pipeline.data
heavy = [name for name in ("torch", "numpy", "pydantic") if name in sys.modules]
from pipeline.data import ShardDataset
sources = [{"name": n, "shards": f"{sys.argv[1]}/{n}-*.tar", "weight": 1} for n in "ab"]
dataset = ShardDataset(sources=sources, global_batch_size=4, index=sys.argv[2], decode="rgb8", caption_lines=True)
keys = [one["__key__"] for batch in dataset.loader(collate_fn=list) for one in batch]
dataset.load_state_dict(dataset.state_dict())
print(json.dumps({"heavy": heavy, "keys": len(keys), "torch": "torch.distributed.fsdp" in sys.modules}))
"""


def declared() -> set[str]:
    """Import names of the packages that pyproject.toml names and the page does not."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[>=\[]", entry)[0].lower() for entry in entries}
    special = {"open_clip_torch": "open_clip", "scikit-learn": "sklearn", "nvidia-ml-py": "", "pyyaml": "yaml"}
    named = {special.get(name, name) for name in names - LIGHT if not name.startswith("nvidia-dali")}
    return {name for name in named if name and not name.startswith("nvidia-")}


def test_it_works_without_the_packages_of_the_trainer(tmp_path: Path) -> None:
    blocked = declared()
    assert {"mlflow", "deepspeed", "timm", "open_clip", "webdataset", "accelerate"} <= blocked
    make(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(tmp_path),
            str(tmp_path / "index"),
            ",".join(sorted(blocked | {"transformers", "wandb"})),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FOVEA_WARM": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["heavy"] == []
    assert said["keys"] > 40


def test_the_extra_for_training_is_what_the_light_install_lacks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    light = {entry for entry in project["dependencies"] if re.split(r"[>=\[]", entry)[0] in LIGHT}
    assert len(light) == len(LIGHT)
    assert set(project["optional-dependencies"]["train"]) == set(project["dependencies"]) - light


def test_the_page_names_the_packages_that_it_needs() -> None:
    page = (ROOT / "pipeline" / "data" / "README.md").read_text()
    line = re.search(r"pip install --no-deps fovea && pip install (.*)", page)
    assert line is not None
    assert set(line[1].split()) == LIGHT


@pytest.mark.parametrize("module", ["shard_dataset", "shard_loader", "shard_source", "view_loader"])
def test_examples_in_docstrings(module: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    loaded = importlib.import_module(f"pipeline.data.{module}")
    result = doctest.testmod(loaded, extraglobs={"SHARDS": shards}, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 3
    assert result.failed == 0


def test_unknown_names_of_the_package() -> None:
    import pipeline.data

    assert {"ShardDataset", "ShardLoader", "ShardSource"} <= set(dir(pipeline.data))
    with pytest.raises(AttributeError, match="no attribute 'Dataset'"):
        pipeline.data.Dataset  # noqa: B018
