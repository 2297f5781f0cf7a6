"""What adding to fovea takes: an augmentation edits three files, a method adds three, and nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.pack import synthetic
from tests.helpers.runs import ROOT

pytestmark = pytest.mark.slow

PACKAGES = ("pipeline", "launch", "configs")


def copy_packages(folder: Path) -> Path:
    """A copy of everything that an extension may touch; with the times of the files, so that what is compiled stays valid."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.pyc.*"))
    return folder


def touched(folder: Path) -> set[str]:
    """Files of the copy that the repository has not or has otherwise, and those that only the repository has."""

    def contents(root: Path) -> dict[str, bytes]:
        files = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
        return {str(path.relative_to(root)): path.read_bytes() for path in files if "__pycache__" not in path.parts}

    ours, theirs = contents(ROOT), contents(folder)
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def python(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the packages of ``root``."""
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done


def insert(path: Path, before: str, text: str) -> None:
    """Inserts text before the only occurrence of a line's beginning."""
    source = path.read_text()
    assert source.count(f"\n{before}") == 1, f"{path.name} has no single line {before!r}"
    path.write_text(source.replace(f"\n{before}", f"\n{text}{before}"))


# ---- an augmentation ------------------------------------------------------------------------------------------------------

AUGMENTATION = {
    "settings.py": {
        "    normalize: Literal": """\
    posterize_probability: Probability = Field(default=0.0, description="probability of posterization")
    posterize_bits: int = Field(default=2, ge=1, le=8, description="bits of each channel that posterization keeps")
"""
    },
    "operators.py": {
        "    solarize_probability: float": "    posterize_probability: float = 0.0\n    posterize_bits: int = 2\n",
        '    Operator(\n        "solarize",': """\
    Operator(
        "posterize",
        range(10, 11),
        lambda draws, a: {"posterize": draws[0] < a.posterize_probability},
        condition="posterize",
        used=lambda a: a.posterize_probability > 0,
        constants=("posterize_bits",),
    ),
""",
    },
    "dali.py": {
        "def _solarize(": """\
def _posterize(inputs: _Inputs, *, posterize_bits: int) -> Change:
    def posterized(x: Any) -> Any:
        values = [v >> 8 - posterize_bits << 8 - posterize_bits for v in range(256)]
        return fn.lookup_table(x, keys=list(range(256)), values=values, dtype=types.UINT8)

    return inputs.array("posterize", types.BOOL), posterized


""",
    },
}

COMPUTE = """
import json, sys
from pathlib import Path
import numpy as np
import pipeline
from pipeline.data.augment.dali import Augmenter
from pipeline.data.augment.plan import make_plan
from pipeline.data.augment.settings import AugmentSettings, MultiCropSettings
from pipeline.methods.shared.crops import multi_crop

assert Path(pipeline.__file__).parents[1] == Path.cwd()
N = 24
images = list(np.random.default_rng(0).integers(0, 256, (N, 40, 40, 3), dtype=np.uint8))
sizes = np.full((N, 2), 40)
for name, settings in json.loads(sys.argv[1]).items():
    specs = multi_crop(MultiCropSettings(global_size=32, local_count=1, local_size=16), AugmentSettings(**settings))
    plan = make_plan(specs, ids=np.arange(N, dtype=np.uint64), epochs=np.zeros(N, dtype=np.int64), sizes=sizes, seed=5)
    views = [view for group in Augmenter(specs, batch_size=N).run(images, plan).values() for view in group]
    arrays = {f"pixels {number}": view.numpy() for number, view in enumerate(views)}
    arrays |= {f"plan {number} {name}": array for number, view in enumerate(plan) for name, array in view.arrays.items()}
    np.savez(Path(sys.argv[2]) / f"{name}.npz", **arrays)
"""
QUIET = {"jitter_probability": 0, "gray_probability": 0, "blur_probability": 0, "local_blur_probability": 0}
QUIET |= {"solarize_probability": 0, "normalize": "none"}


def computed(root: Path, out: Path, settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Plan arrays and pixels of two global views and a local one, for each settings of ``method.augment``."""
    out.mkdir()
    python(root, "-c", COMPUTE, json.dumps(settings), str(out))
    return {name: dict(np.load(out / f"{name}.npz")) for name in settings}


def test_an_augmentation_edits_three_files_and_leaves_all_existing_draws_as_they_were(tmp_path: Path) -> None:
    root = copy_packages(tmp_path / "root")
    for name, insertions in AUGMENTATION.items():
        for before, text in insertions.items():
            insert(root / "pipeline/data/augment" / name, before, text)
    path = root / "pipeline/data/augment/dali.py"
    path.write_text(path.read_text().replace('"solarize": _solarize}', '"posterize": _posterize, "solarize": _solarize}'))
    assert touched(root) == {f"pipeline/data/augment/{name}" for name in ("settings.py", "operators.py", "dali.py")}

    before = computed(ROOT, tmp_path / "before", {"full": {}, "quiet": QUIET})
    half = {"posterize_probability": 0.5}
    settings = {"full": {}, "full_half": half, "quiet": QUIET, "quiet_half": {**QUIET, **half, "posterize_bits": 3}}
    after = computed(root, tmp_path / "after", settings)
    for name, arrays in after.items():
        original = before[name.removesuffix("_half")]
        for key, array in original.items():
            if key.startswith("plan") or not name.endswith("_half"):
                assert np.array_equal(array, arrays[key]), (name, key)
        for view in range(3):
            on = arrays[f"plan {view} posterize"]
            if not name.endswith("_half"):
                assert not on.any()
                continue
            assert 0 < on.sum() < len(on)
            changed = (arrays[f"pixels {view}"] != original[f"pixels {view}"]).any(axis=(1, 2, 3))
            assert np.array_equal(changed, on), (name, view)
    for view in range(3):
        on = after["quiet_half"][f"plan {view} posterize"]
        levels = np.rint(255 * before["quiet"][f"pixels {view}"][on]).astype(int)
        posterized = np.rint(255 * after["quiet_half"][f"pixels {view}"][on]).astype(int)
        assert np.array_equal(posterized, levels & 0b11100000)


# ---- a method -------------------------------------------------------------------------------------------------------------

METHOD = {
    "pipeline/methods/siamese/settings.py": '''\
"""Settings of the siamese method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count
from pipeline.methods.settings import MethodSettings, register


@register("siamese")
class SiameseSettings(MethodSettings):
    """Two views and a predictor, without a teacher (arXiv 2011.10566)."""

    name: Literal["siamese"] = Field(default="siamese", description="the method")
    hidden: Count = Field(default=64, description="hidden width of the predictor")
''',
    "pipeline/methods/siamese/method.py": '''\
"""Each of two views predicts the other one's features, which get no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.data.augment.settings import GLOBAL_VIEWS
from pipeline.data.augment.views import Batch, ViewSpec
from pipeline.methods.base import Method, Step
from pipeline.methods.shared.crops import NORMALIZE, global_augments
from pipeline.methods.siamese.settings import SiameseSettings
from pipeline.models.groups import ParameterGroup, parameter_groups
from pipeline.models.mlps import mlp
from pipeline.models.vision import VisionTower, build_tower


class Siamese(Method):
    """See the module."""

    def __init__(self, backbone: VisionTower, settings: SiameseSettings) -> None:
        super().__init__()
        v, a = settings.views, settings.augment
        normalize = NORMALIZE[a.normalize]
        augments = global_augments(a)
        self.views = (ViewSpec("global", GLOBAL_VIEWS, v.global_size, v.global_scale, augments, normalize=normalize),)
        self.backbone = backbone
        self.predictor = mlp((backbone.width, settings.hidden, backbone.width), norm="none")

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss term ``regression``."""
        features = self.backbone(torch.cat(batch.views["global"]), patches="none").cls
        first, second = features.chunk(2)
        one, other = self.predictor(features).chunk(2)
        return {"regression": losses.cosine_regression(one, second) + losses.cosine_regression(other, first)}

    def parameter_groups(self) -> list[ParameterGroup]:
        """All parameters, by module structure."""
        return parameter_groups(self)

    def export(self) -> dict[str, nn.Module]:
        """The backbone."""
        return {"backbone": self.backbone}


def build(config: Config, settings: SiameseSettings) -> Siamese:
    """Builds the method with a newly initialized backbone."""
    return Siamese(build_tower(config.model, image_size=settings.views.global_size), settings)
''',
    "configs/siamese/tiny.yaml": """\
# The siamese method on tiny scenes.
base: ../base.yaml
method:
  name: siamese
  views: {global_size: 32}
  augment: {hue_space: yiq}
model: {embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8}
data: {num_workers: 0, canonical_streams: 4, shuffle_block_size: 64}
optim: {lr_scaling: {rule: none}}
schedule: {lr: {peak: 1e-3, warmup: 1 steps}}
train: {global_batch_size: 16, duration: 4 steps, precision: fp32, log_every: 1, threads: 1}
checkpoint: {every: 2 steps}
tracking: {enabled: false}
evaluation: {knn: {k: [3]}}
launch: {num_processes: 1, backend: gloo}
""",
}


def test_a_method_is_two_modules_and_a_config(tmp_path: Path) -> None:
    root, run, out = copy_packages(tmp_path / "root"), tmp_path / "run", tmp_path / "scores.json"
    for name, text in METHOD.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    assert touched(root) == set(METHOD)

    synthetic.write(tmp_path / "scenes", train=96, val=24, size=32, seed=3, samples_per_shard=48)
    words = [f"data.shards={tmp_path}/scenes/*train-*.tar", f"data.index={tmp_path}/index", f"run.directory={run}"]
    done = python(root, "-m", "launch.cli", "train", "siamese/tiny", *words)
    assert {path.name for path in (run / "checkpoints").glob("step_*")} == {"step_000000002", "step_000000004"}, done.stdout
    done = python(root, "-m", "launch.cli", "eval", str(run), "--knn", "--output", str(out))
    assert 0 < json.loads(out.read_text())["scores"]["knn/k3"] <= 1, done.stdout
    assert touched(root) == set(METHOD)
