"""Small programs whose record is known: ``python -m tests.helpers.standin.examples OUT``."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

from tests.helpers.standin.process import begin, end


def main() -> None:
    """Entry of the module: a product, a question to the device, copies, and threads on their devices."""
    recorder = begin()
    import torch

    torch.cuda.set_device(2)
    records: dict[str, Any] = {}
    a = torch.empty(64, 64, device="cuda", requires_grad=True)
    host = torch.zeros(4)
    recorder.mark()
    (a @ a).relu().sum().backward()
    records["product"] = recorder.mark().to_json()
    low = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16)
    torch.addmm(low[0], low, low)
    records["product and bias"] = recorder.mark().to_json()
    a.sum().item()
    records["question"] = recorder.mark().to_json()
    host.to("cuda", non_blocking=True)
    records["pageable"] = recorder.mark().to_json()
    host.pin_memory().to("cuda", non_blocking=True)
    records["pinned"] = recorder.mark().to_json()
    devices = []
    thread = threading.Thread(target=lambda: devices.append(torch.cuda.current_device()), name="new")
    thread.start()
    thread.join()
    stream = torch.cuda.Stream(3)
    event = torch.cuda.Event()
    event.record()
    try:
        event.record(stream)
        refused = ""
    except RuntimeError as error:
        refused = str(error).splitlines()[0]
    Path(sys.argv[1]).write_text(json.dumps({"records": records, "new thread": devices[0], "other device": refused}))


if __name__ == "__main__":
    main()
    end()
