"""Every odd archive has its expected outcome; damage is never taken for the end."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.index import tar
from pipeline.errors import DataError

LONG = "a-directory-with-a-name/" * 6 + "sample-" + "x" * 120 + ".jpg"


def archive(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as writer:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            writer.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def put(folder: Path, data: bytes) -> str:
    path = folder / "shard.tar"
    path.unlink(missing_ok=True)  # a new inode, as a copy or a rename makes it
    path.write_bytes(data)
    tar.storage.forget()
    return str(path)


def contents(url: str) -> list[tuple[str, bytes]]:
    data = Path(url).read_bytes()
    return [(m.name, data[m.offset : m.offset + m.size]) for m in tar.walk(url) if m.kind == "file"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", [LONG, "with space.jpg", "größe/日本.jpg", "img.v1.0001.jpg", "UPPER.JPG", "line\nbreak.jpg"])
def test_names_of_any_kind_are_read_with_their_own_bytes(tmp_path: Path, form: int, name: str) -> None:
    members = [("before.jpg", b"b" * 700), (name, b"data of it"), ("after.cls", b"1")]
    assert contents(put(tmp_path, archive(members, form))) == members


def test_long_names_fit_ustar_prefixes(tmp_path: Path) -> None:
    name = "d" * 120 + "/" + "f" * 90 + ".jpg"
    assert contents(put(tmp_path, archive([(name, b"1")]))) == [(name, b"1")]


def test_pax_times_and_sizes_do_not_confuse(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as writer:
        for number in range(2):
            entry = tarfile.TarInfo(f"{number}.jpg")
            entry.size, entry.mtime = 3, 1.5
            writer.addfile(entry, io.BytesIO(b"abc"))
    assert contents(put(tmp_path, buffer.getvalue())) == [("0.jpg", b"abc"), ("1.jpg", b"abc")]


def test_links_devices_and_directories_come_with_their_kind(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as writer:
        for name, kind in [
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c", tarfile.DIRTYPE),
            ("d", tarfile.FIFOTYPE),
        ]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "e.jpg"
            writer.addfile(entry)
        entry = tarfile.TarInfo("e.jpg")
        entry.size = 2
        writer.addfile(entry, io.BytesIO(b"ok"))
    found = [(m.name, m.kind) for m in tar.walk(put(tmp_path, buffer.getvalue()))]
    assert found == [("a.jpg", "link"), ("b.jpg", "link"), ("c", "directory"), ("d", "device"), ("e.jpg", "file")]


def test_pax_sparse_members_are_told_apart(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as writer:
        entry = tarfile.TarInfo("a.jpg")
        entry.size, entry.pax_headers = 4, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"}
        writer.addfile(entry, io.BytesIO(b"map!"))
    assert [m.kind for m in tar.walk(put(tmp_path, buffer.getvalue()))] == ["sparse"]


def damage(url: str) -> tar.TarDamage:
    with pytest.raises(tar.TarDamage) as caught:
        list(tar.walk(url))
    assert url in str(caught.value)
    return caught.value


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = archive([("0.jpg", b"x" * 600), (LONG, b"y" * 512), ("1.cls", b"2")], tarfile.GNU_FORMAT)
    end = whole.rstrip(b"\0")
    end_of_members = -(-len(end) // 512) * 512
    assert contents(put(tmp_path, whole[: end_of_members + 1024]))
    for length in range(512, end_of_members + 1024, 512):
        assert damage(put(tmp_path, whole[:length])).reason == "truncated", length
    for length in (1, 511):
        assert damage(put(tmp_path, whole[:length])).reason == "not_tar"
    for length in (513, 1300, end_of_members + 1023):
        assert damage(put(tmp_path, whole[:length])).reason == "truncated"


def test_members_before_a_cut_are_handed_on(tmp_path: Path) -> None:
    url = put(tmp_path, archive([("0.jpg", b"x" * 600), ("1.jpg", b"y" * 600)])[: 512 + 1024 + 512 + 100])
    found = []
    with pytest.raises(tar.TarDamage):
        for member in tar.walk(url):
            found.append(member.name)
    assert found == ["0.jpg"]


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (b"", "empty_file", "empty file"),
        (b"hello, this is text" * 100, "not_tar", "not a tar archive"),
        (gzip.compress(archive([("0.jpg", b"1")]), mtime=0), "compressed", "gzip"),
        (b"BZh91AY&SY" + b"1" * 600, "compressed", "bzip2"),
        (archive([("0.jpg", b"1" * 10)]) + archive([("1.jpg", b"1")]), "trailing", "end marker"),
    ],
    ids=["empty", "text", "gzip", "bzip2", "two archives"],
)
def test_what_is_no_plain_tar_is_told_why(tmp_path: Path, data: bytes, reason: str, words: str) -> None:
    error = damage(put(tmp_path, data))
    assert error.reason == reason
    assert words in str(error)


def test_a_wrong_checksum_is_damage_not_the_end(tmp_path: Path) -> None:
    data = bytearray(archive([("0.jpg", b"1"), ("1.jpg", b"2")]))
    data[1024 + 3] ^= 1
    error = damage(put(tmp_path, bytes(data)))
    assert (error.reason, error.at) == ("corrupt", 1024)


def test_an_archive_without_members_is_whole(tmp_path: Path) -> None:
    assert list(tar.walk(put(tmp_path, archive([])))) == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a.b/0001.SEG.PNG", ("a.b/0001", "seg.png")),
        ("img.v1.0001.jpg", ("img", "v1.0001.jpg")),
        ("./d/0001.jpg", ("./d/0001", "jpg")),
        ("README", None),
        (".hidden", None),
        ("a.b/README", None),
        ("name.", None),
    ],
)
def test_keys_follow_webdataset(name: str, parts: tuple[str, str] | None) -> None:
    assert tar.split_name(name) == parts


def test_damage_survives_pickling(tmp_path: Path) -> None:
    error = damage(put(tmp_path, b"no"))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.reason, copy.at) == (str(error), error.reason, error.at)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300), st.binary(max_size=1500)
        ),
        max_size=6,
    ),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_what_tarfile_writes_is_read_back(tmp_path: Path, members: list[tuple[str, bytes]], form: int) -> None:
    members = [(name, data) for name, data in members if not name.endswith("/")]
    assert contents(put(tmp_path, archive(members, form))) == members


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_raise_anything_but_data_errors(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(
        archive([("0.jpg", b"x" * 600), (LONG, b"y" * 100), ("größe.jpg", b"2")], data.draw(st.sampled_from([1, 2])))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    url = put(tmp_path, bytes(whole))
    try:
        for member in tar.walk(url):
            assert 0 <= member.offset <= member.offset + member.size <= len(whole)
    except DataError:
        pass


def sparse(maps: int, data: bytes, stored: int | None = None) -> bytes:
    """An archive of an old GNU sparse member, whose map spans further blocks, and a member after it."""
    entry = tarfile.TarInfo("holes.jpg")
    entry.type, entry.size = tarfile.GNUTYPE_SPARSE, len(data)
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[482] = min(maps, 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    blocks = b"".join(bytes(504) + bytes([number < maps - 1]) + bytes(7) for number in range(maps))
    return bytes(header) + blocks + data.ljust(-(-len(data) // 512) * 512, b"\0") + archive([("next.jpg", b"after")])


@pytest.mark.parametrize("maps", [0, 1, 2])
def test_the_data_of_an_old_sparse_member_begins_after_its_map(tmp_path: Path, maps: int) -> None:
    whole = sparse(maps, b"d" * 600)
    members = list(tar.walk(put(tmp_path, whole)))
    assert [(m.name, m.kind, m.offset, m.size) for m in members] == [
        ("holes.jpg", "sparse", 512 * (1 + maps), 600),
        ("next.jpg", "file", 512 * (1 + maps) + 1024 + 512, 5),
    ]
    for map_blocks in range(maps):
        error = damage(put(tmp_path, whole[: 512 * (1 + map_blocks)]))
        assert (error.reason, error.at) == ("truncated", 0) and "map of a sparse member" in str(error)


def test_what_is_no_tar_stops_at_its_first_byte(tmp_path: Path) -> None:
    for data in (b"", b"text" * 300, gzip.compress(b"x" * 600), b"PK\x03\x04" + b"z" * 600):
        assert damage(put(tmp_path, data)).at == 0


def test_the_runs_before_damage_come_first_and_the_last_may_lack_members(tmp_path: Path) -> None:
    whole = archive([("a.jpg", b"1"), ("a.cls", b"2"), ("README", b"3"), ("b.jpg", b"4"), ("b.cls", b"5")])
    for cut, expected in ((512 * 8, [("a", ["jpg", "cls"]), ("b", ["jpg"])]), (512 * 4, [("a", ["jpg", "cls"])]), (512, [])):
        found, notes = [], tar.Notes()
        with pytest.raises(tar.TarDamage):
            for key, members in tar.samples(put(tmp_path, whole[:cut]), notes):
                found.append((key, list(members)))
        assert found == expected
    assert [(key, list(members)) for key, members in tar.samples(put(tmp_path, whole), tar.Notes())] == [
        ("a", ["jpg", "cls"]),
        ("b", ["jpg", "cls"]),
    ]


def test_damage_ends_the_use_of_an_archive_or_drops_the_sample_before_it(tmp_path: Path) -> None:
    whole = archive([("a.jpg", b"1"), ("b.jpg", b"2")])
    corrupt = whole[:2048] + b"\1" * 512 + bytes(1024)
    for data, keys, dropped in ((whole[:1536], [], ["a"]), (corrupt, ["a"], ["b"]), (whole + whole, ["a", "b"], [])):
        url, notes = put(tmp_path, data), tar.Notes()
        with pytest.raises(tar.TarDamage):
            tar.runs(url, tar.Notes())
        groups, reason = tar.runs(url, notes, use_damaged=True)
        assert ([key for key, _ in groups], notes.examples.get("cut_sample", [])) == (keys, dropped)
        assert url in reason
    with pytest.raises(tar.TarDamage, match="not a tar"):
        tar.runs(put(tmp_path, b"text" * 300), tar.Notes(), use_damaged=True)
    groups, reason = tar.runs(put(tmp_path, whole), tar.Notes())
    assert ([key for key, _ in groups], reason) == (["a", "b"], "")


def test_notes_count_everything_and_name_the_first_five(tmp_path: Path) -> None:
    members = [(f"name{number}", b"") for number in range(7)] + [("a.jpg", b"1")]
    notes = tar.Notes()
    assert [key for key, _ in tar.samples(put(tmp_path, archive(members)), notes)] == ["a"]
    assert (notes, notes.examples) == ({"no_extension": 7}, {"no_extension": [f"name{number}" for number in range(5)]})


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([("a", {"jpg"}), ("b", {"jpg"})], ["", ""]),
        ([("a", {"jpg"}), ("a", {"jpg", "cls"})], ["", "duplicate_key"]),
        ([("a", {"jpg"}), ("b", {"jpg"}), ("a", {"cls"})], ["not_adjacent", "", "not_adjacent"]),
        ([("a", {"jpg"}), ("a", {"cls"}), ("a", {"cls"})], ["not_adjacent", "not_adjacent", "duplicate_key"]),
    ],
)
def test_runs_of_one_key_are_in_doubt(runs: list[tuple[str, set[str]]], expected: list[str]) -> None:
    assert tar.doubts(runs) == expected


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (b"13 path=ab.c\n", ""),
        (b"13 path=ab.c\n" + bytes(5), ""),
        (b"14 path=ab.c\n", "PAX header is damaged"),
        (b"12 path=ab.c\n", "PAX header is damaged"),
        (b"2 path=ab.c\n", "PAX header is damaged"),
        (b"9 path.c\n", "PAX header is damaged"),
        (b"path=ab.c\n", "PAX header is damaged"),
        (b" path=ab.c\n", "PAX header is damaged"),
        (b"0 path=ab.c\n", "PAX header is damaged"),
        (b"00000000000000000000033 path=ab.c\n", "PAX header is damaged"),
    ],
)
def test_each_record_of_a_pax_header_must_have_its_length(tmp_path: Path, records: bytes, reason: str) -> None:
    header = tarfile.TarInfo("PaxHeaders")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    block = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    url = put(tmp_path, block + archive([("0.jpg", b"1"), ("1.jpg", b"2")]))
    if reason:
        assert reason in str(damage(url)) and damage(url).at == 0
    else:
        assert [m.name for m in tar.walk(url)] == ["ab.c", "1.jpg"]  # its own, of one member
    empty = tarfile.TarInfo("PaxHeaders")
    empty.type = tarfile.XHDTYPE
    assert [m.name for m in tar.walk(put(tmp_path, empty.tobuf() + archive([("0.jpg", b"1")])))] == ["0.jpg"]


@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_records_larger_than_any_header_are_refused(tmp_path: Path, size: int) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, size
    block = name.tobuf(tarfile.GNU_FORMAT) + b"n.jpg".ljust(-(-size // 512) * 512, b"\0")
    url = put(tmp_path, block + archive([("0.jpg", b"1")]))
    if size > 1 << 20:
        assert f"claims {size} bytes" in str(damage(url))
        return
    assert [m.name for m in tar.walk(url)] == ["n.jpg"]
    for cut in (512, 511 + size):
        assert damage(put(tmp_path, block[:cut])).at == 0
    ended = put(tmp_path, block + bytes(1024))
    assert "followed by no member" in str(damage(ended))


def test_a_member_may_fill_the_file_to_its_last_byte_but_the_end_marker_has_two_blocks(tmp_path: Path) -> None:
    whole = archive([("0.jpg", b"x" * 512)])[:1024]
    assert "end marker is missing" in str(damage(put(tmp_path, whole)))
    assert "reaches 1 bytes past the end" in str(damage(put(tmp_path, whole[:-1])))
    assert "half of the end marker is missing" in str(damage(put(tmp_path, whole + bytes(1023))))
    assert contents(put(tmp_path, whole + bytes(1024))) == [("0.jpg", b"x" * 512)]
    late = damage(put(tmp_path, whole + bytes((1 << 20) + 2048) + b"\1"))
    assert (late.reason, late.at) == ("trailing", 1024)
