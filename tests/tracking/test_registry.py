"""Exports in a real MLflow's model registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import LaunchError
from pipeline.tracking import Shipper
from pipeline.tracking.registry import register
from tests.tracking.test_mlflow_shipper import Bench, bench, template  # noqa: F401


def shipper(at: Bench) -> Shipper:
    return Shipper(at.folder, uri=at.uri, experiment="tests", name="trial")


@pytest.mark.slow
def test_each_export_becomes_the_next_version_bound_to_the_run(bench: Bench, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "timm"
    folder.mkdir()
    for number, weights in enumerate((b"first", b"second"), 1):
        (folder / "model.safetensors").write_bytes(weights)
        assert register(shipper(bench), folder, "vit") == number
    for number, weights in enumerate((b"first", b"second"), 1):
        found = bench.client.get_model_version("vit", str(number))
        assert found.run_id == bench.run.info.run_id and found.tags == {"layout": "timm"}
        assert (Path(found.source.removeprefix("file://")) / "model.safetensors").read_bytes() == weights


def test_a_server_that_is_away_is_told_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    away = Shipper(tmp_path, uri="http://127.0.0.1:9", experiment="tests", name="trial")
    with pytest.raises(LaunchError, match="the export itself is complete"):
        register(away, tmp_path / "timm", "vit")
