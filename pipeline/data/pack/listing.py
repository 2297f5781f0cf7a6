"""Lists the files of a folder tree: links, hidden folders, devices and loops are counted, never silently passed over.

Every entry that is no folder is either listed or left out with a reason, and so is every folder that is not entered.
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
# What operating systems, file servers and editors leave in folders; names that begin with a dot are left out as well.
_LITTER = frozenset(
    (
        *("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found", "lost.dir"),
        *("system volume information", "$recycle.bin", "recycler", "recycled", "network trash folder", "temporary items"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__pycache__", "found.000"),
    )
)
_MOST_VISITS = 16  # of one folder through links: links that lead to links multiply
_PEEKED = 5_000  # entries looked at behind a link that is not followed


@dataclass(frozen=True, slots=True)
class File:
    """A regular file below a folder.

    Attributes:
        path: where it is opened.
        shown: relative to the folder, with forward slashes; bytes that are no UTF-8 as surrogate escapes.
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
    """What is below a folder.

    Attributes:
        root: the folder.
        files: regular files that are no litter, in the order of their path's components.
        left_out: (name, reason) of every other entry, and of folders that were not entered, by name.
    """

    root: Path
    files: tuple[File, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How many entries were left out for each reason."""
        return dict(sorted(Counter(reason for _, reason in self.left_out).items()))


def list_files(root: Path, *, follow_links: bool = False) -> Listing:
    """Walks a folder tree in a fixed order.

    Links that stay below ``root`` are followed, those that leave it only if asked; a link to a folder that is being walked is
    left out, and so is one to a folder that links led to 16 times already.

    Args:
        root: the folder; may itself be a link.
        follow_links: follow links out of the folder.

    Raises:
        DataError: the folder cannot be read.
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
    """Whether a folder that is not walked seems to hold images: looks at the names of the first 5,000 entries."""
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
    """``hidden`` or ``litter`` for the name of a file or folder that is no data, empty for any other."""
    if name.startswith("."):
        return "hidden"
    return "litter" if name.lower() in _LITTER else ""


class _Walk:
    """Goes through a tree with a stack of its own: a deep tree is no reason to fail."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.files: list[File] = []
        self.left_out: list[tuple[str, str]] = []
        self._root, self._follow = str(root), follow_links
        self._real = os.path.realpath(root)
        self._visits: Counter[tuple[int, int]] = Counter()

    def run(self) -> None:
        top = os.stat(self._root)
        # folder, its name with a slash behind it, the folders on the way to it
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
        """Why an entry is left out, and what it is; nothing if it is not to be entered."""
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
    """Folders, shards and classes that are lost because links out of the folder were not followed, or lead to nothing.

    These are linked folders that hold images; linked tars; top folders whose images are all links; the folder itself (``.``), if
    most of its images are.

    Args:
        listing: of the folder.
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
