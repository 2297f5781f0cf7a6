"""Packing: bytes follow from source and seed alone, a kill changes nothing, what is left out is counted and named."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.index import tar
from pipeline.data.index.build import build
from pipeline.data.loader.reader import Reader
from pipeline.data.pack.packer import Packing, PackReport, pack
from pipeline.data.pack.sources import ImageSource, Options, open_source
from pipeline.errors import ConfigError, DataError
from tests.helpers.limits import deadline

ROOT = Path(__file__).resolve().parents[3]


def picture(seed: int, form: str = "JPEG", size: tuple[int, int] = (24, 20)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "pictures"
    for number, name in enumerate(["zebra", "cat", "dog dog"]):
        (source / name).mkdir(parents=True)
        for n in range(4):
            (source / name / f"{n}.v1.JPG").write_bytes(picture(10 * number + n))
    (source / "cat" / "broken.jpg").write_bytes(picture(0)[:100])
    (source / "cat" / "page.jpg").write_bytes(b"<html>")
    (source / "cat" / "moving.gif").write_bytes(picture(77, "GIF"))
    (source / "cat" / "notes.txt").write_text("no picture")
    return source


def packed(source: Path | str, out: Path, *, overwrite: bool = False, **how: Any) -> PackReport:
    return pack(open_source(source), out, Packing(**how), overwrite=overwrite)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_of_classes_becomes_labelled_shuffled_shards(folder: Path, tmp_path: Path) -> None:
    report = packed(folder, tmp_path / "out", samples_per_shard=5)
    assert report.classes == ("cat", "dog dog", "zebra")
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog dog\nzebra\n"
    assert (report.packed, len(report.shards)) == (12, 3)
    assert report.skipped == (
        ("cat/broken.jpg", "truncated"),
        ("cat/moving.gif", "unsupported"),
        ("cat/notes.txt", "text_without_image"),
        ("cat/page.jpg", "not_image"),
    )
    assert report.reasons == {"not_image": 1, "text_without_image": 1, "truncated": 1, "unsupported": 1}
    listed = (tmp_path / "out" / "train.skipped.txt").read_text()
    assert listed == "".join(f"{reason}\t{name}\n" for name, reason in report.skipped)
    assert report.account.text() == "16 files seen = 12 packed + 4 left out" and report.account.balances
    manifest = build(list(report.shards), tmp_path / "index")
    records = Reader(manifest).fetch(manifest.ids())
    labels = [record.label for record in records]
    assert manifest.counts == {"ok": 12}
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4 and labels != sorted(labels)
    numbers = {0: 10, 1: 20, 2: 0}
    expected = {(label, picture(numbers[label] + n)) for label in range(3) for n in range(4)}
    assert {(record.label, record.image) for record in records} == expected
    assert [record.key for record in records] == [f"{n:09d}" for n in range(12)]


def test_the_bytes_follow_from_the_source_and_the_seed(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "a", samples_per_shard=5)
    shutil.copytree(folder, tmp_path / "copy")
    pack(open_source(tmp_path / "copy"), tmp_path / "b", Packing(samples_per_shard=5), threads=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    packed(folder, tmp_path / "c", samples_per_shard=5, seed=1)
    assert (tmp_path / "c" / "train-00000.tar").read_bytes() != (tmp_path / "a" / "train-00000.tar").read_bytes()
    plain = packed(folder, tmp_path / "d", seed=None)
    manifest = build(list(plain.shards), tmp_path / "index")
    assert [record.label for record in Reader(manifest).fetch(manifest.ids())] == [0] * 4 + [1] * 4 + [2] * 4


def test_what_is_there_is_never_replaced_unasked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed(folder, out)
    before = contents(out)
    with pytest.raises(DataError, match="seed was 0 and is 1"):
        packed(folder, out, seed=1)
    (folder / "cat" / "new.jpg").write_bytes(picture(5))
    with pytest.raises(DataError, match="the source is another"):
        packed(folder, out)
    (folder / "cat" / "new.jpg").unlink()
    (out / "train.pack.json").unlink()
    with pytest.raises(DataError, match="exist already"):
        packed(folder, out)
    packed(folder, out, overwrite=True)
    assert contents(out) == before
    packed(folder, out, overwrite=True, samples_per_shard=2)
    assert len(list(out.glob("*.tar"))) == 6


def test_a_finished_packing_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    first = packed(folder, tmp_path / "out", samples_per_shard=5)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    again = packed(folder, tmp_path / "out", samples_per_shard=5)
    assert (again.shards, again.packed, again.skipped, again.kept) == (first.shards, first.packed, first.skipped, 3)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "train-00001.tar").unlink()
    whole = contents(tmp_path / "out")
    packed(folder, tmp_path / "out", samples_per_shard=5)
    assert contents(tmp_path / "out").keys() - whole.keys() == {"train-00001.tar"}
    assert whole.items() <= contents(tmp_path / "out").items()


class Stop(BaseException):
    """Ends a packing like a signal would."""


class Interrupted(ImageSource):
    """A source that ends the packing at its ``left``-th sample."""

    left = 0

    def key(self, position: int, number: int) -> str:
        type(self).left -= 1
        if self.left < 0:
            raise Stop
        return super().key(position, number)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(0, 12), max_size=4), each=st.integers(1, 6))
def test_stopped_anywhere_any_number_of_times_it_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, stops: list[int], each: int
) -> None:
    for name in ("whole", "parts"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    (folder / "cat" / "1.v1.txt").write_bytes(b"caf\xe9")
    (folder / "cat" / "broken.txt").write_bytes(b"of a broken image")
    how = Packing(samples_per_shard=each, transcode="png")
    source = open_source(folder)
    assert isinstance(source, ImageSource)
    pack(source, tmp_path / "whole", how)
    for Interrupted.left in stops:
        try:
            pack(Interrupted(**{part.name: getattr(source, part.name) for part in fields(source)}), tmp_path / "parts", how)
        except Stop:
            (tmp_path / "parts" / ".train-00099.tar.1.tmp").write_bytes(b"left behind")
    report = pack(source, tmp_path / "parts", how)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert report.packed == 13 and report.rewritten == 1 and len(report.skipped) == 4
    assert report.account.noted == {"caption_replaced": 1} and report.account.companions == 1


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    for n in range(300):
        place = source / f"class {n % 7}" / f"{n}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(n) if n % 10 else b"broken")
    stops = (
        "import sys, time\n"
        "from pipeline.data.pack import packer as packing\n"
        "from pipeline.data.pack.sources import open_source\n"
        "inspect_header = packing.inspect_header\n"
        "left = iter(range(int(sys.argv[3])))\n"
        "packing.inspect_header = lambda *a, **k: (next(left, None) is None and time.sleep(3600), inspect_header(*a, **k))[1]\n"
        "packing.pack(open_source(sys.argv[1]), sys.argv[2], packing.Packing(samples_per_shard=20), threads=2)\n"
    )

    def start(out: str, pictures: int = 10**6) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", stops, str(source), str(tmp_path / out), str(pictures)]
        return subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

    whole = start("whole")
    killed = start("killed", 90)  # at which it stands still, some shards in
    state, added = tmp_path / "killed" / "train.pack.json", tmp_path / "killed" / ".train.pack.tmp"
    end = deadline()
    while not added.exists() or added.read_bytes().count(b"\n") < 3 or not list(state.parent.glob(".train-*.tmp")):
        assert time.monotonic() < end and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and whole.wait() == 0
    assert json.loads(state.read_bytes())["shards"] == [], "all shards are written down again after each"
    with added.open("a") as file:
        file.write('{"at": 3, "name": "train-0')  # a line that the kill cut off
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("train-*.tar")}
    assert 3 <= len(done) < 14
    assert start("killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    kept = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in list(sorted(done))[:3]}
    assert kept == {name: done[name] for name in kept}, "finished shards were written again"


def test_pictures_the_decoder_cannot_read_are_written_anew_if_asked(folder: Path, tmp_path: Path) -> None:
    report = packed(folder, tmp_path / "out", transcode="png")
    assert (report.packed, report.rewritten, sorted(report.reasons)) == (13, 1, ["not_image", "text_without_image", "truncated"])
    manifest = build(list(report.shards), tmp_path / "index")
    anew = [record for record in Reader(manifest).fetch(manifest.ids()) if record.image[:4] == b"\x89PNG"]
    with Image.open(io.BytesIO(picture(77, "GIF"))) as gif:
        assert [np.asarray(Image.open(io.BytesIO(record.image))).tolist() for record in anew] == [
            np.asarray(gif.convert("RGB")).tolist()
        ]


def test_large_pictures_are_scaled_and_others_keep_their_bytes(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    (source / "large.jpg").write_bytes(picture(1, size=(200, 100)))
    (source / "large.png").write_bytes(picture(2, "PNG", size=(50, 100)))
    (source / "small.jpg").write_bytes(picture(3))
    report = packed(source, tmp_path / "out", max_side=80)
    manifest = build(list(report.shards), tmp_path / "index")
    records = Reader(manifest).fetch(manifest.ids())
    assert sorted((record.width, record.height) for record in records) == [(24, 20), (40, 80), (80, 40)]
    assert picture(3) in {record.image for record in records} and report.rewritten == 2


def test_shards_are_packed_anew_with_all_that_belongs_to_a_sample(folder: Path, tmp_path: Path) -> None:
    first = packed(folder, tmp_path / "a", samples_per_shard=4)
    report = packed(str(tmp_path / "a" / "train-*.tar"), tmp_path / "b", seed=3, samples_per_shard=7, min_side=20)
    before, after = (build(list(r.shards), tmp_path / f"index{n}") for n, r in enumerate((first, report)))
    assert (len(first.shards), len(report.shards), report.packed) == (3, 2, 12)
    old, new = ({record.key: (record.image, record.label) for record in Reader(m).fetch(m.ids())} for m in (before, after))
    assert old == new and list(old) != list(new)
    assert packed(tmp_path / "a", tmp_path / "c", min_side=16).packed == 12
    with pytest.raises(DataError, match="none of 12"):
        packed(tmp_path / "a", tmp_path / "d", min_side=21)


def test_two_parts_of_one_data_set_share_their_class_numbers(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "out")
    shutil.copytree(folder / "zebra", tmp_path / "val" / "zebra")
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(DataError, match=r"has other classes.*--classes"):
        packed(tmp_path / "val", tmp_path / "out", prefix="val")
    names = tuple((tmp_path / "out" / "classes.txt").read_text().splitlines())
    report = pack(open_source(tmp_path / "val", options=Options(classes=names)), tmp_path / "out", Packing(prefix="val"))
    assert report.classes == ("cat", "dog dog", "zebra")
    manifest = build(list(report.shards), tmp_path / "index")
    assert {record.label for record in Reader(manifest).fetch(manifest.ids())} == {2}
    assert any("contain no usable image and are not a class: cat" in remark for remark in report.remarks)


def test_what_cannot_be_packed_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.jpg").write_bytes(b"no")
    for name, words in {
        "gone": "does not exist",
        "empty": "contains no images",
        "only": "none of 1 images can be used: 1 not_image",
    }.items():
        with pytest.raises(DataError, match=words):
            packed(tmp_path / name, tmp_path / "out" / name)
    with pytest.raises(DataError, match="cannot begin a file's name"):
        packed(folder, tmp_path / "out", prefix="a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        packed(folder, tmp_path / "file" / "out")


def test_two_packings_do_not_mix(folder: Path, tmp_path: Path) -> None:
    def second(done: int, total: int, line: str) -> None:
        with pytest.raises(DataError, match="another `fovea shards pack` is running"):
            packed(folder, tmp_path / "out")

    pack(open_source(folder), tmp_path / "out", Packing(samples_per_shard=5), progress=second)


def test_a_state_that_was_half_written_is_removed(folder: Path, tmp_path: Path) -> None:
    torn, other = tmp_path / "out" / ".train.pack.json.7.abc.tmp", tmp_path / "out" / ".val.pack.json.7.abc.tmp"
    torn.parent.mkdir()
    for path in (torn, other):
        path.write_text("{")
    packed(folder, tmp_path / "out")
    assert not torn.exists() and other.exists()


# ---- parts ------------------------------------------------------------------------------------------------------------------


def of_parts(source: Path | str, out: Path, count: int) -> list[PackReport]:
    return [
        pack(open_source(source, options=Options(part=(number, count))), out, Packing(prefix=f"train_{number}of{count}"))
        for number in range(1, count + 1)
    ]


def samples_of(folder: Path, pattern: str = "*.tar") -> dict[bytes, tuple[str, int]]:
    """Key and label of each image."""
    manifest = build([str(path) for path in sorted(folder.glob(pattern))], folder.with_name(f"{folder.name}-index"))
    return {record.image: (record.key, record.label) for record in Reader(manifest).fetch(manifest.ids()) if record.image}


def test_parts_of_a_folder_are_the_whole_and_their_accounts_add_up(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "0.v1.txt").write_text("a caption")
    whole, parts = packed(folder, tmp_path / "whole"), of_parts(folder, tmp_path / "parts", 4)
    expected, found = samples_of(tmp_path / "whole"), samples_of(tmp_path / "parts")
    assert {image: label for image, (_, label) in found.items()} == {image: label for image, (_, label) in expected.items()}
    assert len({key for key, _ in found.values()}) == len(found) == whole.packed == 12, "keys of two parts are the same"
    assert sum((Counter(part.account.left_out) for part in parts), Counter()) == Counter(whole.account.left_out)
    for name in ("seen", "packed", "companions"):
        assert sum(getattr(part.account, name) for part in parts) == getattr(whole.account, name)
    assert {part.classes for part in parts} == {whole.classes}
    before = contents(tmp_path / "parts")
    assert [part.kept for part in of_parts(folder, tmp_path / "parts", 4)] == [1] * 4
    assert contents(tmp_path / "parts") == before
    with pytest.raises(ConfigError, match="part 40 of 40 is empty"):
        open_source(folder, options=Options(part=(40, 40)))


def test_what_parts_cannot_know_of_each_other_is_as_documented(folder: Path, tmp_path: Path) -> None:
    (folder / "cat").joinpath("twice.jpg").write_bytes(b"no image")
    (folder / "cat").joinpath("twice.png").write_bytes(b"no image")
    (folder / "cat").joinpath("twice.txt").write_text("a caption of both")
    whole, parts = packed(folder, tmp_path / "whole"), of_parts(folder, tmp_path / "parts", 2)
    assert sum(part.account.seen for part in parts) == whole.account.seen
    assert sum(part.account.companions for part in parts) == whole.account.companions + 1, "the caption counts as packed"
    for name in ("a", "b"):  # shards with the same keys
        packed(folder / "cat", tmp_path / "old" / name)
        next((tmp_path / "old" / name).glob("*.tar")).rename(tmp_path / "old" / f"{name}.tar")
    listed = [open_source(f"{tmp_path}/old/?.tar", options=Options(part=(number, 2))) for number in (1, 2)]
    first, second = ([one.key(position, 0) for position in range(len(one))] for one in listed)
    assert first == second and len(set(first)) == len(first), "unique within a part"


def test_a_part_of_shards_reads_its_own_shards_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(folder, tmp_path / "old", samples_per_shard=3)
    (tmp_path / "old" / "readme.md").write_text("x")
    opened: list[str] = []
    walk = tar.runs
    monkeypatch.setattr(tar, "runs", lambda source, *rest, **more: opened.append(source.url) or walk(source, *rest, **more))
    listed = open_source(tmp_path / "old", options=Options(part=(2, 2)))
    assert [Path(url).name for url in opened] == ["train-00001.tar", "train-00003.tar"] and len(listed) == 6
    assert not listed.left_out
    assert {name for name, _ in open_source(tmp_path / "old", options=Options(part=(1, 2))).left_out} >= {"readme.md"}
    of_parts(tmp_path / "old", tmp_path / "new", 2)
    assert samples_of(tmp_path / "new").keys() == samples_of(tmp_path / "old").keys()
    with pytest.raises(ConfigError, match="part 5 of 5 is empty: there are 4 shards"):
        open_source(tmp_path / "old", options=Options(part=(5, 5)))


def test_parts_of_a_table_share_its_rows(folder: Path, tmp_path: Path) -> None:
    names = [f"{name}/{n}.v1.JPG" for name in ("zebra", "cat", "dog dog") for n in range(4)]
    rows = [f"{name},{name.partition('/')[0]}" for name in (*names, "cat/none.jpg")]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    parts = of_parts(folder / "list.csv", tmp_path / "parts", 3)
    assert sum(part.packed for part in parts) == 12 and sum(part.account.seen for part in parts) == 13
    assert {label for _, label in samples_of(tmp_path / "parts").values()} == {0, 1, 2}
