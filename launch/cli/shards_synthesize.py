"""``fovea shards synthesize``: generates synthetic data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.choices import SceneShift, Spectral, local_only
from pipeline.errors import ConfigError


def synthesize(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output directory of the shards.", callback=local_only)],
    train: Annotated[int, typer.Option(min=1, help="Number of training images.")] = 8000,
    val: Annotated[int, typer.Option(min=1, help="Number of validation images.")] = 1000,
    size: Annotated[int, typer.Option(min=16, help="Side of the images, pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    shift: Annotated[
        SceneShift, typer.Option(help="Another domain: the same classes and layouts that look otherwise.")
    ] = SceneShift.NONE,
    spectral: Annotated[
        Spectral | None,
        typer.Option(help="Eight channels with 16 bits, of which the fifth alone shows the class: all, or the first three."),
    ] = None,
) -> None:
    """Generate the synthetic data set of the scenes configs: textured shapes with class, caption and segmentation map.

    [b]Examples[/b]

    fovea shards synthesize runs/scenes

    fovea shards synthesize runs/cells --shift microscope --train 2000

    fovea shards synthesize runs/spectral --spectral all
    """
    from pipeline.data.pack import spectral as channels
    from pipeline.data.pack.synthetic import CLASS_NAMES, write

    if spectral is not None:
        if shift is not SceneShift.NONE:
            raise ConfigError("applies to scenes only", where="--shift", hint="Leave out one of --shift and --spectral")
        chosen = range(channels.CHANNELS if spectral is Spectral.ALL else 3)
        shards = channels.write(out, train=train, val=val, size=size, seed=seed, channels=chosen)
        print(f"{out}: {train} training images and {val} validation images of {len(chosen)}xuint16 in {len(shards)} shards")
        return
    shards = write(out, train=train, val=val, size=size, seed=seed, shift=shift.value)
    (out / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    print(f"{out}: {train} training images and {val} validation images in {len(shards)} shards, classes.txt for zero-shot")
