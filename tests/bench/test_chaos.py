"""The chaos benchmark: what its figures mean, and a small draw of real faults."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli.bench_methods import app
from pipeline.bench.chaos import kinds, measure, observe, page, records, runs, site, statistics
from pipeline.bench.chaos.catalogue import catalogue
from pipeline.bench.chaos.records import Row
from pipeline.errors import ConfigError, TrainingError
from pipeline.training.signature_file import Header, Signature, SignatureFile
from tests.helpers import clock

ROW = Row("kill-rank", 0, 1, "rank 1 killed", 7, True, True, 3, 9.5, 0, 2, kinds.SAME, 30.0, 4.0, 0.1)


def write(run: Path, attempt: int, rank: int, steps: list[Signature]) -> None:
    path = run / "signatures" / f"attempt-{attempt:04d}-rank-{rank}.bin"
    file = SignatureFile(path, Header(attempt=attempt, rank=rank, world=2))
    for one in steps:
        file.step(one)
    file.close()


def steps(first: int, last: int) -> list[Signature]:
    return [Signature(step, True, 100 + step, 200 + step, values={"term/loss": 1.0 / (1 + step)}) for step in range(first, last)]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    for rank in (0, 1):
        write(tmp_path / "reference", 0, rank, steps(0, 10))
    return tmp_path / "reference"


def test_a_run_that_repeats_steps_exactly_is_equal_and_its_repeated_steps_are_counted(reference: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path / "run", 0, rank, steps(0, 8))
        write(tmp_path / "run", 1, rank, steps(5, 10))
    assert observe.repeated(tmp_path / "run") == 3
    assert observe.differing(tmp_path / "run", reference, 16) == (0, 0)


def test_other_values_other_samples_and_missing_steps_are_found_on_any_rank(reference: Path, tmp_path: Path) -> None:
    ours = steps(0, 9)  # the last step is missing
    ours[3] = replace(ours[3], values={"term/loss": 0.123})
    ours[4] = replace(ours[4], samples=7)
    write(tmp_path / "run", 0, 0, steps(0, 10))
    write(tmp_path / "run", 0, 1, ours)
    assert observe.differing(tmp_path / "run", reference, 16) == (3, 2 * 16)
    assert observe.differing(tmp_path / "nothing", reference, 16) == (20, 10 * 16)


def test_a_step_that_was_done_wrongly_once_counts_though_it_was_repeated_rightly(reference: Path, tmp_path: Path) -> None:
    wrong = steps(0, 8)
    wrong[6] = replace(wrong[6], inputs=1)
    for rank in (0, 1):
        write(tmp_path / "run", 0, rank, wrong)
        write(tmp_path / "run", 1, rank, steps(5, 10))
    assert observe.differing(tmp_path / "run", reference, 16) == (2, 0)


def test_lost_time_is_what_exceeds_the_usual_time_after_the_fault() -> None:
    times = [(float(step), step) for step in range(10)]  # a second a step
    assert observe.lost_seconds(times, 4.5) == 0.0
    late = [*times, (30.0, 10), (31.0, 11)]
    assert observe.lost_seconds(late, 9.5) == pytest.approx(21.0 - 1.0)
    assert observe.lost_seconds(late, 30.5) == 0.0, "before the fault"
    assert observe.lost_seconds([*times, (13.0, 10)], 9.5) == 0.0, "noise"
    assert observe.lost_seconds(times, 8.5, last=29.0) == pytest.approx(20.0), "all steps were repeated"
    assert observe.lost_seconds([], 8.5, last=29.0) == 0.0


def test_progress_sees_steps_when_they_are_first_complete(tmp_path: Path) -> None:
    progress = observe.Progress(tmp_path / "run")
    for attempt, part in ((0, steps(0, 4)), (1, steps(2, 3)), (2, steps(2, 6))):
        write(tmp_path / "run", attempt, 0, part)
        progress.look()
    assert [step for _, step in progress.times] == [4, 6] and progress.latest == 6
    assert progress.last == progress.times[-1][0]
    assert sorted(progress.firsts) == [0, 1, 2]


def test_rows_survive_a_kill_and_foreign_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    other = replace(ROW, number=1, equal=False)
    for row in (ROW, other, replace(ROW, steps_lost=4)):
        records.append(path, row)
    wrong = {**asdict(ROW), "number": "2"}
    with path.open("a") as file:
        file.write(f'[]\n{{"kind": 1}}\n{json.dumps(wrong)}\nnull\n' + json.dumps(asdict(ROW))[:50])
    assert records.read(path) == [replace(ROW, steps_lost=4), other]
    assert records.read(tmp_path / "none") == []


def test_the_draw_is_a_function_of_the_seed_and_takes_all_kinds_equally_often() -> None:
    names = ["a", "b", "c"]
    drawn = measure.draw(names, 10, seed=3)
    assert drawn == measure.draw(names, 10, seed=3) != measure.draw(names, 10, seed=4)
    assert len(set(drawn)) == 10
    counts = [sum(kind == name for kind, _ in drawn) for name in names]
    assert max(counts) - min(counts) <= 1
    assert set(measure.draw(names, 4, seed=3)) < set(drawn), "a longer benchmark continues a shorter one"


def test_what_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Site", None)
    records.append(tmp_path / measure.ROWS, ROW)
    assert list(measure.measure(["kill-rank"], tmp_path, faults=1, seed=1)) == []


def test_the_page_of_a_stopped_benchmark_is_written_from_its_rows(tmp_path: Path) -> None:
    records.append(tmp_path / measure.ROWS, ROW)
    words = ["chaos", "--page", "--directory", str(tmp_path), "--out", str(tmp_path / "page")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "| SIGKILL of a rank | 1 | 1 | 1 |" in (tmp_path / "page.md").read_text()
    assert json.loads((tmp_path / "page.json").read_text())["rows"] == [asdict(ROW)]
    assert CliRunner().invoke(app, ["chaos", "earthquake"]).exit_code != 0


def test_a_lower_bound_of_a_share_is_that_of_clopper_and_pearson() -> None:
    assert statistics.at_least(200, 200) == pytest.approx(0.05 ** (1 / 200))
    assert statistics.at_least(0, 5) == 0.0
    assert statistics.at_least(8, 10) == pytest.approx(0.4931, abs=1e-4)


def test_goodput_follows_from_the_mean_cost() -> None:
    rows = [replace(ROW, number=number, seconds_lost=60.0) for number in range(20)]
    found = statistics.goodput(rows, 600.0, draws=200)
    assert found.mean == pytest.approx(600 / 660, abs=0.005)
    assert found.low < found.mean < found.high
    spread = [replace(row, seconds_lost=120.0 * (row.number % 2)) for row in rows]
    wide = statistics.goodput(spread, 600.0, draws=200)
    assert wide.high - wide.low > found.high - found.low
    # A kind with many rows weighs no more than another.
    many = [*rows, replace(ROW, kind="other", seconds_lost=0.0)]
    assert statistics.goodput(many, 600.0, draws=200).mean == pytest.approx(600 / 630, abs=0.005)


def test_the_page_says_how_many_and_names_what_is_not_equal() -> None:
    rows = [ROW, replace(ROW, number=1, seconds_lost=20.0, steps_lost=5), replace(ROW, kind="none", action="", seconds_lost=0.0)]
    text = page.markdown(rows, {"cores": "2"}, "fovea bench chaos")
    assert "2 faults of 1 kind, seed 1" in text and "**2 of 2 runs came to their end, 2 with the bits" in text
    assert "| SIGKILL of a rank | 2 | 2 | 2 | 4 (5) | 14.8 (19.5) | the same command again |" in text
    assert "one fault every" in text and "## Not equal" not in text
    bad = page.markdown([*rows, replace(ROW, number=2, equal=False, error="it was `odd`")], {}, "x")
    assert "## Not equal, or not ended" in bad and "NOT EQUAL (it was odd)" in bad and "3 of 3 runs came" in bad


def test_kinds_are_at_least_twelve_and_named_once() -> None:
    table = catalogue()
    assert len([name for name in table if name not in ("none", "slurm-none")]) >= 12
    for kind in table.values():
        assert kind.first + kind.margin < kind.steps


def test_without_the_checkout_it_says_where_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tests.helpers.nothing", None)
    with pytest.raises(ConfigError, match=r"servers of the tests are not available.*checkout"):
        site.helper("nothing")


@pytest.mark.slow
def test_a_clock_is_set_for_one_process_alone(tmp_path: Path) -> None:
    library = clock.build(tmp_path)
    if library is None:  # the fault is then left out, and the benchmark says so
        with site.Site(tmp_path) as made:
            assert catalogue()["clock"].missing(made) == "no C compiler"
        return
    clock.put(tmp_path / "shift", 86400)
    code = "import time; print(time.time(), time.monotonic())"
    environment = {"LD_PRELOAD": str(library), "FOVEA_CLOCK": str(tmp_path / "shift"), "FOVEA_WARM": "0"}
    words = [sys.executable, "-c", code]
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.split()
    wall, steady = map(float, said)
    assert wall - time.time() == pytest.approx(86400, abs=600)
    assert abs(steady - time.monotonic()) < 600


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark's directory, so that the undisturbed run is trained once."""
    return tmp_path_factory.mktemp("chaos")


@pytest.mark.slow
def test_a_small_draw_ends_with_the_bits_of_an_undisturbed_run(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {name: replace(kind, steps=16, margin=3) for name, kind in catalogue().items()}
    monkeypatch.setattr(measure, "catalogue", lambda: short)
    rows = list(measure.measure(["damaged", "read-only"], directory, faults=2, seed=5))
    assert {row.kind for row in rows} == ({"damaged", "read-only"} if site.may_mount() else {"damaged"})
    for row in rows:
        assert row.ended and row.equal and row.samples_wrong == 0, row
    killed = next(row for row in rows if row.kind == "damaged")
    assert killed.attempts == 2 and kinds.SAME in killed.action, killed
    assert 0 < killed.steps_lost <= 16 and killed.seconds_lost > 0 and killed.step > 0, killed
    assert records.read(directory / measure.ROWS) == sorted(rows, key=lambda row: row.key)
    assert f"of {len(rows)} runs came to their end, {len(rows)} with the bits" in page.markdown(rows, {}, "x")


@pytest.mark.slow
def test_a_run_with_other_bits_is_not_called_equal(directory: Path) -> None:
    with site.Site(directory) as place:
        control = catalogue()["none"]
        other = replace(control, steps=16, prepare=lambda case: case.overrides.append("run.seed=8"))
        row = measure.one(other, 0, 0, place)
        assert row.ended and not row.equal and row.samples_wrong > 0
        assert (directory / "failed" / "none-0-0" / "output.log").is_file()


def test_a_run_is_given_up_only_when_it_no_longer_advances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.Run(tmp_path, [], {}, 10, tmp_path / "log", tmp_path)
    monkeypatch.setattr(runs, "_STUCK", 0.0)
    run.launches = [time.monotonic()]
    with pytest.raises(TrainingError, match="neither ends nor advances"):
        run.watch(lambda: False)
    monkeypatch.setattr(runs, "_STUCK", 3600.0)
    run.launches, run.progress.times = [time.monotonic() - 7200], [(time.monotonic(), 4)]
    looks = iter((False, False, True))
    run.watch(lambda: next(looks))
