"""The terminal: what is printed there, or logged, holds no control character of a file name, a key or a foreign log."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.masking import shown


class Terminal(Console):
    """A console whose texts pass :func:`pipeline.masking.shown`; the styles are rich's own."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, cleaned, with its markup."""
        return super().render_str(shown(text), **options)


class _Clean(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def clean_logs() -> None:
    """Have all messages of Python's logging cleaned that no library writes by itself."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Clean())
    for handler in logging.getLogger().handlers:
        if type(handler.formatter) in (type(None), logging.Formatter):
            handler.setFormatter(_Clean(handler.formatter._fmt if handler.formatter else None))
