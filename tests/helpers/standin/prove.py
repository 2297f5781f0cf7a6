"""A stage of ``fovea prove`` on stand-in devices: ``python -m tests.helpers.standin.prove OUT STAGE``; writes its rows as JSON.

Kernels do nothing there, so that no number is right; what the rows show is that the path on the host runs to its end.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.helpers.standin.process import begin, end


def main() -> None:
    """Entry of the module."""
    out, name = Path(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    recorder = begin()
    from pipeline.bench.prove.stage import Setup

    stage: Any = importlib.import_module(f"pipeline.bench.prove.{name}")
    with tempfile.TemporaryDirectory() as folder:
        rows = [asdict(row) for row in stage.checks(Setup("cuda", toy=True, folder=Path(folder)))]
    out.write_text(json.dumps({"rows": rows, "record": recorder.mark().to_json()}))


if __name__ == "__main__":
    main()
    end()
