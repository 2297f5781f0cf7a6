"""The benchmark of a run's start: real runs, their phases, and the requests that an S3 server sees."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.bench import startup
from pipeline.bench.startup import Options, Result, Start, markdown, measure
from pipeline.bench.startup_runs import settings, write_shards
from pipeline.bench.startup_s3 import Counts
from pipeline.errors import ConfigError
from pipeline.runtime.interpreter import ROOT


@pytest.mark.slow
def test_real_starts_are_measured_by_phase_and_request() -> None:
    lines: list[str] = []
    result = measure(Options.smoke(), log=lines.append)
    assert [(one.ranks, one.index) for one in result.starts] == [(1, False), (1, True), (2, True)]
    for one in result.starts:
        assert 0 <= one.cpu[0] <= one.total[0] and one.wall[0] > 0  # the tests' interpreter is forked elsewhere: no CPU time
        names = [mark["name"] for mark in one.phases]
        assert names[:4] == ["settings", "imports", "index", "checkpoint chosen"] and names[-2:] == ["first batch", "first step"]
        seconds = [mark["seconds"] for mark in one.phases]
        assert seconds == sorted(seconds)
    if find_spec("moto") is None:
        assert "moto" in result.no_s3 and not result.s3
        return
    by_start = {(one.ranks, one.start.partition(",")[0]): one for one in result.s3}
    assert len(by_start) == 6
    first, second, resume = (by_start[2, name] for name in ("first", "second", "resume"))
    assert first.read >= first.held, "indexing reads each shard"
    assert second.read < first.read and resume.read <= second.read
    four = by_start[4, "second"]
    assert (four.heads, four.lists) == (second.heads, second.lists), (
        "one process asks for the shards, however many ranks there are"
    )


def test_the_page_compares_both_versions_and_shows_where_the_start_goes() -> None:
    marks = [
        {"process": "launcher", "name": "index", "seconds": 2.0, "cpu": 1.0},
        {"process": "rank", "name": "process", "seconds": 9.0, "cpu": 0.0},
        {"process": "rank", "name": "first step", "seconds": 10.0, "cpu": 0.25},
    ]
    starts = [
        Start("now", 100, 2, True, [12.0, 11.0], [20.0, 30.0], [13.0, 12.0], marks),
        Start("before", 100, 2, True, [22.0, 24.0], [40.0, 50.0], [25.0, 26.0]),
        Start("now", 100, 8, True, [15.0], [30.0], [16.0]),
    ]
    counts = [Counts(4, 2, "resume", 4, 0, 1, 0, 0, 1000, 2)]
    text = markdown(Result(starts, counts), Options(before=Path("x")), {"cores": "2"}, "fovea bench startup")
    assert "| 100 | 2 | 22.0 | 11.0 | 40.0 | 20.0 |" in text
    assert "| 100 | 8 | not measured | 15.0 | not measured | 30.0 |" in text
    assert "| 100 | 2 | 2.0 (1.00) | 7.0 (0.00) | 1.0 (0.25) |" in text
    assert "| 4 | 2 | resume | 4 | 0 | 1 | 0 | 0.00 MB | 0.00 x |" in text
    assert "No start was begun" not in text
    assert "No start was begun after 5 minutes" in markdown(Result(), Options(minutes=5.0), {}, "c")
    assert "Not counted: moto is not installed" in markdown(Result(starts, [], "moto is not installed"), Options(), {}, "c")


def test_a_checkout_before_the_keys_were_renamed_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "settings.py").touch()
    old, now = (settings(root, "a.tar", 2, tmp_path, tmp_path) for root in (tmp_path, ROOT))
    assert old["recipe"] == now["method"] and old["train"]["global_batch"] == now["train"]["global_batch_size"] == 16


def test_all_shards_of_a_set_are_the_same_bytes(tmp_path: Path) -> None:
    content = {path.read_bytes() for path in write_shards(tmp_path, 3).glob("*.tar")}
    assert len(content) == 1 and len(list(write_shards(tmp_path, 3).iterdir())) == 3


def test_a_start_that_fails_is_named_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "settings", lambda *_: {"no": "settings"})
    start = Start("now", 2, 1, True)
    with pytest.raises(ConfigError, match=r"the start of .* with 2 shards on 1 ranks failed"):
        startup._measure(start, ROOT, tmp_path, tmp_path / "index", tmp_path / "run", 300.0)
    assert start.cpu == []


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a checkout"):
        measure(Options(before=tmp_path), log=lambda _: None)


def test_a_start_that_takes_too_long_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did not end within 0\.1 s"):
        startup._measure(Start("now", 2, 1, True), ROOT, tmp_path, tmp_path / "index", tmp_path / "run", 0.1)
