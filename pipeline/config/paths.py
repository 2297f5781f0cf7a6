"""Makes paths independent of the working directory: plain paths, shard patterns, names, tracking URIs."""

from __future__ import annotations

import getpass
import os
import re
from typing import Literal

Kind = Literal["path", "name", "patterns", "uri"]
_MAGIC = re.compile(r"[*?\[\]{}\\]")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


def absolute(text: str, kind: Kind, folder: str | None = None, *, keywords: frozenset[str] = frozenset()) -> str:
    """Returns a path that is valid in every working directory.

    Args:
        text: the path as typed, relative to ``folder``; ``~`` is the home directory.
        kind: a plain ``path``; a ``name`` that may be a URL or ``scheme:NAME`` instead; one of several shard ``patterns``; or a
            tracking ``uri``, where ``sqlite:///mlflow.db`` and ``./mlruns`` are relative.
        folder: the directory it is relative to; by default the working directory.
        keywords: values that are not paths.
    """
    if not text or text in keywords:
        return text
    if kind == "uri":
        return _uri(text, folder)
    if kind != "path" and _SCHEME.match(text.split("{", 1)[0]):
        scheme, _, rest = text.partition("://")
        return text if scheme.lower() != "file" or not rest or rest.startswith("/") else f"file://{_joined(rest, folder)}"
    if text.startswith("~"):
        text = os.path.expanduser(text)
    if kind == "patterns" and not os.path.isabs(text) and _MAGIC.search(_base(text, folder)[0]):
        return text  # if joined, the directory's own name would be parsed as a pattern
    return _joined(text, folder)


def patterns(texts: tuple[str, ...], folder: str | None = None) -> tuple[str, ...]:
    """Returns shard patterns that are valid in every working directory; leading braces with several directories are expanded."""
    return tuple(absolute(part, "patterns", folder) for text in texts for part in _taken_apart(text))


def user_name() -> str:
    """Returns the user's login name; ``uid-1234`` if the user ID has none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid-{os.getuid()}"


def same(one: object, other: object) -> bool:
    """Whether two settings may name the same path, one of them relative to an unknown directory."""
    if one == other:
        return True
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    if os.path.isabs(one) == os.path.isabs(other):
        return os.path.isabs(one) and os.path.realpath(one) == os.path.realpath(other)
    long, short = (one, other) if os.path.isabs(one) else (other, one)
    rest = os.path.normpath(short)
    while rest.startswith("../"):
        rest = rest[3:]
    return os.path.normpath(long).endswith("/" + rest) or absolute(short, "path") == os.path.normpath(long)


def _joined(text: str, folder: str | None) -> str:
    if os.path.isabs(text):
        return text
    base, rest = _base(text, folder)
    return os.path.join(base, rest) if rest else base


def _base(text: str, folder: str | None) -> tuple[str, str]:
    """Resolves leading ``./`` and ``../``; the rest is left as it is, since it may contain a link."""
    base = folder or os.getcwd()
    while match := re.match(r"(\.\.?)(/+|$)", text):
        base = os.path.dirname(base) if match[1] == ".." else base
        text = text[match.end() :]
    return base, text


def _uri(text: str, folder: str | None) -> str:
    scheme, mark, rest = text.partition(":///")
    if mark and scheme.partition("+")[0] == "sqlite":
        return text if rest.startswith(("/", ":memory:", "file:")) or not rest else f"{scheme}:///{_joined(rest, folder)}"
    if text.startswith("file:") and not text.startswith("file:/"):
        return f"file://{_joined(text.removeprefix('file:'), folder)}"
    if _SCHEME.match(text) or re.fullmatch(r"databricks(-uc)?|uc", text):
        return text
    return _joined(os.path.expanduser(text), folder)


def _taken_apart(text: str) -> list[str]:
    """Expands ``{/a,b}/x.tar`` to ``/a/x.tar`` and ``b/x.tar``; other braces, without directories in them, are left unchanged."""
    if not text.startswith("{"):
        return [text]
    depth, parts, begin = 0, [], 1
    for at, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
        if depth == 0:
            rooted = any(part.startswith(("/", "~")) or _SCHEME.match(part) for part in parts)
            return [part + text[at + 1 :] for part in parts] if rooted and len(parts) > 1 else [text]
    return [text]
