"""Views and images for a GPU on stand-in devices: ``python -m tests.helpers.standin.views OUT``.

DALI's GPU operators and nvImageCodec's decoder need a GPU, so that their objects are replaced by ones that write down with which
stream and device they were called; what this project does with them is real.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers.standin.process import begin, end

DEVICE = 3


class _Output:
    as_tensor: Any


class _Pipeline:
    """A DALI pipeline of one group of views; its output is an object that can be seen to live."""

    def __init__(self, views: int, size: int, seen: dict[str, list[Any]]) -> None:
        self._views, self._size, self._seen = views, size, seen

    def feed_input(self, name: str, data: Any, cuda_stream: Any = None) -> None:
        self._seen["fed on"].append(cuda_stream.cuda_stream if cuda_stream else None)
        self._count = len(data)

    def schedule_run(self) -> None: ...

    def outputs(self, cuda_stream: Any = None) -> tuple[Any]:
        import torch

        self._seen["given on"].append(cuda_stream.cuda_stream)
        out = _Output()
        joint = torch.empty(self._count, 3, self._size, self._size, device=f"cuda:{DEVICE}")
        out.as_tensor = lambda: joint
        self._seen["buffers"].append(weakref.ref(out))
        return (out,)


def measure() -> dict[str, Any]:
    """Runs three groups of views twice, the first time as if the device were still busy."""
    import numpy as np
    import torch

    from pipeline.data.augment import dali, decode
    from pipeline.data.augment.plan import make_plan
    from pipeline.data.augment.views import ViewSpec

    torch.cuda.set_device(DEVICE)
    side = torch.cuda.Stream()
    seen: dict[str, list[Any]] = {"fed on": [], "given on": [], "buffers": [], "devices": []}

    class TensorGPU:
        def __init__(self, image: Any, layout: str, device_id: int = -1) -> None:
            seen["devices"].append(device_id)

    dali.tensors = SimpleNamespace(TensorGPU=TensorGPU)
    dali.Augmenter._build = staticmethod(  # type: ignore[method-assign]
        lambda group, **_: (_Pipeline(len(group.views), group.size, seen), [])
    )
    specs = tuple(ViewSpec(f"view{side_}", 2, side_, (0.3, 1.0)) for side_ in (32, 16, 8))
    augmenter = dali.Augmenter(specs, batch_size=4, device_id=DEVICE)
    plan = make_plan(specs, ids=np.arange(4, dtype=np.uint64), epochs=np.zeros(4, np.int64), sizes=np.full((4, 2), 64), seed=0)
    busy = torch.cuda.Event.query
    torch.cuda.Event.query = lambda _: False  # type: ignore[method-assign]
    with torch.cuda.stream(side):
        for _ in range(2):
            views = augmenter.run([torch.empty(64, 64, 3, dtype=torch.uint8)] * 4, plan)
    gc.collect()
    held = sum(buffer() is not None for buffer in seen["buffers"])
    torch.cuda.Event.query = busy  # type: ignore[method-assign]
    with torch.cuda.stream(side):
        augmenter.run([torch.empty(64, 64, 3, dtype=torch.uint8)] * 4, plan)
        gc.collect()
        decoder = decode.Decoder.__new__(decode.Decoder)
        streams: list[int] = []
        decoder._device_id, decoder._params = DEVICE, None
        decoder._decoder = SimpleNamespace(decode=lambda data, params, cuda_stream: streams.append(cuda_stream) or [None])
        decoder.decode([b"no image"])
        blank = decoder.blank(8)
    return {
        "side": side.cuda_stream,
        "fed on": seen["fed on"],
        "given on": seen["given on"],
        "devices": sorted(set(seen["devices"])),
        "decoded on": streams,
        "blank on": str(blank.device),
        "views": {name: [list(view.shape) for view in group] for name, group in views.items()},
        "held while busy": held,
        "held when done": sum(buffer() is not None for buffer in seen["buffers"]),
    }


def main() -> None:
    """Entry of the module."""
    recorder = begin()
    result = measure()
    Path(sys.argv[1]).write_text(json.dumps({**result, "record": recorder.mark().to_json()}))


if __name__ == "__main__":
    main()
    end()
