"""Interface of packing sources: samples by position, and safe reading of their files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from pipeline.data.index.fields import Fields
from pipeline.data.index.image_header import HeaderInfo
from pipeline.data.settings import SCIENTIFIC_EXTENSIONS
from pipeline.errors import DataError
from pipeline.untrusted import open_regular

READ = (
    *Fields().images,
    "jpe",
    "jfif",
    "jif",
    "pjpeg",
    "mpo",
    "apng",
    "j2k",
    "jpx",
    "jpf",
    "pgm",
    "pnm",
)  # by the decoder
IMAGES = (*READ, "gif", "avif", "heic", "heif", "tga", "ico", "psd", "dds")
SCIENTIFIC = (*IMAGES, *SCIENTIFIC_EXTENSIONS)
"""Extensions of images where channels are declared."""
EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "tiff": "tif",
    "bmp": "bmp",
    "jpeg2000": "jp2",
    "pnm": "ppm",
    "npy": "npy",
    "dicom": "dcm",
}
_READ_BY_TRAINING = frozenset((*Fields().images, *SCIENTIFIC_EXTENSIONS))
MAX_FILE = 1 << 30  # maximum size of a packed file or member, bytes


class SkippedSample(Exception):
    """Raised for a sample that cannot be packed; the text is the reason, one word."""


@dataclass(frozen=True)
class Raw:
    """A sample as stored in its source.

    Attributes:
        image: encoded bytes of the image.
        members: everything else, by extension; values as in :class:`pipeline.data.pack.shard_writer.ShardWriter`.
        extension: of the image, empty if it follows from the format.
        notes: what was changed or is missing, one word each, such as ``caption_replaced``.
    """

    image: bytes
    members: dict[str, Any]
    extension: str = ""
    notes: tuple[str, ...] = ()

    def sample(self, image: bytes, header: HeaderInfo) -> dict[str, Any]:
        """Returns the members to write: the image (possibly transcoded) with its companions.

        Args:
            image: encoded bytes.
            header: result of validating their header; of format ``stack``, all members stay as they are.
        """
        if header.format == "stack":
            return {self.extension: image, **self.members}
        fitting = EXTENSIONS[header.format]
        if not self.extension:
            about = {**self.members.get("json", {}), "width": header.width, "height": header.height}
            return {fitting: image, **self.members, "json": about}
        # Training finds an image by the extensions of the index.
        keep = (image is self.image and self.extension in _READ_BY_TRAINING) or fitting in self.members
        extension = self.extension if keep else fitting
        return {extension: image, **self.members}


class Source(Protocol):
    """Samples by position.

    Attributes:
        unit: what is counted: ``files``, ``rows`` or ``members``.
        left_out: (name, reason) of each file, row or member that belongs to no sample.
        notes: (name, note) of samples that are packed with something replaced or missing, as far as the listing shows.
        remarks: remarks on the source as a whole.
        max_file: maximum size of a file or member, bytes.
    """

    @property
    def unit(self) -> str:
        """What is counted."""

    @property
    def left_out(self) -> Sequence[tuple[str, str]]:
        """What belongs to no sample, and why."""

    @property
    def notes(self) -> Sequence[tuple[str, str]]:
        """What the listing replaced or found missing."""

    @property
    def remarks(self) -> Sequence[str]:
        """Remarks on the source as a whole."""

    @property
    def max_file(self) -> int:
        """Maximum size of a file or member, bytes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the position is the class index; empty if the source has no class names."""

    @property
    def digest(self) -> str:
        """Hash that changes whenever the listing does."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """Returns the display name of a sample."""

    def companions(self, position: int) -> Sequence[str]:
        """Returns the names of the files or members beside the image that are counted as this sample's."""

    def sharers(self, companion: str) -> Sequence[str]:
        """Returns the names of all samples that share a companion, if there are several; formatted by :func:`printable`."""

    def key(self, position: int, number: int) -> str:
        """Returns the key of a sample in the shards, where it is the ``number``-th."""

    def load(self, position: int) -> Raw:
        """Reads a sample.

        Raises:
            SkippedSample: it cannot be read, or has no image.
        """


def read_file(path: str | Path, *, limit: int = MAX_FILE, roots: Sequence[str] = ()) -> bytes:
    """Returns the bytes of a regular file.

    Args:
        path: the file.
        limit: maximum size, bytes.
        roots: resolved directories of which one must contain the file after resolving links; empty: anywhere.

    Raises:
        SkippedSample: ``missing_file``, ``outside_link``, ``special_file`` (a device, a pipe, a directory), ``file_too_large`` or
            ``unreadable``.
    """
    try:
        if roots:
            real = os.path.realpath(path) if os.path.islink(path) else real_folder(os.path.dirname(path))
            if not is_below(real, roots):
                raise SkippedSample("outside_link")
        descriptor = open_regular(Path(path))
    except DataError as error:
        raise SkippedSample("special_file") from error
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: an invalid file name
        raise SkippedSample("missing_file") from error
    except OSError as error:
        raise SkippedSample("unreadable") from error
    try:
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            data = file.read(size + 1) if size <= limit else b""  # not read(limit): that would allocate the limit's size
            while size <= limit and len(data) <= limit and (more := file.read(1 << 20)):
                data += more  # the file grew, or reports no size
    except OSError as error:
        raise SkippedSample("unreadable") from error
    if size > limit or len(data) > limit:
        raise SkippedSample("file_too_large")
    return data


@lru_cache(maxsize=1 << 16)
def real_folder(folder: str) -> str:
    """Returns a directory's path after resolving links and ``..``."""
    try:
        return os.path.realpath(folder)
    except ValueError:  # an invalid directory name
        return os.path.normpath(folder)


def is_below(path: str, roots: Sequence[str]) -> bool:
    """Whether a path is inside one of some directories, by its components alone."""
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
