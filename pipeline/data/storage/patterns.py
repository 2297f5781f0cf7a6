"""From patterns to shards: braces, globs and folders, on disks and in buckets."""

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
from pipeline.data.storage.store import Storage
from pipeline.errors import DataError


def expand(patterns: str | Sequence[str], storage: Storage | None = None) -> list[str]:
    """The shards that one or several patterns name, in order.

    A pattern is a path or URL, a brace range (``train-{00000..00009}.tar``), a glob (``train-*.tar``; ``**`` crosses
    folders) or a folder (all its ``*.tar``; a URL of a folder ends with a slash). Globs and folders are sorted by name; the
    rest keeps the order given. Local shards are looked for; remote ones that are named one by one are not.

    Raises:
        DataError: no shard matches, one is missing, or one is named twice; storage cannot be reached.
    """
    wanted = [str(patterns)] if isinstance(patterns, (str, os.PathLike)) else [str(pattern) for pattern in patterns]
    if not any(pattern.strip() for pattern in wanted):
        raise DataError("no shard pattern is given", hint="Name shards such as 'data/train-{00000..00009}.tar'.")
    storage = storage or Storage()
    shards = [shard for pattern in wanted for shard in _expand_one(pattern, storage)]
    missing = [shard for shard in shards if not is_remote(shard) and not os.path.isfile(local_path(shard))]
    if missing:
        more = f" and {len(missing) - 1} more of {len(shards)}" if len(missing) > 1 else ""
        raise DataError(
            f"{local.describe(missing[0])}{more}", where=missing[0], hint="Check the path and the range of the pattern."
        )
    seen: dict[str, str] = {}
    for shard in shards:
        real = shard if is_remote(shard) else os.path.realpath(local_path(shard))
        if real in seen:
            raise DataError(f"the same shard is named twice (also as {seen[real]})", where=shard, hint="Name each shard once.")
        seen[real] = shard
    return shards


def _expand_one(pattern: str, storage: Storage) -> list[str]:
    if pattern.startswith("~"):
        pattern = os.path.expanduser(pattern)
    far = is_remote(pattern.split("{", 1)[0])
    try:
        plain = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError("braces do not match", where=pattern, hint="Write ranges as {00000..00009}.") from error
    if far:
        storage.check(plain[:1])
    shards = [shard for one in plain for shard in (_remote_ones(one, storage) if far else _local_ones(one))]
    if not shards:
        raise DataError("no shard matches", where=pattern, hint="Check the pattern; a range counts upwards.")
    return shards


def _local_ones(one: str) -> list[str]:
    path = local_path(one)
    if os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).glob("*.tar") if file.is_file())
        if not found:
            raise DataError(
                "no shard matches: the directory holds no *.tar", where=one, hint="Point to a directory of tar files."
            )
        return found
    if glob.has_magic(path) and not os.path.exists(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise DataError("no shard matches", where=one, hint="Check the pattern and the directory.")
        return found
    return [one]


def _remote_ones(one: str, storage: Storage) -> list[str]:
    if one.endswith("/"):
        one += "*.tar"
    if not glob.has_magic(one):
        return [one]
    folder = re.split(r"[*?\[]", one)[0].rpartition("/")[0] + "/"
    deep = "**" in one
    found = []
    for about in storage.remote.list(folder):
        url = about.url
        inside = deep or url.count("/") == one.count("/")
        if inside and fnmatch.fnmatchcase(url, one.replace("**/", "*")):
            found.append(url)
    if not found:
        raise DataError("no shard matches", where=one, hint="Check the pattern and the bucket.")
    return found
