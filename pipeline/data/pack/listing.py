"""Lists the files of a directory tree; links, hidden directories, devices and loops are counted, never silently skipped.

Every entry that is not a directory is either listed or left out with a reason; directories that are not entered also have a
reason.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.untrusted import printable

LINK, LOOP, BROKEN = "outside_link", "link_loop", "broken_link"
# Files of operating systems, file servers and editors; names that begin with a dot are left out as well.
_LITTER = frozenset(
    (
        *("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found", "lost.dir"),
        *("system volume information", "$recycle.bin", "recycler", "recycled", "network trash folder", "temporary items"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__pycache__", "found.000"),
    )
)
_MOST_VISITS = 16  # maximum visits of one directory through links: links to links multiply
_PEEKED = 5_000  # entries checked behind a link that is not followed


@dataclass(frozen=True, slots=True)
class File:
    """A regular file below a directory.

    Attributes:
        path: the path to open.
        shown: relative to the directory, with forward slashes; invalid UTF-8 as surrogate escapes.
        size: bytes.
    """

    path: str
    shown: str
    size: int

    @property
    def parts(self) -> list[str]:
        """The components of ``shown``."""
        return self.shown.split("/")

    @property
    def stem(self) -> str:
        """``shown`` without the last extension."""
        return os.path.splitext(self.shown)[0]

    @property
    def extension(self) -> str:
        """The last extension in lower case, without the dot."""
        return os.path.splitext(self.shown)[1][1:].lower()


@dataclass(frozen=True)
class Listing:
    """Content of a directory tree.

    Attributes:
        root: the directory.
        files: regular data files, ordered by their path's components.
        left_out: (name, reason) of every other entry, and of directories that were not entered, by name.
    """

    root: Path
    files: tuple[File, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def reasons(self) -> dict[str, int]:
        """Returns the number of entries left out by reason."""
        return dict(sorted(Counter(reason for _, reason in self.left_out).items()))


def list_files(root: Path, *, follow_links: bool = False) -> Listing:
    """Lists a directory tree in a fixed order.

    Links inside ``root`` are followed, links out of it only on request. A link to a directory that is being traversed is left
    out,
    and so is one to a directory already reached 16 times through links.

    Args:
        root: the directory; may itself be a link.
        follow_links: follow links out of the directory.

    Raises:
        DataError: the directory cannot be read.
    """
    walk = _Walk(root, follow_links)
    try:
        with os.scandir(root):
            pass
    except OSError as error:
        hint = "Check the path and its permissions"
        raise DataError(f"cannot be read ({error.strerror})", where=printable(str(root)), hint=hint) from error
    walk.run()
    walk.files.sort(key=lambda file: file.parts)
    walk.left_out.sort()
    return Listing(root, tuple(walk.files), tuple(walk.left_out))


def holds_image(folder: str, extensions: frozenset[str]) -> bool:
    """Whether a directory that is not traversed seems to contain images: checks the names of the first 5,000 entries."""
    looked_at = 0
    for _, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not litter_reason(name))
        for name in names:
            if os.path.splitext(name)[1][1:].lower() in extensions and not name.startswith("."):
                return True
        looked_at += len(names) + len(folders)
        if looked_at > _PEEKED:
            return True
    return False


def litter_reason(name: str) -> str:
    """Returns ``hidden`` or ``litter`` for the name of a file or directory that is not data, empty for any other."""
    if name.startswith("."):
        return "hidden"
    return "litter" if name.lower() in _LITTER else ""


class _Walk:
    """Traverses a tree iteratively, without a recursion limit."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.files: list[File] = []
        self.left_out: list[tuple[str, str]] = []
        self._root, self._follow = str(root), follow_links
        self._real = os.path.realpath(root)
        self._visits: Counter[tuple[int, int]] = Counter()

    def run(self) -> None:
        top = os.stat(self._root)
        # directory, its name with a trailing slash, its ancestors
        pending: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(self._root, "", frozenset({(top.st_dev, top.st_ino)}))]
        while pending:
            folder, prefix, above = pending.pop()
            try:
                with os.scandir(folder) as entries:
                    children = sorted(entries, key=lambda entry: entry.name)
            except OSError:
                self.left_out.append((prefix.rstrip("/") or ".", "unreadable_folder"))
                continue
            for entry in children:
                shown = prefix + entry.name
                reason, info = self._look(entry, litter_reason(entry.name), above)
                if info is not None and stat.S_ISDIR(info.st_mode) and not reason:
                    pending.append((entry.path, f"{shown}/", above | {(info.st_dev, info.st_ino)}))
                elif reason or info is None:
                    self.left_out.append((shown, reason))
                else:
                    self.files.append(File(entry.path, shown, info.st_size))

    def _look(self, entry: os.DirEntry[str], reason: str, above: frozenset[tuple[int, int]]) -> tuple[str, os.stat_result | None]:
        """Returns why an entry is left out, and its status; no status if it is not to be entered."""
        try:
            linked = entry.is_symlink()
            if linked and reason:
                return reason, None
            info = os.stat(entry.path, follow_symlinks=linked)
        except OSError as error:
            return reason or _link_reason(entry, error), None
        folder = stat.S_ISDIR(info.st_mode)
        if not folder and not stat.S_ISREG(info.st_mode):
            return reason or "special_file", None
        if linked:
            real = os.path.realpath(entry.path)
            if not self._follow and real != self._real and not real.startswith(self._real.rstrip("/") + "/"):
                return LINK, None
            if folder:
                identity = (info.st_dev, info.st_ino)
                self._visits[identity] += 1
                if identity in above or self._visits[identity] > _MOST_VISITS:
                    return LOOP, None
        return reason, info


def _link_reason(entry: os.DirEntry[str], error: OSError) -> str:
    if not os.path.islink(entry.path):
        return "unreadable"
    return {errno.ELOOP: LOOP, errno.ENOENT: BROKEN, errno.ENOTDIR: BROKEN}.get(error.errno or 0, "unreadable")


def lost_by_links(listing: Listing, extensions: frozenset[str]) -> list[str]:
    """Returns directories, shards and classes that are lost because links are not followed or are broken.

    These are linked directories that contain images; linked tars; top-level directories whose images are all links; and the
    directory itself (``.``), if most of its images are links.

    Args:
        listing: of the directory.
        extensions: of images, without dots.
    """
    images = Counter(file.parts[0] for file in listing.files if file.extension in extensions)
    lost: dict[str, None] = {}
    links: Counter[str] = Counter()
    for name, reason in listing.left_out:
        if reason not in (LINK, BROKEN):
            continue
        top, _, rest = name.partition("/")
        path, extension = os.path.join(listing.root, name), os.path.splitext(name)[1][1:].lower()
        if extension in extensions:
            links[top if rest else name] += 1
            if rest and top not in images:
                lost[top] = None
        elif (
            (extension == "tar" and not rest)
            or (reason == LINK and os.path.isdir(path) and holds_image(path, extensions))
            or (reason == BROKEN and not extension and not rest)
        ):
            lost[name] = None
    shards = any(file.extension == "tar" and "/" not in file.shown for file in listing.files)
    if not lost and not shards and links.total() > images.total():
        lost["."] = None
    return list(lost)
