"""Decodes captions and other text members: one rule for shards, files and tables.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one. Anything else keeps what is readable, with U+FFFD for the
rest, and the caller counts it as ``caption_replaced``.
"""

from __future__ import annotations

import codecs
import json
from typing import Any

REPLACED = "caption_replaced"  # the note that counts captions with U+FFFD put in
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(start: bytes) -> str:
    """The encoding that a byte order mark announces: ``utf-8-sig``, ``utf-16`` or ``utf-32``; ``utf-8`` without a mark."""
    if start.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def decode_text(data: bytes) -> tuple[str, bool]:
    """The text of a member or file, without its byte order mark.

    Returns:
        The text, and whether bytes had to be replaced by U+FFFD.
    """
    encoding = encoding_of(data)
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError:
        pass
    if encoding == "utf-32":  # more likely UTF-16 that begins with a NUL
        encoding = "utf-16"
    if encoding == "utf-16" and len(data) % 2:  # rather bytes that only look like a mark
        encoding = "utf-8"
    return data.decode(encoding, "replace"), True


def clean_text(text: str) -> tuple[str, bool]:
    """Text that can be encoded: halves of a surrogate pair that stand alone become U+FFFD, a whole pair its character.

    Returns:
        The text, and whether anything was changed.
    """
    if text.isascii():
        return text, False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), True
    return text, False


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a JSON value, a text or a list of texts, without those that are empty; see :func:`clean_text`."""
    texts = value if isinstance(value, list) else [value]
    return tuple(clean_text(text.strip())[0] for text in texts if isinstance(text, str) and text.strip())


def read_json_member(data: bytes) -> Any:
    """The value of a JSON member; text that is neither UTF-8, UTF-16 nor UTF-32 is read with U+FFFD in it.

    Raises:
        ValueError: it is no JSON.
        RecursionError: it is nested too deeply.
    """
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        return json.loads(decode_text(data)[0])


def json_caption_replaced(data: bytes, value: Any) -> bool:
    """Whether the captions of a JSON member lost characters.

    Args:
        data: the member.
        value: what :func:`read_json_member` made of its caption.
    """
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if any(clean_text(text)[1] for text in texts):
        return True
    return any("\ufffd" in text for text in texts) and decode_text(data)[1]
