"""Host waits and blocking copies that a step still has, outside log steps: exact, and meant to shrink to nothing.

One entry a place: what waits, in which function of the project, and behind ``<`` the function of a library that it called; with
how often in one step of one micro-batch. A wait that is gone must be deleted here; a new one is a regression.
"""

from __future__ import annotations

ALLOWED: dict[str, dict[str, int]] = {
    "dinov2": {},
    "clip": {},
    "siglip": {},
    "detailclip": {},
    "dino": {},
    "coca": {},
    "simvlm": {},
    "lejepa": {},
    "mocov3": {},
    "simclr": {},
    "mocov2": {},
    "byol": {},
    "distill": {},
}
