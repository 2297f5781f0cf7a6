"""A whole ``fovea`` command as one rank on stand-in devices: ``python -m tests.helpers.standin.train OUT train CONFIG …``.

Images are decoded and augmented by DALI's CPU operators, since its GPU operators need a GPU; everything behind them goes to the
device. Writes what was recorded as JSON, also if the command fails.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.helpers.standin.process import begin


def main() -> int:
    """Entry of the module; the exit code is the command's."""
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    warnings.simplefilter("ignore")
    recorder = begin()
    from launch.cli.main import main as fovea
    from pipeline.checkpoint import writer
    from pipeline.data.loader import batch_stream

    decoder_of = batch_stream.decoder_of
    batch_stream.decoder_of = lambda *arguments, **options: decoder_of(*arguments, **{**options, "device_id": None})
    batch_stream.Augmenter = _on_cpu(batch_stream.Augmenter)  # type: ignore[assignment,misc]
    write = writer.write_tensors

    def write_tensors(path: Path, tensors: Mapping[str, Any]) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)  # rank 0 makes it, and there may be none
        return write(path, tensors)

    writer.write_tensors = write_tensors  # type: ignore[assignment]
    try:
        fovea(arguments)
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        out.write_text(json.dumps(recorder.mark().to_json()))
    return 0


def _on_cpu(kind: type) -> type:
    class OnCpu(kind):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "device_id": None})

    return OnCpu


if __name__ == "__main__":
    sys.exit(main())
