"""Opens pyarrow, the optional dependency that reads and writes Parquet."""

from __future__ import annotations

from typing import Any

from pipeline.errors import DataError

_OLDEST = 17  # the floor of the extra "parquet"; releases before 14.0.1 execute code of a file
_INSTALL = "Install it: pip install 'fovea[parquet]'"


def open_pyarrow(where: str, *, hint: str = _INSTALL) -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet`` of the optional dependency.

    Args:
        where: the file or folder that needs them, for the message.
        hint: how to go on without them.

    Raises:
        DataError: it is not installed, or a version older than the extra admits, as another package may have installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("pyarrow is not installed", where=where, hint=hint) from error
    if int(pyarrow.__version__.partition(".")[0]) < _OLDEST:
        raise DataError(f"pyarrow {pyarrow.__version__} must be at least {_OLDEST}", where=where, hint=hint)
    return pyarrow, parquet
