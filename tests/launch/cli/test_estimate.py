"""``fovea estimate`` counts a method without building it and says what to choose."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from launch.cli import estimate_data
from launch.cli.estimate import advice, measure, needed, run
from launch.cli.estimate_data import DataCost, data, lines
from launch.cli.estimate_interval import checkpoint_bytes
from launch.cli.main import app
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.data.indexing import indexed
from pipeline.data.order.order import Order
from pipeline.data.pack import synthetic
from pipeline.errors import ConfigError
from pipeline.estimate.data import IndexCost, Part, Reading
from pipeline.methods.registry import build_method
from pipeline.training.optimizers import AdamW, Lamb, Lars, Sgd
from tests.helpers.runs import TOY

KINDS = {"adamw": AdamW, "lamb": Lamb, "lars": Lars, "sgd": Sgd}

LARGE = """
method: {name: dinov2, prototypes: 131072}
model: {timm_name: vit_giant_patch14_dinov2}
data: {shards: /x/a.tar}
train: {global_batch_size: 1024}
"""


def loaded(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return load(path, overrides).config


def test_a_method_is_counted_as_it_is_built(tmp_path: Path) -> None:
    config = loaded(tmp_path, TOY, "data.shards=/x/a.tar")
    sizes, method = measure(config), build_method(config)
    assert sizes.trained == sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert method.teacher is not None and sum(sizes.teacher) == sum(p.numel() for _, p in method.teacher.named_parameters())
    assert sizes.live.each > 4 * 32 * (2 * (16 + 1) + 2 * (4 + 1)), "more than one number of each feature of each token"
    assert sizes.views == 4 * 3 * sum(view.count * view.size**2 for view in method.views) > 0
    waiting = needed(config.replace(data=config.data.model_copy(update={"prefetch": 5})), sizes, 1, 2)[0]
    assert waiting.input == 7 * config.train.global_batch_size / 2 * sizes.views
    assert waiting.total - needed(config, sizes, 1, 2)[0].total == 3 * config.train.global_batch_size / 2 * sizes.views


def test_the_table_the_teachers_share_and_the_advice_are_told(tmp_path: Path) -> None:
    out = StringIO()
    config = loaded(tmp_path, TOY, "data.shards=/x/a.tar")
    assert run(config, measure(config), ranks=2, gigabytes=80, console=Console(file=out, width=120)) == 0
    text = out.getvalue()
    assert "Choose train.zero_stage=1" in text and "The teacher takes" in text and text.count("yes") == 8


@pytest.mark.slow
def test_a_model_too_large_for_its_gpus_is_told_so_with_the_mend(tmp_path: Path) -> None:
    config = loaded(tmp_path, LARGE)
    sizes = measure(config)
    assert 1.1e9 < sizes.trained < 1.5e9
    memory, _ = needed(config, sizes, 2, 8)
    assert memory.teacher == 4 * sum(sizes.teacher)
    assert "train.micro_batch_size=" in advice(config, sizes, 8, 40e9)
    assert advice(config, sizes, 1, 20e9).startswith("Does not fit")
    assert run(config, sizes, ranks=1, gigabytes=8, console=Console(file=StringIO())) == 1
    with pytest.raises(ConfigError, match="are not divisible by 3"):
        run(config, sizes, ranks=3, gigabytes=80)


def test_an_optimizer_in_host_memory_is_no_longer_counted_on_the_gpu(tmp_path: Path) -> None:
    config = loaded(tmp_path, TOY, "data.shards=/x/a.tar", "train.zero_stage=2")
    away = config.replace(train=config.train.model_copy(update={"offload": "cpu"}))
    sizes = measure(config)
    before, after = needed(config, sizes, 2, 8)[0], needed(away, sizes, 2, 8)[0]
    assert (after.masters, after.moments) == (0, 0) and after.gradients == before.gradients
    assert after.host == 5 * before.masters, "master, two moments, gradient and staging"
    for asked, said in ((config, False), (away, True)):
        out = StringIO()
        run(asked, sizes, ranks=2, gigabytes=80, console=Console(file=out, width=120))
        assert ("Host memory" in out.getvalue()) is said


def test_hours_follow_from_operations_and_the_peak() -> None:
    from launch.cli.estimate import bill, cost
    from launch.slurm.profile import ClusterProfile

    config = load(
        "dinov2/scenes_vit_tiny", ["data.shards=none.tar", "train.duration=10 epochs", "train.global_batch_size=64"]
    ).config
    site = ClusterProfile(gpus_per_node=4, gpu_tflops=100, gpu_hour_price=2.0)
    one = bill(config, site, ranks=4, efficiency=0.5, samples=6400)
    assert (one.steps, one.samples) == (1000, 64000)
    assert one.rate == pytest.approx(4 * 100e12 * 0.5 / (one.gflop * 1e9))
    assert one.hours == pytest.approx(64000 / one.rate / 3600) and one.price == pytest.approx(one.hours * 4 * 2.0)
    assert bill(config, site, ranks=8, efficiency=0.5, samples=6400).hours == pytest.approx(one.hours / 2)
    with pytest.raises(ConfigError, match="peak"):
        bill(config, ClusterProfile(), ranks=4, efficiency=0.5, samples=6400)
    for profile, why in ((ClusterProfile(), "no gpu_tflops"), (ClusterProfile(gpus_per_node=0), "its nodes have no GPUs")):
        out = StringIO()
        assert cost(config, profile, ranks=4, efficiency=0.5, samples=6400, console=Console(file=out, width=120)) is None
        assert "Hours and cost are not estimated" in out.getvalue() and why in out.getvalue()


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lamb", 2), ("lars", 1), ("sgd", 1)])
def test_moments_are_those_of_the_configured_optimizer(tmp_path: Path, name: str, moments: int) -> None:
    config = loaded(tmp_path, TOY, "data.shards=/x/a.tar", f"optim.name={name}")
    assert config.optim.moments == moments == len(KINDS[name].moments)
    sizes = measure(config)
    for stage in range(4):
        memory = needed(config, sizes, stage, 2)[0]
        masters = memory.masters or 4 * sizes.trained
        assert memory.moments == moments * masters
    assert checkpoint_bytes(config, sizes) == 4 * ((1 + moments) * sizes.trained + sum(sizes.frozen) + sum(sizes.teacher))


def test_the_command_builds_the_method_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.cli import estimate

    calls: list[Config] = []

    def counted(config: Config) -> estimate.Sizes:
        calls.append(config)
        return measure(config)

    monkeypatch.setattr(estimate, "measure", counted)
    path, site = tmp_path / "a.yaml", tmp_path / "site.yaml"
    path.write_text(TOY)
    site.write_text("gpus_per_node: 2\ngpu_tflops: 1\n")
    arguments = ["estimate", str(path), "data.shards=/x/a.tar", "train.duration=100 steps", "--cluster", str(site)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "loses least" in done.output, done.output
    assert len(calls) == 1


def test_what_the_data_cost_is_told_if_shards_are_indexed_or_may_be(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "data", train=400, val=10, size=16, seed=1, samples_per_shard=20)
    config = loaded(tmp_path, TOY, f"data.shards={tmp_path}/data/*train-*.tar", f"data.index={tmp_path}/index")

    def told(shards: int = 0, samples: int | None = None) -> str:
        out = StringIO()
        data(config, ranks=2, nodes=1, shards=shards, samples=samples, console=Console(file=out, width=400))
        return out.getvalue()

    assert "--index-shards 3" in told()
    few = told(shards=2)
    assert "400 samples in 20 shards" in few and "of CPU" in few and "for its first step" in few
    assert not (tmp_path / "index").exists()
    assert "390 samples in 20 shards" in told(samples=390) and "--index-shards 3" in told(samples=390)
    manifest = indexed(config, config.data.patterns)
    known = told()
    assert f"{manifest.total} samples in 20 shards" in known and "there already" in known
    order = Order(manifest.sizes, 0, config.train.global_batch_size, config.data.canonical_streams, 64)
    first = int(known.partition("a node needs ")[2].partition(" ")[0])
    assert first == pytest.approx(len(order.shards(0, 1)), rel=0.2)
    nowhere = loaded(tmp_path, TOY, "data.shards=/x/a.tar")
    out = StringIO()
    assert data(nowhere, ranks=2, nodes=1, shards=1, samples=None, console=Console(file=out, width=400)) is None
    assert "Data are not estimated" in out.getvalue()


def test_storage_is_not_read_without_need_and_what_is_not_counted_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.write(tmp_path / "data", train=40, val=10, size=16, seed=1, samples_per_shard=20)
    own = [f"data.shards={tmp_path}/data/*train-*.tar", f"data.index={tmp_path}/index"]
    config = loaded(tmp_path, TOY, *own, f"data.selection={tmp_path}/some.parquet")
    assert config.train.global_batch_size <= 40

    def printed(samples: int | None, nodes: int = 1) -> str:
        out = StringIO()
        data(config, ranks=8, nodes=nodes, shards=0, samples=samples, console=Console(file=out, width=400))
        return out.getvalue()

    assert "Selections are not counted" in printed(40)
    assert "5 nodes" in printed(40, nodes=5), "which do not divide the batch"
    assert "a data set of 3 samples in 2 shards has fewer than one global batch" in printed(3)
    monkeypatch.setattr(estimate_data, "open_storage", lambda *_, **__: pytest.fail("storage was read"))
    assert "--index-shards 3" in printed(None)


def test_fewer_streams_are_proposed_where_they_download_less(tmp_path: Path) -> None:
    set_ = Part(5 * 10**9, 500_000, 4 * 10**14)
    text = "\n".join(lines(DataCost(Reading((set_,), 4096, 256, 16384), IndexCost(set_.size, 4e6, 4e7, 80.0), False, 8)))
    assert "data.canonical_streams=4 needs 11 shards" in text and "of CPU" in text
    few = "\n".join(lines(DataCost(Reading((set_,), 4096, 4, 16384), IndexCost(set_.size, None, 4e7, 80.0), True, 8)))
    assert "canonical_streams" not in few
