"""Types and bounds of a checkpoint's manifest, as pydantic models; :mod:`pipeline.checkpoint.manifest` validates with them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Text = Annotated[str, Field(max_length=10_000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class File(_Part):
    """One file of a checkpoint: plain name, size in bytes, and checksum."""

    name: str
    size: Count
    xxh3: Text | None = None
    blake2b: Text | None = None


class _Origin(_Part):
    id: Text
    path: Text


class _Data(_Part):
    samples: Count = 0
    seen: Count = 0
    fingerprint: Text = ""
    substituted: dict[str, Count] = {}
    counts: dict[str, Count] = {}
    quarantine: dict[Annotated[str, Field(pattern=r"^[0-9]{1,20}$")], str] = {}


class Head(_Part):
    """Fields that every version of the format has."""

    format: int
    step: Count
    files: Annotated[list[File], Field(max_length=1_000_000)]
    serial: Count = 0


class Manifest(Head):
    """Fields of this version of the format; keys that older or smaller checkpoints lack may be missing."""

    applied: Count = 0
    skipped: Count = 0
    samples_seen: Count = 0
    seconds: Finite = 0.0
    attempt: Count = 0
    world: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    run: Text = ""
    fovea: Text = ""
    torch: Text = ""
    python: Text = ""
    fingerprint: Text = ""
    config: dict[str, Any] = {}
    data: _Data = _Data()
    init: dict[str, Any] | None = None
    origins: list[_Origin] = []
    scores: dict[str, float] = {}
    scored: int = -1
    judged: list[str] = []
    shapes: dict[str, Annotated[list[Count], Field(max_length=16)]] = {}
    fragments: list[dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]] = []
