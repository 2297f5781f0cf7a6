"""Measures compiled blocks and CUDA graphs on ViT-S/14, whose step is bound by kernel launches."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.bench.plain import alone
from pipeline.bench.prove.speed import forms
from pipeline.bench.prove.stage import Check, Setup


def checks(setup: Setup) -> Iterator[Check]:
    """Images per second of each form of a step."""
    model, batch = ("tiny-14", 2) if setup.toy else ("S-14", 128)
    prototypes = 256 if setup.toy else 65536
    with alone(setup.device):  # see the stage speed
        for graphs in (False, True) if setup.device == "cuda" else (False,):
            yield from forms(setup, model, batch, prototypes=prototypes, flops=None, graphs=graphs)
