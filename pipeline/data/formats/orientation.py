"""The orientation of an image, of EXIF and TIFF: how stored rows and columns are turned for display."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

TAG = 0x0112
_TURNS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}  # by orientation: whether rows and columns are exchanged, and then the directions of rows and columns


def known(value: Any) -> int:
    """The value of the tag if it is an orientation, 1 to 8; otherwise 1, as stored."""
    return int(value) if isinstance(value, int) and value in _TURNS else 1  # tifffile's is an enumeration


def of_exif(exif: bytes) -> int:
    """The orientation of an EXIF block, 1 to 8; 1 if it has none, or cannot be read: that is no reason to refuse an image."""
    from PIL import Image

    block = Image.Exif()
    try:
        block.load(exif)
        return known(block.get(TAG))
    except Exception:  # a malicious block can make the parser raise any exception
        return 1


def swaps(orientation: int) -> bool:
    """Whether an orientation exchanges height and width."""
    return orientation in _TURNS and _TURNS[orientation][0]


def turned(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """An image ``[height, width, channels]`` as it is displayed; a view of ``values``."""
    if orientation not in _TURNS:
        return values
    swapped, down, across = _TURNS[orientation]
    upright = values.transpose(1, 0, 2) if swapped else values
    return upright[::down, ::across]
