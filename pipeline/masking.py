"""Makes text safe to display: escapes control characters, masks user names, passwords and query values of addresses."""

from __future__ import annotations

import re
from typing import Any

_MASK = "***"
# Control characters, line and paragraph separators, bidirectional marks, lone surrogates.
NO_PASSWORD = "must not carry a user name or password; use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_UNPRINTABLE_BUT_LINES = re.compile(UNPRINTABLE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
# Schemes are bounded, and query names exclude "?": untrusted text must not cause quadratic time.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s'\"<>|]+")
# After a host, only a port may follow a colon: anything else is a password, which may contain "/", "?" or "#". abfs has a
# container where other schemes have a user.
_USERINFO = re.compile(
    r"^((?!abfss?:)[A-Za-z][A-Za-z0-9+.-]*:/{1,2})(?:[^/?#]*@|[^/?#@:\[]*:(?!\d+(?:[/?#]|$)|/|$)[^@]*@)",
    re.IGNORECASE | re.DOTALL,
)
_QUERY_VALUE = re.compile(r"([?&;#][^?=&;#\s]*=)[^&#]*", re.DOTALL)
_BARE_QUERY = re.compile(r"^(https?://[^?#]*\?)[^=&#]+(?=$|[&#])", re.IGNORECASE | re.DOTALL)


def printable(text: str, *, limit: int = 0) -> str:
    r"""Returns text that is safe to write to a terminal, a log or one line of a file.

    Control characters (also C1, bidirectional marks, line separators) become ``\x1b``-style escapes; lone surrogates become the
    byte or code unit they stand for.

    Args:
        text: any string.
        limit: maximum length of the result in characters, the end replaced by an ellipsis; 0 for no limit.
    """
    if limit and len(text) > 4 * limit:
        text = text[: 4 * limit]
    clean = UNPRINTABLE.sub(_escape, text)
    return clean if not limit or len(clean) <= limit else clean[: limit - 1] + "…"


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as surrogateescape keeps it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def hide_secrets(text: str) -> str:
    """Replaces the user names, passwords and query values of all addresses in a text by ``***``.

    Every address that leaves the process (messages, logs, reports, files of a run) passes through here.
    """
    return _ADDRESS.sub(lambda match: _hide(match[0]), text) if "://" in text else text


def _hide(address: str) -> str:
    clean = _BARE_QUERY.sub(rf"\g<1>{_MASK}", _USERINFO.sub(rf"\g<1>{_MASK}@", address))
    return _QUERY_VALUE.sub(rf"\g<1>{_MASK}", clean)


def shown_address(address: str, *, limit: int = 0) -> str:
    """Returns an address for display, masked and printable.

    The whole text is treated as one address, whatever characters its password has.
    """
    return printable(_hide(address.strip()), limit=limit)


def shown(text: str) -> str:
    """Returns a message for a terminal or a log: :func:`printable` except for line breaks and tabs, and :func:`hide_secrets`."""
    return hide_secrets(_UNPRINTABLE_BUT_LINES.sub(_escape, text))


def has_password(address: str) -> bool:
    """Whether an address carries a user name or password (``scheme://user:password@host``)."""
    return bool(_USERINFO.match(address.strip()))


def masked(value: Any) -> Any:
    """Applies :func:`hide_secrets` to every string of a JSON value, for settings that leave the process."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {key: masked(inner) for key, inner in value.items()}
    return [masked(inner) for inner in value] if isinstance(value, list | tuple) else value
