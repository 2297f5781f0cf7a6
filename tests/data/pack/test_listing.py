"""Listing a folder tree: links, loops, litter and special files are counted; nothing outside is read unasked."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from pipeline.data.pack.listing import list_files, litter_reason
from pipeline.data.pack.samples import SkippedSample, read_file
from pipeline.data.pack.sources import Options, open_source
from pipeline.errors import DataError
from tests.data.pack.test_packer import contents, packed, picture

LITTER = [
    *(".ipynb_checkpoints", ".Trash-1000", ".git", ".DS_Store", "._a.jpg", ".fseventsd", ".AppleDouble", ".thumbnails"),
    *("@eaDir", "__MACOSX", "#recycle", "lost+found", "System Volume Information", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini"),
]


def put(path: Path, seed: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed))
    return path


@pytest.mark.parametrize("name", LITTER)
@pytest.mark.parametrize("place", ["", "cat", "cat/deep"])
def test_litter_is_neither_data_nor_a_class_but_counted(tmp_path: Path, name: str, place: str) -> None:
    for label in ("cat", "zebra"):
        put(tmp_path / "in" / label / "1.jpg")
    put(tmp_path / "in" / place / name / "inner" / "old.jpg", 2)
    put(tmp_path / "in" / place / name / "old.jpg", 2)
    report = packed(tmp_path / "in", tmp_path / "out")
    assert (report.packed, report.classes) == (2, ("cat", "zebra"))
    # Not entered: a file server's snapshots hold the whole set again, many times over.
    assert report.account.left_out == {litter_reason(name): 1} and report.account.seen == 3


def test_a_hidden_root_is_no_litter(tmp_path: Path) -> None:
    put(tmp_path / ".cache" / "@eaDir" / "cat" / "1.jpg")
    assert len(open_source(tmp_path / ".cache" / "@eaDir")) == 1


def test_folders_without_a_usable_image_are_no_classes_and_named(tmp_path: Path) -> None:
    put(tmp_path / "bee" / "1.jpg")
    put(tmp_path / "bee" / "2.jpg")
    for name, data in {"broken": picture(1)[:60], "empty_files": b"", "pages": b"<html>"}.items():
        (put(tmp_path / name / "1.jpg")).write_bytes(data)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.json").write_text("{}")
    (tmp_path / "nothing").mkdir()
    source = open_source(tmp_path)
    assert source.classes == ("bee",)
    assert (
        "5 folders contain no usable image and are not a class: annotations, broken, empty_files, nothing, pages"
        in source.remarks
    )
    assert dict(source.left_out) == {"annotations/a.json": "not_an_image", "empty_files/1.jpg": "empty_file"}


def test_links_inside_the_folder_are_followed_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path / "store" / "1.jpg")
    (tmp_path / "alias").symlink_to("store")
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "2.jpg").symlink_to("../store/1.jpg")
    (tmp_path / "store" / "up").symlink_to("..")
    (tmp_path / "store" / "self").symlink_to(".")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    listing = list_files(tmp_path)
    assert [file.shown for file in listing.files] == ["alias/1.jpg", "file/2.jpg", "store/1.jpg"]
    assert dict(listing.left_out) == {
        "alias/self": "link_loop",
        "alias/up": "link_loop",
        "gone.txt": "broken_link",
        "round": "link_loop",
        "store/self": "link_loop",
        "store/up": "link_loop",
    }


def test_links_that_multiply_end(tmp_path: Path) -> None:
    for level in range(24):
        (tmp_path / f"{level:02d}").mkdir()
        put(tmp_path / f"{level:02d}" / "1.jpg")
        for name in "ab":
            (tmp_path / f"{level:02d}" / name).symlink_to(f"../{(level + 1) % 24:02d}")
    listing = list_files(tmp_path)
    assert len(listing.files) < 24 * 40 and listing.reasons["link_loop"] > 0


def test_two_folders_that_link_to_each_other_end_with_follow_links(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a" / "1.jpg")
    put(tmp_path / "other" / "2.jpg")
    (tmp_path / "in" / "a" / "there").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "in")
    listing = list_files(tmp_path / "in", follow_links=True)
    assert [file.shown for file in listing.files] == ["a/1.jpg", "a/there/2.jpg"]
    assert listing.left_out == (("a/there/back", "link_loop"),)


def test_special_files_are_counted_and_nothing_waits_for_them(tmp_path: Path) -> None:
    put(tmp_path / "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
    for options in (Options(), Options(follow_links=True)):
        source = open_source(tmp_path, options=options)
        assert len(source) == 1
        assert dict(source.left_out) == {name: "special_file" for name in ("pipe.jpg", "zero.jpg", "s.jpg")}


def test_a_tree_deeper_than_the_stack_is_listed(tmp_path: Path) -> None:
    put(tmp_path.joinpath(*["d"] * 300) / "1.jpg")
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(250)
        listing = list_files(tmp_path)
    finally:
        sys.setrecursionlimit(before)
    assert [len(file.parts) for file in listing.files] == [301]


def test_a_file_that_says_nothing_of_its_size_is_read_up_to_the_limit() -> None:
    assert read_file("/proc/self/status").startswith(b"Name:")
    with pytest.raises(SkippedSample, match="file_too_large"):
        read_file("/proc/self/status", limit=10)


# ---- links that leave the folder -------------------------------------------------------------------------------------------


def lead_out(folder: Path, how: str) -> None:
    """A source below ``in`` of which a part is links to ``store``."""
    for label in ("ant", "bee"):
        for n in range(3):
            put(folder / "store" / label / f"{n}.jpg", n)
    put(folder / "in" / "cat" / "0.jpg", 7)
    target = folder / "store" / "ant"
    if how == "class":
        (folder / "in" / "ant").symlink_to("../store/ant")
    elif how == "absolute class":
        (folder / "in" / "ant").symlink_to(target)
    elif how == "files":
        (folder / "in" / "ant").mkdir()
        for n in range(3):
            (folder / "in" / "ant" / f"{n}.jpg").symlink_to(target / f"{n}.jpg")
    elif how == "inside a class":
        (folder / "in" / "cat" / "more").symlink_to(target)
    elif how == "most of a class":
        for n in range(1, 3):
            (folder / "in" / "cat" / f"{n}.jpg").symlink_to(target / f"{n}.jpg")
    elif how == "chain":
        (folder / "in" / "ant").symlink_to("hop")
        (folder / "in" / "hop").symlink_to("../store/ant")
    elif how == "dangling":
        (folder / "in" / "ant").symlink_to("../gone/ant")


@pytest.mark.parametrize("how", ["class", "absolute class", "files", "inside a class", "most of a class", "chain", "dangling"])
@pytest.mark.parametrize("layout", ["auto", "flat", "files"])
def test_a_part_lost_by_links_is_an_error_until_the_user_decides(tmp_path: Path, how: str, layout: str) -> None:
    lead_out(tmp_path, how)
    with pytest.raises(DataError, match=r"links leave the folder or are broken.*--follow-links.*--no-follow-links"):
        open_source(tmp_path / "in", layout=layout)  # type: ignore[arg-type]
    without = open_source(tmp_path / "in", layout=layout, options=Options(follow_links=False))  # type: ignore[arg-type]
    assert len(without) == 1 and {reason for _, reason in without.left_out} <= {"outside_link", "broken_link"}
    assert without.left_out
    followed = open_source(tmp_path / "in", layout=layout, options=Options(follow_links=True))  # type: ignore[arg-type]
    assert len(followed) == {"most of a class": 3, "dangling": 1, "chain": 7}.get(how, 4)
    for position in range(len(followed)):
        assert followed.load(position).image


def test_linked_classes_are_packed_as_if_they_were_there(tmp_path: Path) -> None:
    for label in ("ant", "bee"):
        put(tmp_path / "store" / label / "1.jpg")
        put(tmp_path / "plain" / label / "1.jpg")
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / label).symlink_to(f"../store/{label}")
    from pipeline.data.pack.packer import pack

    pack(open_source(tmp_path / "in", options=Options(follow_links=True)), tmp_path / "a")
    pack(open_source(tmp_path / "plain"), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_few_linked_texts_are_counted_not_read(tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("PRIVATE KEY")
    for n in range(3):
        put(tmp_path / "in" / "00000" / f"00000000{n}.jpg")
        (tmp_path / "in" / "00000" / f"00000000{n}.json").write_text("{}")
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    (tmp_path / "in" / "00000" / "000000000.txt").symlink_to(tmp_path / "id_rsa")
    (tmp_path / "in" / "00000" / "000000001.pem").symlink_to("/etc/passwd")
    for layout in ("auto", "flat", "folder"):
        report_out = tmp_path / layout
        from pipeline.data.pack.packer import pack

        report = pack(open_source(tmp_path / "in", layout=layout), report_out)  # type: ignore[arg-type]
        assert report.packed == 3 and report.account.left_out["outside_link"] == 2
        assert not any(b"PRIVATE KEY" in data or b"root:" in data for data in contents(report_out).values())


def test_a_file_that_becomes_a_link_after_the_listing_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    put(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "a.txt").write_text("caption")
    put(tmp_path / "in" / "b.jpg")
    source = open_source(tmp_path / "in")
    (tmp_path / "in" / "b.jpg").unlink()
    (tmp_path / "in" / "b.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "in" / "a.txt").unlink()
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "secret.jpg")
    for position, reason in enumerate(("caption_outside_link", "outside_link")):
        with pytest.raises(SkippedSample, match=reason):
            source.load(position)


def test_linked_shards_of_a_folder_are_refused_or_followed(tmp_path: Path) -> None:
    from tests.data.pack.test_sources import write_tar

    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "away.tar", [("1.jpg", picture(1))])
    write_tar(tmp_path / "in" / "a.tar", [("2.jpg", picture(2))])
    (tmp_path / "in" / "b.tar").symlink_to("../away.tar")
    with pytest.raises(DataError, match="follow-links"):
        open_source(tmp_path / "in")
    assert len(open_source(tmp_path / "in", options=Options(follow_links=True))) == 2
    source = open_source(tmp_path / "in", options=Options(follow_links=False))
    assert len(source) == 1 and source.left_out == [("b.tar", "outside_link")]


def test_files_larger_than_the_limit_are_left_out(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jpg")
    put(tmp_path / "in" / "b.jpg")
    with (tmp_path / "in" / "b.jpg").open("r+b") as file:
        file.truncate(5 << 30)
    from pipeline.data.pack.packer import pack

    report = pack(open_source(tmp_path / "in"), tmp_path / "out")
    assert report.packed == 1 and report.reasons == {"file_too_large": 1}
