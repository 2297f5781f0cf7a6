"""Writes a configuration as YAML whose header explains each choice."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.masking import hide_secrets, printable

_WIDTH = 44
COMMAND_LINE = "given on the command line"


def config_text(
    settings: Mapping[str, Any], reasons: Mapping[str, str], *, title: str, facts: Sequence[tuple[str, str]], notes: Sequence[str]
) -> str:
    """The text of a config file.

    Args:
        settings: sections and their values.
        reasons: why a value was chosen, by dotted key; values without a reason are not explained.
        title: first line.
        facts: names and texts of further lines.
        notes: what was recognized, converted or left out.
    """
    lines = [f"# {_line(title)}", "#"]
    lines += [f"#   {name:<9} {_line(text)}" for name, text in facts]
    lines += [f"#   {'note':<9} {_line(note)}" for note in notes]
    lines += ["#", "# Why each value was chosen:", "#"]
    for key, value in _leaves(settings):
        if reason := reasons.get(key):
            lines.append(f"#   {f'{key} = {_short(value)}':<{_WIDTH}}  {_line(reason)}")
    if "method" in reasons:
        lines.append(f"#   {'method':<{_WIDTH}}  {_line(reasons['method'])}")
    return "\n".join([*lines, "", *_yaml(settings, 0), ""])


def command_line(arguments: Sequence[str]) -> str:
    """The command as it can be typed again, without secrets."""
    return hide_secrets(shlex.join(["fovea", *arguments]))


def _line(text: str) -> str:
    return printable(hide_secrets(text))


def _short(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value), limit=40)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _yaml(settings: Mapping[str, Any], depth: int) -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield f"{'  ' * depth}{name}:"
            yield from _yaml(value, depth + 1)
        else:
            yield f"{'  ' * depth}{name}: {json.dumps(value)}"
