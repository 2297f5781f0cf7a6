"""Decodes captions and other text members of shards, files and tables, by one rule.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one. Any other text keeps what is readable, with U+FFFD for the
rest, and the caller counts it as ``caption_replaced``.
"""

from __future__ import annotations

import codecs
import json
from typing import Any

REPLACED = "caption_replaced"  # the note that counts captions with inserted U+FFFD
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is a prefix of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(start: bytes) -> str:
    """Returns the encoding of a byte order mark: ``utf-8-sig``, ``utf-16`` or ``utf-32``; ``utf-8`` without a mark."""
    if start.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def decode_text(data: bytes) -> tuple[str, bool]:
    """Decodes a member or file, without its byte order mark.

    Returns:
        The text, and whether bytes were replaced by U+FFFD.
    """
    encoding = encoding_of(data)
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError:
        pass
    if encoding == "utf-32":  # more likely UTF-16 that begins with a NUL
        encoding = "utf-16"
    if encoding == "utf-16" and len(data) % 2:  # more likely bytes that only look like a mark
        encoding = "utf-8"
    return data.decode(encoding, "replace"), True


def clean_text(text: str) -> tuple[str, bool]:
    """Returns text that can be encoded: lone surrogates become U+FFFD, surrogate pairs their character.

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
    """Returns the non-empty captions in a JSON value, a string or a list of strings; see :func:`clean_text`."""
    texts = value if isinstance(value, list) else [value]
    return tuple(clean_text(text.strip())[0] for text in texts if isinstance(text, str) and text.strip())


def read_json_member(data: bytes) -> Any:
    """Parses a JSON member; text that is neither UTF-8, UTF-16 nor UTF-32 is read with U+FFFD in it.

    Raises:
        ValueError: not JSON.
        RecursionError: nested too deeply.
    """
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        return json.loads(decode_text(data)[0])


def json_caption_replaced(data: bytes, value: Any) -> bool:
    """Whether the captions of a JSON member lost characters.

    Args:
        data: the member.
        value: the caption that :func:`read_json_member` returned.
    """
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if any(clean_text(text)[1] for text in texts):
        return True
    return any("\ufffd" in text for text in texts) and decode_text(data)[1]
