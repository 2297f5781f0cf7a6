"""The page of compiled graphs: what is counted, and how it is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.bench import recompilations
from pipeline.bench.prove.methods import CONFIGS
from pipeline.bench.recompilations import Row, document, markdown, measure
from pipeline.errors import TrainingError


@pytest.mark.slow
def test_a_method_is_counted_in_a_process_of_its_own() -> None:
    ((name, before, after),) = measure(["simvlm"], 5, None)
    assert (name, before) == ("simvlm", None)
    assert after.first == after.graphs[0] > 0 and after.later == 0 and after.breaks == 0
    assert len(after.graphs) == len(after.calls) == 5 and len(set(after.calls)) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_is_narrow_and_as_deep_as_its_config(name: str) -> None:
    from pipeline.config.load import load

    config = load(CONFIGS[name], recompilations.overrides(name)).config
    plain = load(CONFIGS[name], ["data.shards=none.tar"]).config
    assert config.train.compile is True
    assert config.model.timm_name == "resnet10t" or config.model.depth == (plain.model.depth or 12)


def test_a_process_that_fails_is_reported_with_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise ImportError('of another time')\n")
    with pytest.raises(TrainingError, match="clip ended with 1: ImportError: of another time"):
        list(measure(["clip"], 4, tmp_path))


def test_cells_show_both_states_where_they_differ() -> None:
    rows = [
        ("clip", Row([2, 1, 0, 1, 0], [24] * 5, 0), Row([3, 0, 0, 0, 0], [24] * 5, 0)),
        ("dino", None, Row([4, 0, 0, 1, 1], [9] * 5, 2)),
    ]
    lines = markdown(rows, {"cores": "2"}, "the command").splitlines()
    assert "| clip | clip/vit_b16_cc12m | 3 | 1 → 0 | 24 | 0 |" in lines
    assert "| dino | dino/vit_s16 | 4 | 2 | 9 | 2 |" in lines
    methods = document(rows)["methods"]
    assert methods["dino"]["before"] is None and methods["clip"]["after"]["graphs"] == [3, 0, 0, 0, 0]
