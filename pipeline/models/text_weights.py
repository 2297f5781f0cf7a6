"""Loads a text tower's initial weights from a safetensors file; ``init_from`` loads a vision tower's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.models.tensor_files import read_tensors
from pipeline.models.text import TextTower, from_open_clip


def load_text(tower: TextTower, file: Path) -> None:
    """Loads a text tower from a file with open_clip's names, or fovea's own (``fovea checkpoint convert``).

    Raises:
        CheckpointError: the file cannot be read, or names or shapes differ.
    """
    if file.suffix != ".safetensors":
        raise CheckpointError("initial weights must be a safetensors file", where=str(file), hint="Name a safetensors file")
    state = read_tensors(file)
    own = {name.removeprefix("text_tower."): tensor for name, tensor in state.items() if name.startswith("text_tower.")} or state
    _fill(tower, own if "tokens.weight" in own else from_open_clip(state), file)


def _fill(module: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors do not match, the first is {wrong[0]!r}",
            where=str(file),
            hint="Choose method.text.* and method.embed_dim as the weights were trained with",
        )
    module.load_state_dict(dict(state))
