"""How much a small model gains from compiled blocks and CUDA graphs: ViT-S/14, whose step is bound by launches."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.bench.prove.speed import forms
from pipeline.bench.prove.stage import Check, Place


def checks(place: Place) -> Iterator[Check]:
    """Images per second of each form of a step."""
    model, batch = ("tiny-14", 2) if place.toy else ("S-14", 128)
    prototypes = 256 if place.toy else 65536
    for graphs in (False, True) if place.device == "cuda" else (False,):
        yield from forms(place, model, batch, prototypes=prototypes, flops=None, graphs=graphs)
