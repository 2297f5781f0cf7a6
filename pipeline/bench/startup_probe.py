"""One start of ``fovea train``, from the command to the end of its first step: ``python startup_probe.py JSON``.

The first step has ended when rank 0 has printed its line. CPU time is that of all processes that the command has started.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time

from pipeline.bench.machine import cpu_seconds

_FIRST = re.compile(r"step\s+1/")


def main() -> int:
    """Run the command; print what its start cost."""
    options = json.loads(sys.argv[1])
    environment = {**os.environ, **options["environment"]}
    result: dict[str, float] = {}
    own, begin = cpu_seconds(), time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            options["command"],
            env=environment,
            cwd=options["folder"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not result and _FIRST.match(line):
                    result = {"wall": time.monotonic() - begin, "cpu": cpu_seconds() - own}
        if process.returncode or not result:
            errors.seek(0)
            last = [line.strip() for line in errors.read().splitlines() if line.strip()][-1:]
            print(last[0] if last else f"it ended with code {process.returncode} and no message", file=sys.stderr)
            return process.returncode or 1
    print(json.dumps({**result, "total": cpu_seconds() - own}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
