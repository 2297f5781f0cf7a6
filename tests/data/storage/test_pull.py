"""Downloads from a bucket whose ETags look like an MD5 and are none, as with encryption by KMS."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.storage.names import ObjectStat
from pipeline.data.storage.pull import pull
from pipeline.data.storage.remote import ShardNotFound

DATA = bytes(range(256)) * 8192  # two reads of a scan
ETAG = f'"{hashlib.md5(b"of the encrypted bytes").hexdigest()}"'
OBJECT = ObjectStat("s3://bucket/web/train-0.tar", len(DATA), ETAG)


class Bucket:
    """One object; the download may differ from what is read afterwards."""

    def __init__(self, arrives: bytes = DATA) -> None:
        self.arrives, self.scanned = arrives, 0

    def stat(self, url: str) -> ObjectStat:
        raise ShardNotFound("does not exist", where=url, hint="Check the name")

    def download(self, about: ObjectStat, descriptor: int) -> None:
        os.pwrite(descriptor, self.arrives, 0)

    def scan(self, about: ObjectStat) -> Bucket:
        return self

    def read(self, offset: int, length: int) -> bytes:
        self.scanned += length
        return DATA[offset : offset + length]

    def close(self) -> None:
        pass


def fetch(folder: Path, bucket: Any, about: ObjectStat = OBJECT) -> Any:
    return pull([about], folder, bucket)[0]


def test_an_etag_that_is_no_md5_does_not_keep_an_object_from_arriving(tmp_path: Path) -> None:
    bucket = Bucket()
    transfer = fetch(tmp_path, bucket)
    assert (transfer.sent, transfer.failed, transfer.unchecked) == (["train-0.tar"], [], [])
    assert (tmp_path / "train-0.tar").read_bytes() == DATA
    assert bucket.scanned == len(DATA)
    assert fetch(tmp_path, bucket).skipped == ["train-0.tar"]


@pytest.mark.parametrize("etag", [ETAG, f'"{hashlib.md5(DATA).hexdigest()}"'], ids=["kms", "md5"])
def test_a_download_with_other_bytes_fails_whatever_the_etag(tmp_path: Path, etag: str) -> None:
    transfer = fetch(tmp_path, Bucket(b"x" + DATA[1:]), ObjectStat(OBJECT.url, OBJECT.size, etag))
    assert "arrived with another checksum" in str(transfer.failed[0][1])
    assert not (tmp_path / "train-0.tar").exists()


def test_an_etag_that_is_an_md5_needs_no_second_read(tmp_path: Path) -> None:
    bucket = Bucket()
    transfer = fetch(tmp_path, bucket, ObjectStat(OBJECT.url, OBJECT.size, f'"{hashlib.md5(DATA).hexdigest()}"'))
    assert (transfer.sent, bucket.scanned) == (["train-0.tar"], 0)


def test_a_file_of_that_name_is_not_called_other_content_without_proof(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(DATA)
    transfer = fetch(tmp_path, Bucket())
    assert "its MD5 is not the object's ETag" in str(transfer.failed[0][1])
    (tmp_path / "train-0.tar").write_bytes(DATA[1:])
    assert "exists with other content" in str(fetch(tmp_path, Bucket()).failed[0][1])
