"""The option ``--channels`` of ``fovea shards``: what images of other than 8-bit RGB must have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import ConfigError
from pipeline.masking import printable

if TYPE_CHECKING:
    from pipeline.data.channel_settings import ChannelSettings
    from pipeline.data.index.manifest import Manifest
    from pipeline.data.inspect.values import Values
    from pipeline.data.settings import DataSettings

ChannelsOption = Annotated[
    str | None,
    typer.Option(
        "--channels",
        metavar="TEXT",
        help="Channels of images that are not 8-bit RGB: number and type, such as 8xuint16 or 3xfloat32, or a YAML file with "
        "data.channels.",
    ),
]
_LIMIT = 1 << 20  # bytes of the file


def channels_of(text: str | None) -> ChannelSettings | None:
    """The settings that the option names; ``None`` without it.

    Raises:
        ConfigError: it is neither a number with a type nor a file with valid settings.
    """
    if text is None:
        return None
    from pydantic import ValidationError

    from pipeline.data.channel_settings import ChannelSettings

    match = re.fullmatch(r"(\d{1,3})x(uint8|uint16|float32)", text)
    document: Any = {"count": int(match[1]), "dtype": match[2]} if match else _of_file(text)
    try:
        return ChannelSettings.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            printable(f"{key} {first['msg']}".strip(), limit=300),
            where="--channels",
            hint="See data.channels in configs/README.md",
        ) from None


def _of_file(text: str) -> Any:
    import yaml

    from pipeline.untrusted import read_bytes

    hint = "Write number and type, such as 8xuint16, or name a YAML file with data.channels"
    try:
        document = yaml.safe_load(read_bytes(Path(text), limit=_LIMIT, error=ConfigError))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        raise ConfigError(f"{printable(text, limit=80)!r} names no channels", where="--channels", hint=hint) from None
    for name in ("data", "channels"):
        document = document.get(name, document) if isinstance(document, dict) else document
    if not isinstance(document, dict):
        raise ConfigError(f"{printable(text, limit=80)!r} has no data.channels", where="--channels", hint=hint)
    return document


def measured(manifest: Manifest, settings: DataSettings, images: int) -> Values:
    """Measures the values of images with declared channels, with progress on stderr."""
    from launch.cli.shards_index import store_at_start
    from launch.progress import progress_bar
    from pipeline.data.inspect.values import measure

    assert settings.channels is not None
    with progress_bar("measuring") as progress:
        return measure(manifest, settings.channels, images=images, store=store_at_start(), progress=progress)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically.

    Raises:
        DataError: it cannot be written.
    """
    from pipeline.data.storage import write_atomically
    from pipeline.errors import DataError

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", where=str(path), hint="Choose another file") from error
