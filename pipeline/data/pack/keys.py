"""Makes sample keys unique and safe to unpack."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

_DRIVE = re.compile(r"^[A-Za-z]:")
# Control characters, bidirectional marks, line separators; and the separator of Windows.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\\\\]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_PART, _KEY = (
    200,
    1000,
)  # maximum bytes of a directory or base name, and of a key, to leave room for an extension


def safe_key(key: str) -> str:
    """Returns the key, changed if necessary so that it stays inside the directory it is unpacked to and is printable.

    Absolute keys become relative; ``..``, control characters and backslashes become ``_``; invalid UTF-8 and lone surrogates
    become
    U+FFFD; what is too long for a file system is truncated and marked with a hash. The function is idempotent.
    """
    clean = _DRIVE.sub(lambda match: f"{match[0][0]}_", _clean(key).lstrip("/"))
    parts = [_short("_" if part == ".." else part) for part in clean.split("/")]
    out = "/".join(parts)
    if len(out.encode("utf-8")) > _KEY:
        out = _short(parts[-1] + "-" + _hash(out))
    return out if parts[-1] else f"{out}_"


def is_safe(key: str) -> bool:
    """Whether a key can be written: :func:`safe_key` would change nothing but its length."""
    unsafe = _UNSAFE.search(key) or _SURROGATES.search(key) or _DRIVE.search(key)
    return not (unsafe or key.startswith("/") or ".." in key.split("/"))


def safe_extension(extension: str) -> str:
    """Returns the extension, sanitized as :func:`safe_key` does for a key."""
    return _short(_clean(extension).replace("/", "_")) or "_"


def unique_keys(keys: Iterable[str]) -> list[str]:
    """Returns the keys, with the first free number appended to those that occurred before."""
    originals = list(keys)
    taken, out, following = set(originals), [], dict.fromkeys(originals, -1)
    for key in originals:
        following[key] += 1
        name = key
        if following[key]:
            while (name := f"{key}-{following[key]}") in taken:
                following[key] += 1
            taken.add(name)
        out.append(name)
    return out


def _clean(text: str) -> str:
    return _SURROGATES.sub("\ufffd", _UNSAFE.sub("_", text))


def _short(part: str) -> str:
    data = part.encode("utf-8")
    if len(data) <= _PART:
        return part
    return data[: _PART - 17].decode("utf-8", "ignore") + "-" + _hash(part)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
