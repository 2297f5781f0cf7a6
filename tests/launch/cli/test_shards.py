"""``fovea shards``: each verb does its work from the command line, tells what is wrong where, and exits with the right code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.cli.shards import _range
from launch.progress import progress_bar
from pipeline.data.index.build import build
from pipeline.reports import contact_sheet as contact
from tests.data.inspect.test_verify import damaged_png
from tests.data.pack.test_packer import contents, picture
from tests.data.pack.test_sources import downloaded, write_tar
from tests.helpers.commands import fovea
from tests.helpers.runs import ROOT, environment
from tests.helpers.s3 import KEYS, upload


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_index_writes_a_report_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("2.jpg", b"<html>")])
    assert fovea("shards", "index", tmp_path / "a.tar", "--index", tmp_path / "index") == 0
    told = capsys.readouterr()
    assert "1 of 2 samples in 1 shards can be used" in told.out and "a.tar: 2" in told.out and "1 samples in 1 shards" in told.out
    assert "1/1" in told.err and "\x1b" not in told.err, "elsewhere than on a terminal: lines, no bar"
    (report,) = (tmp_path / "index").glob("*/report.json")
    assert json.loads(report.read_text())["findings"][0]["examples"] == [["a.tar", "2"]]
    assert fovea("shards", "index", tmp_path / "a.tar", "--report", tmp_path / "mine.json") == 0
    assert "not_image" in (tmp_path / "mine.txt").read_text()


def test_unreadable_shards_are_all_in_the_report_and_the_code_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", [("1.jpg", picture(1))])
    for n in range(1, 8):
        (tmp_path / f"{n}.tar").write_bytes(b"no tar " * 200)
    assert fovea("shards", "index", tmp_path, "--report", tmp_path / "r.json") == 2
    assert "7 of 8 shards cannot be used" in capsys.readouterr().err
    refused = json.loads((tmp_path / "r.json").read_text())["refused"]
    assert [Path(entry["shard"]).name for entry in refused] == [f"{n}.tar" for n in range(1, 8)]


def test_verify_tells_shard_and_key_exits_with_1_and_excludes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("odd.png", damaged_png())])
    assert fovea("shards", "verify", tmp_path / "a.tar", "--report", tmp_path / "bad.json") == 1
    told = capsys.readouterr().out
    assert "1 undecodable" in told and f"{tmp_path / 'a.tar'}  odd" in told
    failures = json.loads((tmp_path / "bad.json").read_text())["failures"]
    assert failures == [{"reason": "undecodable", "shard": str(tmp_path / "a.tar"), "key": "odd"}]
    assert fovea("shards", "verify", tmp_path / "a.tar", "--exclude") == 1
    told = capsys.readouterr().out
    assert "excluded 1 samples, 1 are left" in told and "the fingerprint was" in told
    assert fovea("shards", "verify", tmp_path / "a.tar") == 0
    told = capsys.readouterr().out
    assert "decoded 1 samples" in told and "1  undecodable" in told, "what is excluded is still reported"


def test_pack_goes_from_a_download_to_shards_that_index_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("shards", "pack", downloaded(tmp_path / "web"), tmp_path / "out", "--samples", "2", "--prefix", "web")
    assert fovea(*words) == 0
    told = capsys.readouterr().out
    pattern = f"{tmp_path / 'out'}/web-{{00000..00001}}.tar"
    assert "packed 3 samples in 2 shards" in told and f"shards: '{pattern}'" in told
    before = contents(tmp_path / "out")
    assert fovea(*words) == 0 and contents(tmp_path / "out") == before
    assert "(2 of them were there already)" in capsys.readouterr().out
    assert fovea("shards", "index", pattern) == 0
    assert "3 samples in 2 shards" in capsys.readouterr().out


def test_out_inside_the_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    for out in (tmp_path, tmp_path / "shards"):
        assert fovea("shards", "pack", tmp_path, out) == 2
        assert "Choose an OUT outside the source" in capsys.readouterr().err


def test_stats_print_a_table_or_nothing_but_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("2.jpg", picture(1)), ("3.jpg", b"<html>")])
    assert fovea("shards", "stats", tmp_path / "a.tar") == 0
    assert "1 images occur 1 times too often" in capsys.readouterr().out
    assert fovea("shards", "stats", tmp_path / "a.tar", "--json") == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"not_image": 1}


def test_preview_of_shards_draws_the_pictures_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.png", picture(n, "PNG", (224, 224))) for n in range(3)] + [("bad.png", damaged_png())])
    for name in ("sheet.png", "page.html"):
        assert fovea("shards", "preview", tmp_path / "a.tar", "-o", tmp_path / name, "--samples", "9") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") == 4 and "cannot be used (undecodable)" in page and "a.tar  bad" in page
    drawn = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    cells = contact.gather(build([str(tmp_path / "a.tar")], tmp_path / "index"), 9)
    assert len(cells) == 4
    for number in range(3):
        x = 16 + number * 240
        original = np.asarray(Image.open(io.BytesIO(picture(number, "PNG", (224, 224)))))
        assert np.array_equal(drawn[16 : 16 + 224, x : x + 224], original)


def test_ls_asks_the_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    stand_in = types.ModuleType("launch.cli.shards_ls")
    stand_in.run = lambda loaded, **what: asked.append(what)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "launch.cli.shards_ls", stand_in)
    assert fovea("shards", "ls", "dinov2/cifar10_vit_tiny", "data.shards=a.tar", "--step", "1234", "--ranks", "4", "--json") == 0
    assert asked == [{"step": 1234, "key": None, "epochs": 1.0, "until": None, "ranks": 4, "as_json": True}]


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working") as tell:
        tell(1, 2)
        tell(2, 2, "shard [x] done")
    assert capsys.readouterr().err == "2/2 shard [x] done\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("working") as tell:
        tell(1, 2, "shard [x] done")
    told = capsys.readouterr().err
    assert "working" in told and "1/2" in told and "shard [x] done" in told


def test_a_range_of_shards_is_one_pattern() -> None:
    assert _range([]) == "" and _range(["a/x-00000.tar"]) == "a/x-00000.tar"
    assert _range([f"a b/x-{n:05d}.tar" for n in range(12)]) == "'a b/x-{00000..00011}.tar'"


@pytest.mark.slow
def test_every_verb_takes_shards_from_a_bucket(
    s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}", "FOVEA_CACHE": str(tmp_path / "kept")}.items():
        monkeypatch.setenv(name, value)
    write_tar(tmp_path / "0.tar", [("1.jpg", picture(1)), ("1.cls", b"1"), ("2.jpg", b"<html>")])
    write_tar(tmp_path / "1.tar", [("3.jpg", picture(3)), ("odd.png", damaged_png())])
    upload(s3_port, "tools", {f"data/{n}.tar": tmp_path / f"{n}.tar" for n in range(2)})
    there = "s3://tools/data/{0..1}.tar"
    assert fovea("shards", "index", there) == 0
    assert "3 samples in 2 shards" in capsys.readouterr().out
    # In a process of its own: this one's helper processes may have been started before the keys were set.
    words = [sys.executable, "-m", "launch.cli.main", "shards", "verify", there]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "s3://tools/data/1.tar  odd" in done.stdout
    assert fovea("shards", "stats", there, "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    assert fovea("shards", "preview", "s3://tools/data/0.tar", "-o", tmp_path / "sheet.png") == 0
    assert fovea("shards", "pack", there, tmp_path / "far", "--min-side", "20") == 0
    assert fovea("shards", "pack", str(tmp_path / "{0..1}.tar"), tmp_path / "near", "--min-side", "20") == 0
    assert (tmp_path / "far" / "train-00000.tar").read_bytes() == (tmp_path / "near" / "train-00000.tar").read_bytes()


def test_scenes_are_drawn_with_the_names_of_their_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea("shards", "synthesize", tmp_path / "set", "--train", "12", "--val", "6", "--size", "32") == 0
    assert "12 training images and 6 validation images" in capsys.readouterr().out
    assert len((tmp_path / "set" / "classes.txt").read_text().splitlines()) == 10
    assert {path.name for path in (tmp_path / "set").glob("*.tar")} == {"scenes-train-00000.tar", "scenes-val-00000.tar"}


def test_eval_of_no_run_says_so_whatever_is_asked_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea("eval", tmp_path / "gone", "--knn") == 2
    assert f"{tmp_path / 'gone'}: must be a run directory" in " ".join(capsys.readouterr().err.split())


def test_training_without_labelled_shards_beside_names_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.jpg", picture(n)) for n in range(8)])
    words = [f"data.shards={tmp_path / 'a.tar'}", f"run.directory={tmp_path / 'run'}", "launch.num_processes=1"]
    assert fovea("train", "dinov2/scenes_vit_tiny", *words, "train.global_batch_size=4", "schedule.lr.warmup=0 steps") == 2
    assert "evaluation.knn.val_shards" in capsys.readouterr().err


def class_folders(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "1.jpg").write_bytes(picture(seed))
    return root


def test_pack_prints_an_account_that_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = class_folders(tmp_path / "in", "cat", "dog")
    for name, data in {"cat/1.txt": b"caf\xe9", "dog/2.jpg": b"<html>", "dog/2.txt": b"x", "a.json": b"{}", "b.XML": b""}.items():
        (source / name).write_bytes(data)
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("")
    assert fovea("shards", "pack", source, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "left out 2: not_an_image (1 .json, 1 .xml)" in printed and "left out 1: hidden (names that begin" in printed
    assert "left out 1: not_image" in printed and "left out 1: with_image" in printed
    assert "packed, but 1: caption_replaced" in printed and f"which ones: {tmp_path / 'out'}/train.notes.txt" in printed
    assert "account: 8 files seen = 2 packed + 1 packed with them + 5 left out" in printed
    assert (tmp_path / "out" / "train.notes.txt").read_text() == "caption_replaced\tcat/1.jpg\n"


def test_pack_follows_links_out_of_the_source_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "store", "cat")
    source = class_folders(tmp_path / "in", "ant", "bee")
    (source / "cat").symlink_to("../store/cat")
    words = ("shards", "pack", source, tmp_path / "out")
    assert fovea(*words) == 2
    refusal = " ".join(capsys.readouterr().err.split())
    assert "1 of its parts would be lost" in refusal and "cat" in refusal and "--follow-links" in refusal
    assert fovea(*words, "--follow-links") == 0
    assert "packed 3 samples in 1 shards, 3 classes" in capsys.readouterr().out
    assert fovea(*words, "--no-follow-links", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "packed 2 samples in 1 shards, 2 classes" in printed and "left out 1: outside_link" in printed


def test_pack_takes_roots_labels_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "data", "2", "x")
    table = tmp_path / "lists" / "t.csv"
    table.parent.mkdir()
    table.write_text(f"path,label\n{tmp_path}/data/2/1.jpg,2\nx/1.jpg,x\n")
    words = ("shards", "pack", table, tmp_path / "out")
    assert fovea(*words) == 2 and "labels mix 1 names" in " ".join(capsys.readouterr().err.split())
    assert fovea(*words, "--labels", "names") == 2
    assert f"--root {tmp_path}/data/2" in "".join(capsys.readouterr().err.split("\n"))
    assert fovea(*words, "--labels", "names", "--root", tmp_path / "data") == 0
    assert (tmp_path / "out" / "classes.txt").read_text() == "2\nx\n"
    (tmp_path / "order.txt").write_text("x\ny\n2\n")
    assert fovea(*words, "--root", tmp_path / "data", "--classes", tmp_path / "order.txt", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "1 of 3 classes have no sample: y" in printed
    assert (tmp_path / "out" / "classes.txt").read_text() == "x\ny\n2\n"
    (tmp_path / "order.txt").write_text("x\nx\n")
    assert fovea(*words, "--classes", tmp_path / "order.txt") == 2
    assert fovea("shards", "pack", tmp_path / "data", tmp_path / "out", "--root", tmp_path) == 2


def test_pack_leaves_out_files_above_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = class_folders(tmp_path / "in", "cat", "dog")
    with (source / "cat" / "2.jpg").open("wb") as file:
        file.truncate(2 << 20)
    assert fovea("shards", "pack", source, tmp_path / "out", "--max-file-mb", "1") == 0
    assert "left out 1: file_too_large" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["index", "verify", "stats", "preview.png", "preview.html"])
@pytest.mark.parametrize("part", ["key", "caption", "label", "text"])
def test_half_characters_in_shards_end_no_verb(tmp_path: Path, verb: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = "caf\udce9\x1b[31m" if part == "key" else "1"
    members = [(f"{key}.jpg", picture(1)), (f"{key}.png", picture(1)), ("2.jpg", picture(2)), (f"{key}x.jpg", b"<html>")]
    if part in ("caption", "label"):
        members.insert(1, ("1.json", json.dumps({part: "a dog \ud83d"}).encode()))
    if part == "text":
        members.insert(1, ("1.txt", "a dog\ud83d\x1b[2J".encode("utf-8", "surrogatepass")))
    write_tar(tmp_path / "a.tar", members)
    words = ["-o", str(tmp_path / verb)] if verb.startswith("preview") else []
    assert fovea("shards", verb.split(".")[0], tmp_path / "a.tar", *words) == 0
    capsys.readouterr().out.encode("utf-8")
    if verb == "preview.html":
        page = (tmp_path / verb).read_text(encoding="utf-8")
        assert "\x1b" not in page
        assert part != "caption" or ("a dog \ufffd" in page and "1 captions are not UTF-8" in page)
