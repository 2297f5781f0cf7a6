"""The account: whatever lies in a source, ``seen = packed + packed with them + left out``, and all of it is named."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import storage
from pipeline.data.pack.packer import Packing, PackReport, pack
from pipeline.data.pack.sources import Layout, Options, open_source
from pipeline.errors import DataError
from pipeline.untrusted import printable
from tests.data.pack.test_packer import contents, picture
from tests.data.pack.test_sources import write_tar

WHOLE, PLAIN_TEXT = picture(1), b"a caption"
FOLDERS = ["", "cat", "bee", "cat/deep", ".hidden", "cat/@eaDir", "00000", "caf\udce9", "new\nline"]
NAMES = ["1.jpg", "1.JPG", "1.jpeg", "1.txt", "1.TXT", "1.json", "1.jpg.txt", "2.png", "2.txt", "3.gif", "README", ".a.jpg"]
NAMES += ["Thumbs.db", "x.csv", "a b.jpg", "\udcff.jpg", "tab\t.jpg", "..jpg", "1.tar", "a.b.c.jpg", "-.jpg"]
CONTENT = [WHOLE, WHOLE, WHOLE, WHOLE[:80], b"", b"<html>", PLAIN_TEXT, b"\xff\xfe\0", b"\xe9\xe8"]
TARGETS = ["cat", "bee/1.jpg", "..", ".", "../outside", "../outside/o.jpg", "../outside/o.txt", "nowhere", "/dev/zero"]
ENTRY = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.sampled_from(range(len(CONTENT))))
LINK = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(["link", "link.jpg", "1.txt", "l.txt"]), st.sampled_from(TARGETS))


def tree(root: Path, entries: list[tuple[str, str, int]], links: list[tuple[str, str, str]], pipes: int) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    source = root / "in"
    for folder in ("outside", "in"):
        (root / folder).mkdir(parents=True)
    for name in ("o.jpg", "o.txt"):
        (root / "outside" / name).write_bytes(WHOLE)
    for folder, name, content in entries:
        (source / folder).mkdir(parents=True, exist_ok=True)
        (source / folder / name).write_bytes(CONTENT[content])
    for folder, name, target in links:
        (source / folder).mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(source / folder / name):
            (source / folder / name).symlink_to(
                target if target.startswith("/") else os.path.relpath(source / target, source / folder)
            )
    for number in range(pipes):
        os.mkfifo(source / f"pipe{number}.jpg")
    return source


def entries_of(folder: Path, above: tuple[str, ...], follow: bool) -> list[str]:
    """All that lies in a folder, counted by a second implementation: entries that are no folder, and folders not entered."""
    actual = []
    root = above[0] if above else os.path.realpath(folder)
    chain = (*above, os.path.realpath(folder))
    for entry in os.scandir(folder):
        real = os.path.realpath(entry.path)
        inside = real == root or real.startswith(root + "/")
        litter = entry.name.startswith(".") or entry.name == "@eaDir"
        if litter or (entry.is_symlink() and (not (inside or follow) or real in chain)):
            actual.append(entry.path)
        elif entry.is_dir():
            actual += entries_of(Path(entry.path), chain, follow)
        else:
            actual.append(entry.path)
    return actual


def check(report: PackReport, unit_total: int) -> None:
    account = report.account
    assert account.balances and account.seen == unit_total, account
    assert account.left_out == report.reasons and sum(account.left_out.values()) == len(report.skipped)
    names = []
    for shard in report.shards:
        with tarfile.open(shard) as archive:
            names += archive.getnames()
    assert (
        len({name.rpartition("/")[2].split(".")[0] + name.rpartition("/")[0] for name in names})
        == report.packed
        == account.packed
    )
    assert all(name == printable(name) and not name.startswith("/") and ".." not in name.split("/") for name in names)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(ENTRY, max_size=14),
    links=st.lists(LINK, max_size=4),
    pipes=st.integers(0, 1),
    layout=st.sampled_from(["flat", "folder", "files"]),
    follow=st.booleans(),
)
def test_whatever_lies_in_a_folder_is_accounted_for(
    tmp_path: Path,
    entries: list[tuple[str, str, int]],
    links: list[tuple[str, str, str]],
    pipes: int,
    layout: Layout,
    follow: bool,
) -> None:
    source = tree(tmp_path / "t", entries, links, pipes)
    expected = entries_of(source, (), follow)
    out = tmp_path / "packed"
    shutil.rmtree(out, ignore_errors=True)
    try:
        listing = open_source(source, layout=layout, options=Options(follow_links=follow))
        report = pack(listing, out / "a", Packing(samples_per_shard=3), threads=1)
    except DataError as error:
        assert "do not add up" not in str(error) and str(error).isprintable()
        return
    check(report, len(expected))
    if layout != "files":
        shown: list[str] = []
        for shard in report.shards:
            with tarfile.open(shard) as archive:
                members = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
            shown += [json.loads(data)["path"] for name, data in members.items() if name.endswith(".json")]
        left_out = {name for name, _ in report.skipped}
        names = {printable(os.path.relpath(path, source)) for path in expected}
        texts = {name for name in names if name.lower().endswith("txt")}
        assert set(shown) | left_out | texts >= names, "every name is packed, listed or a caption"
        assert not set(shown) & left_out and len(set(shown)) == len(shown) == report.packed
        assert report.account.companions == len(texts - left_out)
    again = pack(listing, out / "a", Packing(samples_per_shard=3))
    assert (again.account, again.skipped, again.notes) == (report.account, report.skipped, report.notes)
    pack(open_source(source, layout=layout, options=Options(follow_links=follow)), out / "b", Packing(samples_per_shard=3))
    assert contents(out / "a") == contents(out / "b")


MEMBER = st.tuples(
    st.sampled_from(["1", "2", "d/1", "../x", "/abs", "a\nb", "caf\udce9", "x" * 300]),
    st.sampled_from([".jpg", ".png", ".txt", ".cls", ".json", ".a\nb", "", ".b.c"]),
    st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]),
    st.sampled_from(range(len(CONTENT))),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.lists(MEMBER, max_size=14))
def test_whatever_lies_in_a_tar_is_accounted_for(tmp_path: Path, members: list[tuple[str, str, bytes, int]]) -> None:
    shutil.rmtree(tmp_path / "t", ignore_errors=True)
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t" / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for key, extension, kind, content in members:
            entry = tarfile.TarInfo(key + extension)
            entry.type = kind
            entry.size = len(CONTENT[content]) if kind == tarfile.REGTYPE else 0
            archive.addfile(entry, io.BytesIO(CONTENT[content]))
    storage.forget()
    try:
        report = pack(open_source(tmp_path / "t" / "a.tar"), tmp_path / "t" / "out")
    except DataError as error:
        assert "do not add up" not in str(error) and str(error).isprintable()
        return
    check(report, sum(kind != tarfile.DIRTYPE for _, _, kind, _ in members))


def test_a_cut_tar_says_what_it_lost(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.{e}", picture(n) if e == "jpg" else b"x") for n in range(4) for e in ("jpg", "txt")])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:7000])
    report = pack(open_source(tmp_path / "a.tar", use_damaged=True), tmp_path / "out")
    assert report.account.left_out["cut_sample"] == 1 and report.account.balances
    assert any("used in part" in remark and "truncated" in remark for remark in report.remarks)


def test_the_account_stands_in_pack_json_and_captions_of_bad_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, data in {"a.jpg": WHOLE, "a.txt": b"one", "b.jpg": WHOLE[:80], "b.txt": b"two", "c.pdf": b"x"}.items():
        (tmp_path / "in" / name).write_bytes(data)
    report = pack(open_source(tmp_path / "in"), tmp_path / "out")
    assert report.account.text() == "5 files seen = 1 packed + 1 packed with them + 3 left out"
    assert (tmp_path / "out" / "train.skipped.txt").read_text() == "truncated\tb.jpg\nwith_image\tb.txt\nnot_an_image\tc.pdf\n"
    document = json.loads((tmp_path / "out" / "train.pack.json").read_text())
    assert document["complete"] and document["account"] == {
        "unit": "files",
        "seen": 5,
        "packed": 1,
        "companions": 1,
        "left_out": {"not_an_image": 1, "truncated": 1, "with_image": 1},
        "noted": {},
    }


def test_rows_are_accounted_for(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(WHOLE)
    (tmp_path / "b.jpg").write_bytes(WHOLE[:80])
    (tmp_path / "t.csv").write_text("path,label\na.jpg,1\na.jpg,-1\nb.jpg,2\ngone.jpg,3\n")
    report = pack(open_source(tmp_path / "t.csv"), tmp_path / "out")
    assert report.account.text() == "4 rows seen = 2 packed + 2 left out"
    assert report.account.noted == {"negative_label": 1}
    assert report.notes == ((f"{tmp_path}/t.csv:3", "negative_label"),)


@pytest.mark.parametrize("path", ["/etc/hostname", "../outside/o.jpg", "in/../../outside/o.jpg"])
def test_paths_of_a_table_stay_in_its_folder_unless_a_root_is_named(tmp_path: Path, path: str) -> None:
    source = tree(tmp_path, [("", "1.jpg", 0)], [], 0)
    (source / "t.csv").write_text(f"path\n1.jpg\n{path}\n")
    with pytest.raises(
        DataError, match=r"1 of 2 paths lie outside the table's folder, the first in .*t\.csv:3.*--root "
    ) as caught:
        open_source(source / "t.csv")
    named = str(caught.value).split("--root ")[1].split(" ")[0]
    assert len(open_source(source / "t.csv", options=Options(roots=(Path(named),)))) == 2


def test_relative_paths_are_looked_for_in_the_roots_first(tmp_path: Path) -> None:
    source = tree(tmp_path, [("", "1.jpg", 0)], [], 0)
    (source / "t.csv").write_text("path\n1.jpg\no.jpg\n")
    report = pack(open_source(source / "t.csv", options=Options(roots=(tmp_path / "outside",))), tmp_path / "out")
    assert report.packed == 2


def test_tables_do_not_read_through_links_devices_or_pipes(tmp_path: Path) -> None:
    source = tree(tmp_path, [("", "1.jpg", 0)], [("", "link.jpg", "../outside/o.jpg"), ("", "z.jpg", "/dev/zero")], 1)
    (source / "t.jsonl").write_text(
        "".join(json.dumps({"path": p}) + "\n" for p in ("1.jpg", "link.jpg", "z.jpg", "pipe0.jpg", "cat\udc80"))
    )
    report = pack(open_source(source / "t.jsonl"), tmp_path / "out")
    assert report.packed == 1
    assert report.reasons == {"missing_file": 1, "outside_link": 2, "special_file": 1}
    followed = pack(open_source(source / "t.jsonl", options=Options(follow_links=True)), tmp_path / "followed")
    assert followed.packed == 2 and followed.reasons == {"missing_file": 1, "special_file": 2}


def test_litter_and_hidden_folders_of_a_tar_are_left_out_and_counted(tmp_path: Path) -> None:
    names = ["./train.v1/1.jpg", "cat/.ipynb_checkpoints/1.jpg", "__MACOSX/cat/._1.jpg", "cat/@eaDir/1.jpg/t.jpg", "._2.jpg"]
    write_tar(tmp_path / "a.tar", [(name, WHOLE) for name in names])
    report = pack(open_source(tmp_path / "a.tar"), tmp_path / "out")
    assert report.packed == 1 and report.account.seen == 5
    assert report.account.left_out == {"hidden": 1, "litter": 1, "no_extension": 2}


@pytest.mark.parametrize("complete", [True, False])
def test_a_packing_of_a_version_with_other_rules_is_not_gone_on_with(tmp_path: Path, complete: bool) -> None:
    source = tree(tmp_path / "t", [("cat", "1.jpg", 0), ("bee", "1.jpg", 0)], [], 0)
    pack(open_source(source), tmp_path / "out")
    before, state = contents(tmp_path / "out"), tmp_path / "out" / "train.pack.json"
    document = json.loads(state.read_text()) | {"format": 1, "complete": complete}
    state.write_text(json.dumps(document))
    with pytest.raises(DataError, match="packed by another version of fovea"):
        pack(open_source(source), tmp_path / "out")
    pack(open_source(source), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_names_that_print_alike_are_counted_apart(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for stem in ("x\x01", "x\\x01"):
        (source / f"{stem}.jpg").write_bytes(WHOLE)
        (source / f"{stem}.txt").write_text(stem)
    (source / "readme.md").write_text("-")
    report = pack(open_source(source), tmp_path / "out")
    assert (report.account.seen, report.account.packed, report.account.companions) == (5, 2, 2)


def test_another_limit_is_another_packing(tmp_path: Path) -> None:
    source = tree(tmp_path / "t", [("", "1.jpg", 0)], [], 0)
    pack(open_source(source), tmp_path / "out")
    with pytest.raises(DataError, match="max_file was None and is 4096"):
        pack(open_source(source, options=Options(max_file=4096)), tmp_path / "out")


@pytest.mark.parametrize(
    ("jpg", "png", "kept"), [(WHOLE, WHOLE, 1), (WHOLE[:80], WHOLE, 1), (WHOLE, b"<html>", 1), (b"x", b"y", 0)]
)
def test_a_caption_of_two_images_is_left_out_only_with_both(tmp_path: Path, jpg: bytes, png: bytes, kept: int) -> None:
    (tmp_path / "in").mkdir()
    for name, data in {"a.jpg": jpg, "a.png": png, "a.txt": b"caption", "b.jpg": WHOLE}.items():
        (tmp_path / "in" / name).write_bytes(data)
    report = pack(open_source(tmp_path / "in"), tmp_path / "out")
    assert report.account.balances and report.account.seen == 4 and report.account.companions == kept
    assert report.account.left_out.get("with_image", 0) == 1 - kept
    captions = 0
    for shard in report.shards:
        with tarfile.open(shard) as archive:
            captions += sum(name.endswith(".txt") for name in archive.getnames())
    assert captions == report.packed - 1
