"""``fovea shards push`` and ``pull``, and the target of ``fovea shards pack``: shards to and from a bucket. Imports lazily."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.choices import local_only
from pipeline.errors import DataError
from pipeline.masking import printable

if TYPE_CHECKING:
    from pipeline.data.pack.delivery import Delivery
    from pipeline.data.storage import ObjectStat
    from pipeline.data.storage.push import Transfer
    from pipeline.data.storage.remote import Remote

_NAMED = 20  # failures printed
OutageOption = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for a bucket that does not answer, before the command ends.")
]


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of shards.", callback=local_only)],
    target: Annotated[str, typer.Argument(metavar="URL", help="Folder in a bucket: s3://bucket/web.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace objects of the same name with other content.")] = False,
    outage_timeout: OutageOption = 60.0,
) -> None:
    """Upload shards to a bucket. If interrupted, the same command continues; equal objects are not sent again.

    Sent are the *.tar of DIR and the lists that `fovea shards pack` writes beside them. Each object appears when all of its bytes
    have arrived, and is compared with the file by size and checksum. At the end URL/shards.json names all files with their
    SHA-256. The exit code is 1 if a file failed.

    A killed upload may leave parts of one or two files in the bucket, which cost storage and which no reader sees: let the bucket
    delete incomplete multipart uploads after a day (a lifecycle rule).

    [b]Example[/b]

    fovea shards push /data/web s3://bucket/web
    """
    from launch.progress import progress_bar
    from pipeline.data.storage.push import files_of, push

    _, others = files_of(folder)
    with progress_bar("sending") as progress:
        transfer = push(folder, target, _remote(outage_timeout), overwrite=overwrite, report=progress)
    if others:
        print(f"not sent: {others} other files and folders of {printable(str(folder))}")
    _finish(transfer)


def pull(
    source: Annotated[str, typer.Argument(metavar="URL", help="Folder in a bucket, or shards in it with {000..123} or *.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output directory.", callback=local_only)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name with other content.")] = False,
    outage_timeout: OutageOption = 60.0,
) -> None:
    """Download shards from a bucket. If interrupted, the same command continues; equal files are not fetched again.

    Each file is compared with the SHA-256 in URL/shards.json, which `fovea shards push` writes, or with the object's MD5 if the
    bucket has it; otherwise by its size, and counted. The exit code is 1 if a file failed.

    [b]Examples[/b]

    fovea shards pull s3://bucket/web /data/web

    fovea shards pull 's3://bucket/web/train-{00000..00099}.tar' /data/web
    """
    from launch.progress import progress_bar
    from pipeline.data.storage.pull import pull

    remote = _remote(outage_timeout)
    with progress_bar("fetching") as progress:
        transfer, missing = pull(_objects(source, remote), folder, remote, overwrite=overwrite, report=progress)
    if transfer.unchecked:
        print(f"compared by size only, since the bucket has no checksum: {len(transfer.unchecked)} files")
    if missing and not _is_pattern(source):
        print(f"missing in the bucket, although its shards.json names them: {printable(', '.join(missing[:_NAMED]))}")
    _finish(transfer)
    if missing and not _is_pattern(source):
        raise typer.Exit(1)


@contextlib.contextmanager
def delivery(
    out: str, prefix: str, staging: Path | None, overwrite: bool, outage_timeout: float
) -> Iterator[tuple[Path, Delivery | None]]:
    """The directory that a packing writes to, and the bucket that its shards are moved to if ``out`` is a URL.

    Args:
        out: as given by the user.
        prefix: prefix of the shards' names.
        staging: where shards are written before they are sent; by default below the user's cache directory.
        overwrite: whether to replace objects.
        outage_timeout: seconds to wait for a bucket that does not answer.

    Raises:
        DataError: ``staging`` is given for a local ``out``, or the bucket cannot be accessed.
    """
    from pipeline.data.settings import user_cache
    from pipeline.data.storage import is_remote

    if not is_remote(out):
        if staging is not None:
            raise DataError("is for buckets only", where="--staging", hint="Leave it out")
        path = local_only(Path(out))
        assert path is not None
        yield path, None
        return
    from pipeline.data.pack.delivery import Delivery

    name = hashlib.sha256(f"{out.rstrip('/')}\0{prefix}".encode()).hexdigest()[:16]
    folder = staging or user_cache() / "fovea" / "pack" / name
    with Delivery(out, folder, prefix, _remote(outage_timeout), overwrite=overwrite) as target:
        yield folder, target


def _remote(outage_timeout: float) -> Remote:
    from pipeline.data.settings import StorageSettings
    from pipeline.data.storage.remote import Remote

    return Remote(StorageSettings(outage_timeout=outage_timeout))


def _is_pattern(source: str) -> bool:
    return source.endswith(".tar") or any(sign in source for sign in "*?[{")


def _objects(source: str, remote: Remote) -> list[ObjectStat]:
    from pipeline.data.storage import Storage, expand
    from pipeline.data.storage.pull import objects_of
    from pipeline.data.storage.push import bucket_folder

    if not _is_pattern(source):
        return objects_of(bucket_folder(source), remote)
    bucket_folder(source)
    store = Storage(remote.settings)
    urls = expand(source, store)
    if len({url.rpartition("/")[0] for url in urls}) > 1:
        raise DataError("names shards of several folders", where=source, hint="Name one folder at a time")
    objects = []
    for about in remote.stats(urls):
        if isinstance(about, DataError):
            raise about
        objects.append(about)
    return objects


def _finish(transfer: Transfer) -> None:
    print(transfer.text())
    for name, error in transfer.failed[:_NAMED]:
        print(f"failed: {printable(name)}: {printable(str(error))}")
    if len(transfer.failed) > _NAMED:
        print(f"and {len(transfer.failed) - _NAMED} more")
    if transfer.failed:
        raise typer.Exit(1)
