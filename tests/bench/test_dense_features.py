"""The comparison of dense features says which method was better, with how many seeds, either way."""

from __future__ import annotations

from pipeline.bench.dense_features import RunResult, line, markdown


def result(method: str, seed: int, miou: float) -> RunResult:
    return RunResult(method, seed, 1280, 12.0, miou, 0.08, 0.5)


def test_the_page_holds_every_run_and_the_difference_by_seed() -> None:
    runs = [result("clip", 0, 0.20), result("detailclip", 0, 0.25), result("clip", 1, 0.22), result("detailclip", 1, 0.21)]
    text = markdown(runs, {"cores": "2"}, "fovea bench dense-features")
    assert "| detailclip | 0 | 1280 | 12 | 25.0% | 8.0% | 50.0% |" in text
    assert "DetailCLIP minus CLIP: +2.0% mIoU in the mean of 2 seeds, from -1.0% to +5.0%; better with 1 of them." in text
    assert line(runs[0]) == "clip, seed 0: mIoU 20.0% (untrained 8.0%), k-NN 50.0%"


def test_a_run_without_its_rival_is_shown_without_a_difference() -> None:
    assert "minus" not in markdown([result("clip", 0, 0.2)], {}, "fovea bench dense-features")
