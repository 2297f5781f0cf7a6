"""Samples before they are packed: what every source hands out, and how a source's files are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from pipeline.data.index.image_header import HeaderInfo
from pipeline.data.index.manifest import Fields
from pipeline.errors import DataError
from pipeline.untrusted import open_regular

READ = (*Fields().images, "jpe", "jfif", "jif", "pjpeg", "mpo", "apng", "j2k", "jpx", "jpf", "pgm", "pnm")  # by the decoder
IMAGES = (*READ, "gif", "avif", "heic", "heif", "tga", "ico", "psd", "dds")
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "tiff": "tif", "bmp": "bmp", "jpeg2000": "jp2", "pnm": "ppm"}
MAX_FILE = 1 << 30  # bytes of a file or member that is packed


class SkippedSteps(Exception):
    """A sample that cannot be packed; its text is the reason, one word."""


@dataclass(frozen=True)
class Raw:
    """A sample as its source holds it.

    Attributes:
        image: encoded bytes of the image.
        members: all else, by extension; the values are what :class:`pipeline.data.pack.shard_writer.ShardWriter` takes.
        extension: of the image, empty if it follows from the format.
        notes: what was changed or is missing, one word each, such as ``caption_replaced``.
    """

    image: bytes
    members: dict[str, Any]
    extension: str = ""
    notes: tuple[str, ...] = ()

    def sample(self, image: bytes, judged: HeaderInfo) -> dict[str, Any]:
        """What is written: the image (perhaps another than the source's) with its companions.

        Args:
            image: encoded bytes.
            judged: what their header says.
        """
        fitting = EXTENSIONS[judged.format]
        if not self.extension:
            about = {**self.members.get("json", {}), "width": judged.width, "height": judged.height}
            return {fitting: image, **self.members, "json": about}
        # Training finds an image by the extensions of the index.
        keep = (image is self.image and self.extension in Fields().images) or fitting in self.members
        extension = self.extension if keep else fitting
        return {extension: image, **self.members}


class Source(Protocol):
    """Samples by position.

    Attributes:
        unit: what is counted: ``files``, ``rows`` or ``members``.
        left_out: (name, reason) of each file, row or member that belongs to no sample.
        notes: (name, note) of samples that are packed with something replaced or missing, as far as the listing knows.
        remarks: sentences on the source as a whole.
        max_file: largest file or member that is read, bytes.
    """

    @property
    def unit(self) -> str:
        """What is counted."""

    @property
    def left_out(self) -> Sequence[tuple[str, str]]:
        """What belongs to no sample, and why."""

    @property
    def notes(self) -> Sequence[tuple[str, str]]:
        """What the listing had to replace or miss."""

    @property
    def remarks(self) -> Sequence[str]:
        """Sentences on the source as a whole."""

    @property
    def max_file(self) -> int:
        """Largest file or member, bytes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, the position is the class number; empty if the source names none."""

    @property
    def digest(self) -> str:
        """Changes whenever the listing does."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """What to call a sample before a person."""

    def companions(self, position: int) -> Sequence[str]:
        """Names of the files or members beside the image that are counted as this sample's."""

    def sharers(self, companion: str) -> Sequence[str]:
        """Names of all samples that a companion belongs to, if these are several; names as :func:`printable` shows them."""

    def key(self, position: int, number: int) -> str:
        """The key of a sample in the shards, where it is the ``number``-th."""

    def load(self, position: int) -> Raw:
        """Reads a sample.

        Raises:
            SkippedSteps: it cannot be read, or has no image.
        """


def read_file(path: str | Path, *, limit: int = MAX_FILE, roots: Sequence[str] = ()) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        limit: largest size, bytes.
        roots: resolved folders of which one must hold the file after all links were followed; empty: it may lie anywhere.

    Raises:
        SkippedSteps: ``missing_file``, ``outside_link``, ``special_file`` (a device, a pipe, a folder), ``file_too_large`` or
            ``unreadable``.
    """
    try:
        if roots:
            real = os.path.realpath(path) if os.path.islink(path) else real_folder(os.path.dirname(path))
            if not is_below(real, roots):
                raise SkippedSteps("outside_link")
        descriptor = open_regular(Path(path))
    except DataError as error:
        raise SkippedSteps("special_file") from error
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: no file can have such a name
        raise SkippedSteps("missing_file") from error
    except OSError as error:
        raise SkippedSteps("unreadable") from error
    try:
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            data = file.read(size + 1) if size <= limit else b""  # never of the limit's size: that memory would be taken
            while size <= limit and len(data) <= limit and (more := file.read(1 << 20)):
                data += more  # it grew, or says nothing of its size
    except OSError as error:
        raise SkippedSteps("unreadable") from error
    if size > limit or len(data) > limit:
        raise SkippedSteps("file_too_large")
    return data


@lru_cache(maxsize=1 << 16)
def real_folder(folder: str) -> str:
    """A folder after all links and ``..``."""
    try:
        return os.path.realpath(folder)
    except ValueError:  # no folder can have such a name
        return os.path.normpath(folder)


def is_below(path: str, roots: Sequence[str]) -> bool:
    """Whether a path lies in one of some folders, by its components alone."""
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
