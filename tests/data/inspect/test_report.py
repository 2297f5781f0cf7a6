"""The report names what is wrong and where: counts, the first few samples, and every shard that was refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.index.build import UnusableShards, build
from pipeline.data.index.fields import STATUSES
from pipeline.data.index.image_header import inspect_header
from pipeline.data.inspect import report as module
from pipeline.data.inspect.report import MEANING, index_report
from pipeline.errors import DataError
from tests.data.pack.test_packer import picture
from tests.data.pack.test_sources import write_tar


def trouble(folder: Path) -> list[str]:
    bad = [(f"bad{n}.jpg", b"<html>") for n in range(7)]
    gif, late = ("gif.jpg", picture(1, "GIF")), ("late.jpg", b"<html>")
    write_tar(folder / "a.tar", [("1.jpg", picture(1)), *bad, gif, ("2.jpg", picture(2)), ("2.cls", b"cat")])
    write_tar(folder / "b.tar", [("3.jpg", picture(3)), late, ("README", b"?"), ("4.jpg", picture(4)), ("4.json", b"[")])
    write_tar(folder / "c.tar", [("5.jpg", picture(5))])
    return [str(folder / f"{name}.tar") for name in "abc"]


def test_every_reason_has_its_count_its_examples_and_its_shards(tmp_path: Path) -> None:
    urls = trouble(tmp_path)
    manifest = build(urls, tmp_path / "index")
    found = index_report(tmp_path / "index" / "sidecars", manifest.shards)
    assert (found.shards, found.samples, found.accepted) == (3, 14, 5)
    first, second, *notes = found.findings
    assert (first.reason, first.count, first.refused) == ("not_image", 8, True)
    assert first.examples == tuple(("a.tar", f"bad{n}") for n in range(5))
    assert first.shards == {urls[0]: 7, urls[1]: 1}
    assert (second.reason, second.examples) == ("unsupported", (("a.tar", "gif"),))
    assert {note.reason: (note.refused, note.examples) for note in notes} == {
        "bad_label": (False, (("a.tar", "2"),)),
        "bad_json": (False, (("b.tar", "4"),)),
        "no_extension": (False, (("b.tar", "README"),)),
    }
    text = found.text()
    assert "5 of 14 samples in 3 shards can be used" in text and "a.tar: bad4" in text and "bad5" not in text
    found.save(tmp_path / "out" / "report.json")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["findings"][0]["count"] == 8
    assert (tmp_path / "out" / "report.txt").read_text() == text + "\n"


def test_shards_without_a_fault_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = build(trouble(tmp_path), tmp_path / "index")
    opened: list[str] = []
    load = module.load_sidecar
    monkeypatch.setattr(module, "load_sidecar", lambda path: (opened.append(path.name), load(path))[1])
    index_report(tmp_path / "index" / "sidecars", manifest.shards)
    assert sorted(name[:5] for name in opened) == ["a.tar", "b.tar"]


def test_all_refused_shards_are_in_the_report_though_the_message_names_five(tmp_path: Path) -> None:
    urls = trouble(tmp_path)
    for n in range(7):
        (tmp_path / f"cut{n}.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: 3000 + n])
        urls.append(str(tmp_path / f"cut{n}.tar"))
    with pytest.raises(UnusableShards, match=r"7 of 10 shards.*and 2 more") as caught:
        build(urls, tmp_path / "index")
    found = index_report(tmp_path / "index" / "sidecars", caught.value.shards, caught.value.problems)
    assert [Path(shard).name for shard, _, _ in found.refused] == [f"cut{n}.tar" for n in range(7)]
    assert "cut6.tar: is truncated" in found.text() and "cut6.tar" not in found.text(most_shards=3)
    assert found.shards == 10 and found.accepted == 5
    used = build(urls, tmp_path / "index", on_truncated="keep-readable")
    assert len(index_report(tmp_path / "index" / "sidecars", used.shards).damaged) == 7


def test_nothing_usable_still_has_a_report(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"no")])
    with pytest.raises(UnusableShards, match="no sample can be used") as caught:
        build([str(tmp_path / "a.tar")], tmp_path / "index")
    (finding,) = index_report(tmp_path / "index" / "sidecars", caught.value.shards, caught.value.problems).findings
    assert (finding.reason, finding.examples) == ("not_image", (("a.tar", "1"),))


def test_every_status_is_explained() -> None:
    assert set(STATUSES) - {"ok"} <= MEANING.keys()
    assert inspect_header(b"").status in MEANING


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    manifest = build(trouble(tmp_path), tmp_path / "index")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        index_report(tmp_path / "index" / "sidecars", manifest.shards).save(tmp_path / "file" / "report.json")
