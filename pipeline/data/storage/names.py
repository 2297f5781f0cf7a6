"""Parses shard names: paths, and URLs whose scheme selects the storage."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass

from pipeline.errors import DataError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):(//)?")
REMOTE = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "azure": "az",
    "abfs": "az",
    "https": "https",
    "http": "https",
}


@dataclass(frozen=True)
class ObjectStat:
    """Metadata of a shard in storage.

    Attributes:
        url: as requested.
        size: bytes.
        tag: changes whenever the content may have changed (local files: modification time in nanoseconds; objects: ETag).
    """

    url: str
    size: int
    tag: str


@dataclass(frozen=True)
class Location:
    """Location of an object.

    Attributes:
        kind: ``s3``, ``gs``, ``az`` or ``https``.
        root: the target of a connection, such as ``s3://bucket``.
        key: name of the object below the root, without a leading slash.
    """

    kind: str
    root: str
    key: str


def is_remote(url: str) -> bool:
    """Whether a shard is in object storage or on a web server.

    Raises:
        DataError: an unknown scheme.
    """
    match = _SCHEME.match(url)
    if match is None or not match[2] or match[1].lower() == "file":
        return False
    if match[1].lower() in REMOTE:
        return True
    raise DataError(
        f"the scheme {match[1]!r} is not supported", where=url, hint="Name a path, or a URL with s3://, gs://, az:// or https://"
    )


def split(url: str) -> Location:
    """Splits a remote URL.

    Raises:
        DataError: no bucket, container or host is named.
    """
    scheme, _, rest = url.partition("://")
    kind = REMOTE[scheme.lower()]
    depth = 2 if kind == "az" and scheme.lower() in ("az", "azure") else 1
    parts = rest.split("/", depth)
    if len(parts) < depth or not all(parts[:depth]):
        formats = {"s3": "s3://bucket/path", "gs": "gs://bucket/path", "az": "az://account/container/path"}
        raise DataError("has no bucket", where=url, hint=f"Write {formats.get(kind, 'https://host/path')}")
    head = scheme.lower() if kind in ("https", "az") else kind
    return Location(kind, f"{head}://{'/'.join(parts[:depth])}", parts[depth] if len(parts) > depth else "")


def local_path(url: str) -> str:
    """Returns the path of a local file or of a ``file://`` URL.

    Raises:
        DataError: a URL of another scheme.
    """
    match = _SCHEME.match(url)
    if match is None:
        return url
    if match[1].lower() == "file" and match[2]:
        return url[len(match[0]) :]
    if match[2]:
        is_remote(url)
        raise DataError("is in object storage and must be a local path", where=url, hint="Name a local path")
    return url


def absolute(url: str) -> str:
    """Returns the shard's name as an absolute path or URL.

    Raises:
        DataError: an unknown scheme.
    """
    return url if is_remote(url) else os.path.abspath(local_path(url))


def base_name(url: str) -> str:
    """Returns the last component of a shard's name."""
    return posixpath.basename(split(url).key) if is_remote(url) else os.path.basename(local_path(url))
