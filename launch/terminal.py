"""Terminal and log output without control characters from file names, keys or external logs."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.masking import shown


class Terminal(Console):
    """A rich console whose texts pass :func:`pipeline.masking.shown`; the styles are rich's own."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render the cleaned text with its markup."""
        return super().render_str(shown(text), **options)


class _Clean(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def clean_logs() -> None:
    """Clean all messages of Python's logging, except those of libraries with their own handlers."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Clean())
    for handler in logging.getLogger().handlers:
        if type(handler.formatter) in (type(None), logging.Formatter):
            handler.setFormatter(_Clean(handler.formatter._fmt if handler.formatter else None))
