"""Reads untrusted weight files as tensors by name, without executing code from them, with any library version.

A ``.safetensors`` file holds no code. Every other file is a pickle and goes to ``torch.load(weights_only=True)``, which builds
only tensors and containers. No other function of this package reads foreign weight files.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.untrusted import hide_secrets, open_regular, plain_name, printable, read_json

MAX_SHARDS = 1000  # maximum files of one set of weights
_DEPTH = 8  # maximum nesting of containers
_ENTRIES = 1_000_000  # maximum entries of all containers of a file; a container referenced several times counts each time
_ZIP = b"PK\x03\x04"
_ZEROS = b"bytearray\n"  # type name in a pickle, which torch allows: a few bytes could request any amount of memory
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_HINT = "Download it again, or convert it to safetensors where it is trusted"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file with ``safetensors.safe_open``; converts every error, also within the context, to CheckpointError.

    Raises:
        CheckpointError: the file cannot be read, or holds no such tensor.
    """
    try:
        os.close(open_regular(path, error=CheckpointError))
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"cannot be read as tensors ({reason(error)})", where=printable(str(path)), hint=_HINT) from None


def read_tensors(path: Path, *, shapes_only: bool = False) -> dict[str, Any]:
    """Reads a weights file: tensors, and containers of tensors, by name.

    Args:
        path: a regular file; ``.safetensors``, else the output of ``torch.save``.
        shapes_only: return tensors on the ``meta`` device, without values.

    Raises:
        CheckpointError: the file cannot be read, holds objects other than tensors, or tensors that claim more memory than the
            file has.
    """
    try:
        os.close(open_regular(path, error=CheckpointError))
        if path.suffix == ".safetensors":
            with opened(path) as file:
                if shapes_only:
                    return {k: torch.empty(file.get_slice(k).get_shape(), device="meta") for k in file.keys()}  # noqa: SIM118
                return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        _check_pickle(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle's protocol
            state: Any = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # parsing foreign bytes can raise anything
        raise CheckpointError(f"cannot be read as tensors ({reason(error)})", where=printable(str(path)), hint=_HINT) from None
    if not isinstance(state, Mapping):
        raise CheckpointError("contains no named tensors", where=printable(str(path)), hint="Give a state dict")
    return _plain(state, str(path), _DEPTH, itertools.count())


def _check_pickle(path: Path) -> None:
    """Refuses files that would take far more memory than their size: compressed archives, and byte arrays by their length."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            archive = content[: len(_ZIP)] == _ZIP
            if content.find(_ZEROS) >= 0:
                raise CheckpointError("contains a byte array, which is not a tensor", where=printable(str(path)), hint=_HINT)
        if archive:
            with zipfile.ZipFile(file) as opened_archive:
                members = opened_archive.infolist()
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > os.fstat(file.fileno()).st_size:
                raise CheckpointError("is a compressed archive, which torch never writes", where=printable(str(path)), hint=_HINT)


def read_folder(folder: Path, names: tuple[str, ...], *, shapes_only: bool = False) -> dict[str, Any]:
    """Reads the weights of a folder: the first file that exists, or all files that an index beside it lists.

    Args:
        folder: the folder.
        names: file names, the preferred one first.
        shapes_only: as for :func:`read_tensors`.

    Raises:
        CheckpointError: as :func:`read_tensors`; none of the files exists, or an index lists a name that is not a plain file
            name.
    """
    for name in names:
        if (folder / name).exists():
            return read_tensors(folder / name, shapes_only=shapes_only)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_shards(folder, index, shapes_only)
    raise CheckpointError(
        "contains no weights", where=printable(str(folder)), hint=f"Name a folder with one of {', '.join(names)}"
    )


def _read_shards(folder: Path, index: Path, shapes_only: bool) -> dict[str, Any]:
    document = read_json(index, error=CheckpointError)
    table = document.get("weight_map") if isinstance(document, dict) else None
    files = set(table.values()) if isinstance(table, dict) and all(isinstance(v, str) for v in table.values()) else set()
    if not 0 < len(files) <= MAX_SHARDS:
        raise CheckpointError("must list the weight files", where=printable(str(index)), hint="Download the folder again")
    state: dict[str, Any] = {}
    for name in sorted(files):
        state |= read_tensors(folder / plain_name(name, where=str(index), error=CheckpointError), shapes_only=shapes_only)
    return state


def _plain(state: Mapping[Any, Any], where: str, depth: int, seen: Iterator[int]) -> dict[str, Any]:
    """The named entries of the containers, as plain dictionaries; refuses tensors without backing memory."""
    kept: dict[str, Any] = {}
    for name, value in state.items():
        if next(seen) >= _ENTRIES:
            raise CheckpointError(f"its containers have more than {_ENTRIES} entries", where=printable(where), hint=_HINT)
        if not isinstance(name, str):
            continue  # optimizer state
        if isinstance(value, Mapping):
            if depth == 0:
                raise CheckpointError("its containers are nested too deeply", where=printable(where), hint=_HINT)
            kept[name] = _plain(value, where, depth - 1, seen)
        elif isinstance(value, Tensor):
            kept[name] = _dense(value, name, where)
        else:
            kept[name] = value
    return kept


def _dense(tensor: Tensor, name: str, where: str) -> Tensor:
    is_dense = tensor.layout is torch.strided and not tensor.is_quantized
    if not is_dense or (not tensor.is_meta and tensor.nbytes > tensor.untyped_storage().nbytes()):
        raise CheckpointError(
            f"the tensor {printable(name, limit=80)} must be dense, with a value in the file for each element",
            where=printable(where),
            hint=_HINT,
        )
    return tensor.detach()


def reason(error: BaseException) -> str:
    """Why a library refused a file, as part of a sentence: printable, without secrets, and without advice to trust the file."""
    text = " ".join(str(error).split())
    if "weights_only" in text or "Unsupported global" in text or "allowlist" in text.lower():
        return "it holds Python objects, which could run code"
    return printable(hide_secrets(text[:4000]), limit=200) or type(error).__name__


@contextlib.contextmanager
def only_weights() -> Iterator[None]:
    """Context in which ``torch.load`` runs no code from pickles; old timm versions would request full loading."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
