"""A process for dangerous pictures: judged, decoded and compared with Pillow where a crash hurts nobody.

:func:`examine` starts :func:`main` in a new process, gives it the files, collects one answer after the other, and starts it again
behind a file that killed it.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.augment.decode import Decoder
from pipeline.data.index.image_header import HeaderInfo, inspect_header

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Attributes:
        judgement: before decoding; ``None`` if that took the process down.
        shape: of the decoded picture; ``None`` if there is none.
        distance: mean absolute difference from Pillow's picture, levels; ``None`` if Pillow has none of this shape.
        digest: of the decoded pixels.
        megabytes: by which the process grew.
        death: the signal that killed the process, 0 if it lived.
    """

    judgement: HeaderInfo | None
    shape: tuple[int, ...] | None = None
    distance: float | None = None
    digest: int = 0
    megabytes: int = 0
    death: int = 0


def examine(files: list[bytes], *, decode_all: bool = False) -> list[Outcome]:
    """Judges each file, and decodes those that are accepted (or all), in a process of their own."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(files):
        with tempfile.TemporaryFile() as answers:
            child = subprocess.run(
                [sys.executable, "-c", "from tests.helpers.ward import main; main()", "all" if decode_all else "accepted"],
                input=pickle.dumps(files[len(outcomes) :]),
                stdout=answers,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            answers.seek(0)
            while True:
                try:
                    outcomes.append(pickle.load(answers))
                except (EOFError, pickle.UnpicklingError):
                    break
        if child.returncode:
            outcomes.append(Outcome(None, death=-child.returncode))
    return outcomes


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    """A picture as Pillow shows it: EXIF orientation applied, alpha dropped, 16-bit gray scaled rather than clipped."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        for name in ("xmp", "XML:com.adobe.xmp", "Raw profile type xmp"):  # exif_transpose would turn pictures for these too
            image.info.pop(name, None)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            return np.repeat(np.rint(np.asarray(upright).astype(np.float64) / 257).astype(np.uint8)[:, :, None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))


def _outcome(decoder: Decoder, data: bytes, decode_all: bool) -> Outcome:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    judgement = inspect_header(data, min_side=1)
    if judgement.status != "ok" and not decode_all:
        return Outcome(judgement)
    (pixels,) = decoder.decode([data])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if pixels is None:
        return Outcome(judgement, megabytes=grown)
    distance = None
    try:
        expected = by_pillow(data)
        if expected.shape == pixels.shape:
            distance = float(np.abs(expected.astype(np.int16) - pixels).mean())
    except Exception:  # Pillow may refuse what we decode
        distance = None
    return Outcome(judgement, tuple(pixels.shape), distance, hash(pixels.tobytes()), grown)


def main() -> None:
    """Answers for every file on standard input."""
    warnings.simplefilter("ignore")
    files = pickle.load(sys.stdin.buffer)
    decoder = Decoder(threads=1)
    for data in files:
        signal.alarm(SECONDS)
        outcome = _outcome(decoder, data, sys.argv[1] == "all")
        sys.stdout.buffer.write(pickle.dumps(outcome))
        sys.stdout.buffer.flush()
