"""Expands shard patterns: braces, globs and directories, on disks and in buckets."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from pipeline.data.storage import local
from pipeline.data.storage.names import is_remote, local_path
from pipeline.data.storage.signed import strip
from pipeline.data.storage.store import Storage
from pipeline.errors import DataError


def expand(patterns: str | Sequence[str], storage: Storage | None = None) -> list[str]:
    """Returns the shards that one or several patterns name, in order.

    A pattern is a path or URL, a brace range (``train-{00000..00009}.tar``), a glob (``train-*.tar``; ``**`` crosses
    directories) or a directory (all its ``*.tar``; the URL of a directory ends with a slash). Globs and directories are sorted by
    name; otherwise the given order is kept. Local shards must exist; remote ones that are named one by one are not checked.

    Raises:
        DataError: no shard matches, one is missing, or one is named twice; storage cannot be reached.
    """
    requested = [str(patterns)] if isinstance(patterns, (str, os.PathLike)) else [str(pattern) for pattern in patterns]
    if not any(pattern.strip() for pattern in requested):
        raise DataError("no shard pattern is given", hint="Name shards such as 'data/train-{00000..00009}.tar'")
    storage = storage or Storage()
    shards = [shard for pattern in requested for shard in _expand_one(pattern, storage)]
    missing = [shard for shard in shards if not is_remote(shard) and not os.path.isfile(local_path(shard))]
    if missing:
        more = f" and {len(missing) - 1} more of {len(shards)}" if len(missing) > 1 else ""
        raise DataError(
            f"{local.describe(missing[0])}{more}", where=missing[0], hint="Check the path and the range of the pattern"
        )
    seen: dict[str, str] = {}
    for shard in shards:
        real = shard if is_remote(shard) else os.path.realpath(local_path(shard))
        if real in seen:
            raise DataError(f"the same shard is named twice (also as {seen[real]})", where=shard, hint="Name each shard once")
        seen[real] = shard
    return shards


def _expand_one(pattern: str, storage: Storage) -> list[str]:
    if pattern.startswith("~"):
        pattern = os.path.expanduser(pattern)
    far = is_remote(pattern.split("{", 1)[0])
    try:
        plain = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError("braces do not match", where=pattern, hint="Write ranges as {00000..00009}") from error
    if far:
        plain = [strip(one) for one in plain]
        storage.check(plain[:1])
    shards = [shard for one in plain for shard in (_remote_ones(one, storage) if far else _local_ones(one))]
    if not shards:
        raise DataError("no shard matches", where=pattern, hint="Check the pattern; a range counts upwards")
    return shards


def _local_ones(one: str) -> list[str]:
    path = local_path(one)
    if os.path.isdir(path):
        matches = sorted(str(file) for file in Path(path).glob("*.tar") if file.is_file())
        if not matches:
            raise DataError(
                "no shard matches: the directory contains no *.tar", where=one, hint="Point to a directory of tar files"
            )
        return matches
    if glob.has_magic(path) and not os.path.exists(path):
        matches = sorted(glob.glob(_existing_escaped(path), recursive=True))
        if not matches:
            raise DataError("no shard matches", where=one, hint="Check the pattern and the directory")
        return matches
    return [one]


def _existing_escaped(path: str) -> str:
    """Escapes the leading directories of a glob that exist under their literal names: ``data[v2]/*.tar``."""
    parts = path.split(os.sep)
    for number, part in enumerate(parts):
        if glob.has_magic(part) and not os.path.isdir(os.sep.join(parts[: number + 1])):
            return os.sep.join([*map(glob.escape, parts[:number]), *parts[number:]])
    return path


def _remote_ones(one: str, storage: Storage) -> list[str]:
    if one.endswith("/"):
        one += "*.tar"
    if not glob.has_magic(one):
        return [one]
    matches = _listed(one.replace("[", "[[]"), one, r"[*?]", storage) if "[" in one else []  # a directory whose name has brackets
    matches = matches or _listed(one, one, r"[*?\[]", storage)
    if not matches:
        raise DataError("no shard matches", where=one, hint="Check the pattern and the bucket")
    return matches


def _listed(pattern: str, one: str, magic: str, storage: Storage) -> list[str]:
    folder = re.split(magic, one)[0].rpartition("/")[0] + "/"
    return [
        about.url
        for about in storage.remote.list(folder)
        if ("**" in one or about.url.count("/") == one.count("/")) and fnmatch.fnmatchcase(about.url, pattern.replace("**/", "*"))
    ]
