"""``fovea shards push``, ``pull`` and ``pack`` to a bucket: against a real S3 server behind a proxy that misbehaves or kills."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.settings import StorageSettings
from pipeline.data.storage.listing import Listing, digest, same
from pipeline.data.storage.remote import Remote
from tests.data.pack.test_packer import contents, picture
from tests.helpers.commands import fovea
from tests.helpers.limits import hang_limit
from tests.helpers.runs import ROOT, environment
from tests.helpers.s3 import KEYS, Proxy, Trouble, proxy, upload

BIG = 12_000_000  # more than the smallest part of a multipart upload
_numbers = iter(range(10**6))


@pytest.fixture
def door(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The server through a proxy, which the commands find as their endpoint; their state lies below ``tmp_path``."""
    with proxy(s3_port) as one:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        values = {**KEYS, "AWS_ENDPOINT_URL": one.endpoint, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        yield one


@pytest.fixture
def target(s3_port: int) -> str:
    """An empty folder in a bucket."""
    upload(s3_port, "lab", {})
    return f"s3://lab/set{next(_numbers)}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number, size in enumerate((34_000_000, 300, 20_000, 0)):
        (folder / f"web-{number:05d}.tar").write_bytes(random.Random(number).randbytes(size))
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "private.key").write_text("not of the set")
    return folder


def remote(door: Proxy) -> Remote:
    return Remote(StorageSettings(endpoint=door.endpoint, outage_timeout=20.0))


def objects(door: Proxy, target: str) -> dict[str, tuple[int, str]]:
    folder = f"{target}/"
    return {about.url.removeprefix(folder): (about.size, about.tag) for about in remote(door).list(folder)}


def puts(door: Proxy) -> list[str]:
    """Objects of which data were sent."""
    return sorted({name.split("/")[-1] for name in door.seen if name.startswith("PUT ")} - {"shards.json"})


def test_push_sends_shards_and_lists_verifies_them_and_writes_the_listing_last(
    door: Proxy, target: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []
    door.on_request = lambda method, path: order.append(path) if method in ("PUT", "POST") else None
    assert fovea("shards", "push", shards, target) == 0
    printed = capsys.readouterr().out
    assert "5 copied (34.0 MB), 0 equal already, 0 failed" in printed and "not sent: 1 other files" in printed
    assert order[-1].endswith("/shards.json")
    there = objects(door, target)
    names = ["classes.txt", *(f"web-{n:05d}.tar" for n in range(4))]
    assert sorted(there) == sorted([*names, "shards.json"]), "nothing but the set is sent"
    assert there["web-00000.tar"][1].strip('"').endswith("-3"), "in parts"
    store = remote(door)
    listing = store.read(about := store.stat(f"{target}/shards.json"), 0, about.size)
    files = json.loads(listing)["files"]
    for name in names:
        content = (shards / name).read_bytes()
        assert (files[name]["bytes"], files[name]["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert files[name]["tag"] == there[name][1]
    door.seen.clear()
    assert fovea("shards", "push", shards, target) == 0
    assert "0 copied (0.0 MB), 5 equal already, 0 failed" in capsys.readouterr().out
    assert door.total("PUT") == door.total("POST") == 0, "the second call sends nothing, the listing neither"


def test_equality_is_content_whatever_the_parts_of_the_upload(
    door: Proxy, target: str, s3_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    content = random.Random(9).randbytes(BIG)
    (folder / "a.tar").write_bytes(content)
    own = digest(folder / "a.tar", 5 << 20)
    assert own.sha256 == hashlib.sha256(content).hexdigest() and own.md5 == hashlib.md5(content).hexdigest()
    store = Remote(StorageSettings(endpoint=door.endpoint, part_size_mb=5))
    store.put(folder / "a.tar", f"{target}/a.tar")
    about = store.stat(f"{target}/a.tar")
    assert about.tag.strip('"') == own.tag, "the ETag that S3 computes"
    door.served = 0
    assert same(store, own, about, Listing()) and not door.served
    assert fovea("shards", "push", folder, target) == 0, "another size of parts: the object is read and found equal"
    assert "0 copied (0.0 MB), 1 equal already" in capsys.readouterr().out and door.served >= BIG
    (folder / "a.tar").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fovea("shards", "push", folder, target) == 1
    assert "failed: a.tar: " in (printed := capsys.readouterr().out) and "exists with other content" in printed
    assert same(store, own, store.stat(f"{target}/a.tar"), Listing()), "nothing is replaced unasked"
    assert fovea("shards", "push", folder, target, "--overwrite") == 0
    assert not same(store, own, store.stat(f"{target}/a.tar"), Listing())


def killed_at(door: Proxy, pattern: str, after: int, *words: str | Path) -> None:
    """Runs a command and kills it with SIGKILL when it makes a request of that kind, of which some may pass before."""
    import re

    number = 0
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli.main", *map(str, words)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def kill(method: str, path: str) -> None:
        nonlocal number
        if re.search(pattern, f"{method} {path}"):
            number += 1
            if number == after + 1:
                process.send_signal(signal.SIGKILL)
                process.wait()
                raise ConnectionResetError  # the request does not reach the server

    door.on_request = kill
    try:
        with hang_limit():
            assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        door.on_request = None


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "after"), [(r"PUT .*web-00000", 1), (r"POST .*web-00000", 1), (r"PUT .*shards.json", 0)])
def test_a_push_killed_anywhere_shows_complete_objects_only_and_continues(
    door: Proxy, target: str, shards: Path, pattern: str, after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_at(door, pattern, after, "shards", "push", shards, target)
    there = objects(door, target)
    assert "shards.json" not in there, "the listing comes last"
    assert all(size == (shards / name).stat().st_size for name, (size, _) in there.items())
    door.seen.clear()
    assert fovea("shards", "push", shards, target) == 0
    assert not set(puts(door)) & set(there), "what has arrived is not sent again"
    assert f"{5 - len(there)} copied" in capsys.readouterr().out
    assert len(objects(door, target)) == 6


def begin_push(folder: Path, target: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli.main", "shards", "push", str(folder), target]
    return subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("existing", [False, True])
def test_of_two_pushes_to_one_folder_neither_drops_the_others_files_from_the_listing(
    door: Proxy, target: str, shards: Path, tmp_path: Path, existing: bool
) -> None:
    """The second one sends everything and its listing just before the first one writes its own."""
    for name in ("first", "second", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.tar").write_bytes(name.encode() * 1000)
    if existing:
        assert fovea("shards", "push", tmp_path / "old", target) == 0
    answers = []

    def interrupt(method: str, path: str) -> None:
        if method == "PUT" and path.partition("?")[0].endswith("shards.json"):
            door.on_request = None
            process = begin_push(tmp_path / "second", target)
            answers.append((process.communicate()[0], process.returncode))

    door.on_request = interrupt
    assert fovea("shards", "push", tmp_path / "first", target) == 0
    ((text, code),) = answers
    assert code == 0 and "1 copied" in text, text
    store = remote(door)
    about = store.stat(f"{target}/shards.json")
    listed = json.loads(store.read(about, 0, about.size))["files"]
    assert sorted(listed) == ["first.tar", *(["old.tar"] if existing else []), "second.tar"]


def test_two_pushes_of_one_directory_at_once_both_succeed(door: Proxy, target: str, shards: Path, tmp_path: Path) -> None:
    both = [begin_push(shards, target) for _ in range(2)]
    answers = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert len(objects(door, target)) == 6
    assert fovea("shards", "pull", target, tmp_path / "out") == 0
    for path in shards.glob("web-*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_pull_fetches_verifies_and_does_not_fetch_again(
    door: Proxy, target: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fovea("shards", "push", shards, target) == 0
    out = tmp_path / "out"
    assert fovea("shards", "pull", target, out) == 0
    assert "5 copied (34.0 MB), 0 equal already, 0 failed" in capsys.readouterr().out
    for name in ("web-00000.tar", "web-00001.tar", "web-00002.tar", "web-00003.tar", "classes.txt"):
        assert (out / name).read_bytes() == (shards / name).read_bytes()
    door.served = 0
    assert fovea("shards", "pull", target, out) == 0
    assert "0 copied (0.0 MB), 5 equal already" in capsys.readouterr().out and door.served < 10_000
    (out / "web-00001.tar").write_bytes(b"x" * 300)
    assert fovea("shards", "pull", target, out) == 1
    assert "exists with other content" in capsys.readouterr().out
    assert fovea("shards", "pull", f"{target}/web-{{00000..00001}}.tar", out, "--overwrite") == 0
    assert "1 copied (0.0 MB), 1 equal already" in capsys.readouterr().out
    assert (out / "web-00001.tar").read_bytes() == (shards / "web-00001.tar").read_bytes()
    (out / ".pulled.jsonl").unlink()
    assert fovea("shards", "pull", target, out) == 0
    assert "0 copied (0.0 MB), 5 equal already" in capsys.readouterr().out, "without its record, by checksum"


def test_pull_tells_what_the_bucket_cannot_prove(
    door: Proxy, target: str, s3_port: int, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fovea("shards", "push", shards, target) == 0
    store = remote(door)
    store.delete(f"{target}/web-00002.tar")
    assert fovea("shards", "pull", target, tmp_path / "out") == 1
    assert "missing in the bucket, although its shards.json names them: web-00002.tar" in capsys.readouterr().out
    about = store.stat(f"{target}/shards.json")
    listing = json.loads(store.read(about, 0, about.size))
    listing["files"]["web-00001.tar"]["sha256"] = "0" * 64
    del listing["files"]["web-00002.tar"]
    store.put_bytes(json.dumps(listing).encode(), f"{target}/shards.json")
    assert fovea("shards", "pull", target, tmp_path / "damaged") == 1
    printed = capsys.readouterr().out
    assert "3 copied" in printed and "failed: web-00001.tar: " in printed and "arrived with another checksum" in printed
    assert not list((tmp_path / "damaged").glob("*00001.tar*"))
    store.delete(f"{target}/shards.json")
    assert fovea("shards", "pull", target, tmp_path / "two") == 0
    assert "compared by size only, since the bucket has no checksum: 1 files" in capsys.readouterr().out
    store.put_bytes(b'{"format": 1, "files": {"../evil": {"bytes": 1, "sha256": "%s"}}}' % (b"0" * 64), f"{target}/shards.json")
    assert fovea("shards", "pull", target, tmp_path / "three") == 2
    assert "Traceback" not in capsys.readouterr().err
    store.put_bytes(b"no json", f"{target}/shards.json")
    assert fovea("shards", "pull", target, tmp_path / "four") == 2
    assert "is not a listing of shards" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pull_killed_in_the_middle_shows_no_half_file_and_continues(
    door: Proxy, target: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fovea("shards", "push", shards, target) == 0
    out = tmp_path / "out"
    killed_at(door, r"GET .*web-00000", 1, "shards", "pull", target, out)
    assert not list(out.glob("[!.]*")), "the first file was not complete"
    assert fovea("shards", "pull", target, out) == 0
    assert not list(out.glob(".*.pull"))
    assert (out / "web-00000.tar").read_bytes() == (shards / "web-00000.tar").read_bytes()


def test_an_object_replaced_during_the_transfer_is_named(
    door: Proxy, target: str, s3_port: int, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = f"{target.removeprefix('s3://lab/')}/web-00001.tar"

    def replace(method: str, path: str) -> None:
        if method == kind and path.endswith("web-00001.tar") and (method == "GET" or "PUT " + path in door.seen):
            (tmp_path / "other").write_bytes(os.urandom(300))
            upload(s3_port, "lab", {key: tmp_path / "other"})

    kind, door.on_request = "HEAD", replace
    assert fovea("shards", "push", shards, target) == 1
    printed = capsys.readouterr().out
    assert "4 copied" in printed and "1 failed" in printed and "was replaced or deleted by another program" in printed
    assert "shards.json" not in objects(door, target), "an incomplete set is not listed"
    kind = "GET"
    assert fovea("shards", "pull", target, tmp_path / "out") == 1
    assert "web-00001.tar: " in (printed := capsys.readouterr().out) and "was replaced while it was fetched" in printed
    assert not (tmp_path / "out" / "web-00001.tar").exists()


def test_a_server_that_dies_in_the_middle_ends_the_command_with_the_counts(
    door: Proxy, target: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    door.troubles = [Trouble("503", times=10**6, match="web-00002", method="PUT")]
    with hang_limit(300):
        assert fovea("shards", "push", shards, target, "--outage-timeout", "0.1") == 2
    printed = capsys.readouterr()
    assert "did not answer" in printed.err and "copied" in printed.err and "Run the same command again" in printed.err
    assert "Traceback" not in printed.err and "shards.json" not in objects(door, target)
    door.troubles = []
    assert fovea("shards", "push", shards, target) == 0
    door.troubles = [Trouble("503", times=10**6, match="web-00002", method="GET")]
    with hang_limit(300):
        assert fovea("shards", "pull", target, tmp_path / "out", "--outage-timeout", "0.1") == 2
    printed = capsys.readouterr()
    assert "did not answer" in printed.err and "is not fetched again" in printed.err


def test_what_cannot_work_is_one_message_with_a_hint(
    door: Proxy, target: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    for words, message in (
        (("push", shards, "s3://nosuchbucket/a"), "bucket s3://nosuchbucket does not exist"),
        (("pull", "s3://nosuchbucket/a", tmp_path / "o"), "bucket s3://nosuchbucket does not exist"),
        (("pull", target, tmp_path / "o"), "contains no *.tar"),
        (("push", tmp_path / "none", target), "contains no *.tar"),
        (("push", tmp_path / "missing", target), "cannot be read"),
        (("push", shards, tmp_path / "o"), "must be a folder of a bucket"),
        (("push", shards, "https://host/a"), "must be a folder of a bucket"),
        (("pack", shards, "nfs://host/a"), "the scheme 'nfs' is not supported"),
        (("pack", shards, "s3:/lab/a"), "is a URL; output is written to a local folder only"),
    ):
        with hang_limit(300):
            assert fovea("shards", *words) == 2, words
        error = " ".join(capsys.readouterr().err.split())
        assert message in error and error.count("fovea: ") == 1 and "Traceback" not in error, error
    door.troubles = [Trouble("403", times=10**6, match="", method="GET"), Trouble("403", times=10**6, match="", method="HEAD")]
    with hang_limit(300):
        assert fovea("shards", "push", shards, target) == 2
    assert "access was refused" in (error := capsys.readouterr().err) and "AWS_ACCESS_KEY_ID" in error


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(
    door: Proxy, target: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fovea("shards", "push", shards, target) == 0
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("pipeline.data.storage.pull.shutil.disk_usage", lambda _: usage)
    assert fovea("shards", "pull", target, tmp_path / "out") == 2
    assert "0.0 GB are to be fetched and 0.0 GB are free" in capsys.readouterr().err
    monkeypatch.undo()
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": door.endpoint}.items():
        monkeypatch.setenv(name, value)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.data.storage.pull.os.posix_fallocate", full)
    assert fovea("shards", "pull", target, tmp_path / "out") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "cannot be written (No space left on device)" in error and "Free space" in error
    assert not list((tmp_path / "out").glob("*.tar"))


# ---- pack to a bucket ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(6):
            (folder / name / f"{number}.jpg").write_bytes(picture(number))
    (folder / "dog" / "bad.jpg").write_bytes(b"<html>")
    return folder


def packed(door: Proxy, target: str, folder: Path) -> None:
    """Asserts that a bucket holds what a packing to a directory writes."""
    assert fovea("shards", "pull", target, folder) == 0
    (folder / ".pulled.jsonl").unlink()


def test_pack_to_a_bucket_gives_the_bytes_of_pack_to_a_directory(
    door: Proxy, target: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fovea("shards", "pack", photos, tmp_path / "here", "--samples", "3") == 0
    capsys.readouterr()
    assert fovea("shards", "pack", photos, target, "--samples", "3") == 0
    printed = capsys.readouterr().out
    assert "packed 12 samples in 4 shards" in printed and "4 copied" in printed
    assert f"shards: '{target}/train-{{00000..00003}}.tar'" in printed and f"{target}/train.skipped.txt" in printed
    packed(door, target, tmp_path / "there")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert (tmp_path / "there" / "classes.txt").read_text() == "cat\ndog\n"
    assert not list((tmp_path / "cache").rglob("*.tar")), "nothing stays in the staging directory"
    door.seen.clear()
    assert fovea("shards", "pack", photos, target, "--samples", "3") == 0
    assert "(4 of them were there already)" in capsys.readouterr().out and not [n for n in puts(door) if n.endswith(".tar")]
    assert fovea("shards", "pack", photos, target, "--samples", "4") == 2
    assert "of another packing (samples_per_shard was 3 and is 4)" in " ".join(capsys.readouterr().err.split())
    assert fovea("shards", "pack", photos, target, "--samples", "6", "--overwrite") == 0
    assert sorted(name for name in objects(door, target) if name.endswith(".tar")) == ["train-00000.tar", "train-00001.tar"]
    assert fovea("shards", "pull", target, tmp_path / "again") == 0, "the listing names what is there"


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "after"), [(r"PUT .*train-00001", 0), (r"HEAD .*train-00002", 1), (r"PUT .*pack.json", 0)])
def test_a_killed_packing_to_a_bucket_continues(
    door: Proxy, target: str, photos: Path, tmp_path: Path, pattern: str, after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("shards", "pack", photos, target, "--samples", "3", "--staging", tmp_path / "staging")
    killed_at(door, pattern, after, *words)
    there = objects(door, target)
    assert "shards.json" not in there
    door.seen.clear()
    assert fovea(*words) == 0
    assert "were there already)" in capsys.readouterr().out
    assert not set(puts(door)) & {name for name in there if name.endswith(".tar")}, "no shard is sent twice"
    assert fovea("shards", "pack", photos, tmp_path / "here", "--samples", "3") == 0
    packed(door, target, tmp_path / "there")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_further_shard_of_the_prefix_is_named_and_the_set_is_not_listed(
    door: Proxy, target: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote(door).put_bytes(b"another set", f"{target}/train-00007.tar")
    assert fovea("shards", "pack", photos, target) == 2
    assert "1 further shards of this prefix are there" in capsys.readouterr().err
    assert {"shards.json", "train.pack.json"}.isdisjoint(objects(door, target))
    assert fovea("shards", "pack", photos, target, "--overwrite") == 0
    assert "train-00007.tar" not in objects(door, target)


def test_a_lost_staging_directory_costs_time_only(
    door: Proxy, target: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    door.troubles = [Trouble("503", times=10**6, match="train-00002", method="PUT")]
    staging = tmp_path / "staging"
    words = ("shards", "pack", photos, target, "--samples", "3", "--staging")
    with hang_limit(300):
        assert fovea(*words, staging, "--outage-timeout", "0.1") == 2
    assert "did not answer" in capsys.readouterr().err
    door.troubles = []
    door.seen.clear()
    assert fovea(*words, tmp_path / "elsewhere") == 0
    assert "2 copied" in capsys.readouterr().out
    assert puts(door)[:2] == ["classes.txt", "train-00002.tar"]


def test_shards_of_one_folder_share_their_classes(
    door: Proxy, target: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fovea("shards", "pack", photos, target) == 0
    other = tmp_path / "other"
    (other / "ant").mkdir(parents=True)
    (other / "ant" / "1.jpg").write_bytes(picture(1))
    assert fovea("shards", "pack", other, target, "--prefix", "val") == 2
    assert "has other classes than this source" in capsys.readouterr().err
    assert fovea("shards", "pack", photos, target, "--prefix", "val") == 0
    assert len([name for name in objects(door, target) if name.endswith(".tar")]) == 2
    assert fovea("shards", "pull", target, tmp_path / "out") == 0, "the listing names both"
