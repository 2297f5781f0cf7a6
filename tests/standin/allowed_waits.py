"""Host waits and blocking copies that a step still has, outside log steps: exact, and meant to shrink to nothing.

One entry a place: what waits, in which function of the project, and behind ``<`` the function of a library that it called; with
how often in one step of one micro-batch. A wait that is gone must be deleted here; a new one is a regression.
"""

from __future__ import annotations

_ENGINE = "pipeline/training/engine.py:Engine."
_ZERO = "deepspeed/runtime/zero/stage_1_and_2.py:DeepSpeedZeroOptimizer."
_TIMER = "deepspeed/utils/timer.py:ThroughputTimer."

ENGINE = {
    f"for the device: {_ENGINE}forward_backward < {_TIMER}start": 1,
    f"for the device: {_ENGINE}forward_backward < {_ZERO}independent_gradient_partition_epilogue": 1,
    f"for a stream: {_ENGINE}step": 1,
    f"for the device: {_ENGINE}step < {_TIMER}stop": 1,
}

# torch's SyncBatchNorm selects the rows with a count above zero.
_NORM = "for a stream: pipeline/models/norms.py:GlobalBatchNorm.forward"

ALLOWED: dict[str, dict[str, int]] = {
    "dinov2": ENGINE,
    "clip": ENGINE,
    "siglip": ENGINE,
    "detailclip": ENGINE,
    "dino": ENGINE,
    "coca": ENGINE,
    "simvlm": ENGINE,
    "mocov3": {**ENGINE, _NORM: 48},
    "simclr": {**ENGINE, _NORM: 168},
    "mocov2": {**ENGINE, _NORM: 318},
    "byol": {**ENGINE, _NORM: 654},
    "distill": ENGINE,
}
