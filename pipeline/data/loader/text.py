"""Chooses the caption of an epoch and tokenizes it.

Uses open_clip's own tokenizer, byte-pair encoding with the vocabulary in its package, so nothing is downloaded. Only that one
module of the package is imported, which takes a tenth of the package's import time, and only in the process that first tokenizes.
Untrusted captions are sanitized: they cannot forge the start or end token, break the encoder with a lone surrogate, delay it
with a word of a million letters, or fill the memory with rare words.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.views import TextSpec
from pipeline.data.order.random import uniforms
from pipeline.errors import ConfigError

_CAPTION = 0xCA97  # identifies the random draw
_LETTERS = 256  # maximum letters of one word; byte-pair encoding takes quadratic time
_TEXT = 128  # maximum letters per token of context; the rest of a caption is ignored
_CACHED = 100_000  # maximum number of words cached with their tokens
_MULTIPLE = 8  # trimmed lengths are multiples of this: fewer shapes to compile, and sizes that suit a GPU


def choose(captions: Sequence[str], number: int, epoch: int, seed: int) -> str:
    """Returns the caption of a sample used in an epoch: a function of (seed, epoch, sample) alone.

    Args:
        captions: those of the sample; empty ones are never chosen.
        number: the sample, ``shard << 32 | row``.
        epoch: the sample's epoch.
        seed: the run's seed.

    Returns:
        The caption, or an empty string if there is none.
    """
    filled = [caption for caption in captions if caption.strip()]
    if len(filled) < 2:
        return filled[0] if filled else ""
    draw = uniforms(np.array([number], dtype=np.uint64), 1, seed, _CAPTION, epochs=epoch)[0, 0]
    return filled[int(draw * len(filled))]


class Tokenizer:
    """Converts texts to tokens; pickled as its specification only.

    Args:
        spec: tokenizer and context length.

    Raises:
        ConfigError: open_clip is not installed, has no such architecture, or that architecture's tokenizer would be downloaded.
    """

    def __init__(self, spec: TextSpec) -> None:
        if spec.context < 3:
            raise ConfigError(f"a context of {spec.context} tokens has no room for text", where="context", hint="Use 77")
        self.spec = spec
        self._options = _options(spec.tokenizer)
        self._made: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokenizes texts to ``[n, context]`` int64: start token, text, end token, zeros."""
        if self._made is None:
            self._made = _module().SimpleTokenizer(**self._options)
            self._marks = frozenset(self._made.all_special_ids)
        made, context = self._made, self.spec.context
        if len(made.cache) > _CACHED:
            made.cache = {mark: mark for mark in made.cache if made.encoder.get(mark) in self._marks}
        tokens = np.zeros((len(texts), context), dtype=np.int64)
        for row, text in enumerate(texts):
            inner = [token for token in made.encode(_tame(text, context)) if token not in self._marks][: context - 2]
            tokens[row, : len(inner) + 2] = [made.sot_token_id, *inner, made.eot_token_id]
        return tokens


@cache
def tokenizer(spec: TextSpec) -> Tokenizer:
    """Returns this process's tokenizer for a specification; see :class:`Tokenizer`."""
    return Tokenizer(spec)


def trimmed(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns tokens ``[n, length]`` without the columns that are padding in all rows, ``length`` rounded up to a multiple of 8.

    Args:
        tokens: ``[n, context]``, each row ending in an end token and then zeros.
    """
    filled = np.flatnonzero(tokens.any(axis=0))
    longest = int(filled[-1]) + 1 if len(filled) else 1
    return tokens[:, : -(-longest // _MULTIPLE) * _MULTIPLE]


def last_positions(tokens: NDArray[np.int64]) -> list[int]:
    """Returns the position of each text's end token, the largest number of the vocabulary; 0 is a token too.

    Args:
        tokens: ``[n, context]``, each row ending in an end token and then zeros.
    """
    positions: list[int] = tokens.argmax(axis=1).tolist()
    return positions


def _tame(text: str, context: int) -> str:
    text = text[: _TEXT * context].encode("utf-8", "replace").decode("utf-8")
    return re.sub(rf"(\S{{{_LETTERS}}})\S+", r"\1", text)


def _package() -> Path:
    spec = importlib.util.find_spec("open_clip")  # locates the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("reading captions needs open_clip", where="TextSpec", hint="Install it: pip install open_clip_torch")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_fovea_open_clip_tokenizer", _package() / "tokenizer.py")
    if spec is None or spec.loader is None:
        raise ConfigError("open_clip has no tokenizer", where=str(_package()), hint="Install another version of open_clip_torch")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _options(architecture: str) -> dict[str, Any]:
    """Returns the options with which open_clip would create an architecture's tokenizer."""
    folder = _package() / "model_configs"
    file = folder / f"{architecture.replace('/', '-')}.json"
    try:
        text = json.loads(file.read_text())["text_cfg"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"open_clip has no architecture {architecture!r} with text",
            where="tokenizer",
            hint="Use the name of one, such as ViT-B-32 or ViT-L-14",
        ) from error
    if "hf_tokenizer_name" in text:
        raise ConfigError(
            f"the tokenizer of {architecture} ({text['hf_tokenizer_name']}) does not come with open_clip and would be fetched",
            where="tokenizer",
            hint="Use ViT-B-32 or another architecture with open_clip's own vocabulary",
        )
    return {key: value for key, value in text.get("tokenizer_kwargs", {}).items() if key in ("clean",)}
