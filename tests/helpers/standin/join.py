"""Joins a group of ranks on stand-in devices: ``python -m tests.helpers.standin.join OUT RANK WORLD``; writes device or error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.helpers.standin.process import begin, end


def main() -> None:
    """Entry of the module."""
    out, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    begin()
    from pipeline.errors import LaunchError
    from pipeline.runtime import process_group

    try:
        place = process_group.join(
            rank=rank, size=world, local_rank=rank, local_size=world, address="127.0.0.1", port=0, key="standin"
        )
        result = {"device": str(place.device), "name": process_group._gpu_name(place.device)}
    except LaunchError as error:
        result = {"error": str(error)}
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    end()
