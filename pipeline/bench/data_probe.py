"""The data path of one version of fovea, in a process of its own: ``python data_probe.py JSON``.

Runs with this version or, for a comparison in the same run, with an earlier one (``PYTHONPATH``), so it uses only what both have.
For each line of the standard input it makes the views of some steps, and prints a digest of their pixels (``pixels``) or the CPU
seconds (``seconds``).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.bench import data
from pipeline.bench.machine import cpu_seconds
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions


def main() -> None:
    """Serve until the standard input ends."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    options = data.Options(shards=tuple(settings["shards"]), batch=settings["batch"])
    manifest, _ = data.prepare(options, Path(settings["folder"]))
    for what in sys.stdin:
        stream = BatchStream(
            data.dataset(manifest, options),
            device=torch.device("cpu"),
            options=StreamOptions(micro_batch=options.batch, workers=0, threads=1, prefetch=1, hue=settings["hue"]),
            bad_samples=BadSamples(None),
            first=0,
            last=settings["steps"],
        )
        digest, begin = hashlib.blake2b(digest_size=16), cpu_seconds()
        for _, batches in stream:
            if what.strip() == "pixels":
                for view in (view for batch in batches for _, views in sorted(batch.views.items()) for view in views):
                    digest.update(view.contiguous().view(torch.uint8).numpy().data)
        print(json.dumps(digest.hexdigest() if what.strip() == "pixels" else cpu_seconds() - begin), flush=True)


if __name__ == "__main__":
    main()
