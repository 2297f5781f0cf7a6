"""``fovea config``: shows and checks configurations."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli import shards

app = typer.Typer(no_args_is_help=True, help="Show and check configurations.")


@app.command("show")
def config_show(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A config file or name; without it, all names are listed.")
    ] = None,
    overrides: shards.Overrides = None,
) -> None:
    """Print the effective configuration and the origin of each value. The output is itself a valid config.

    [b]Examples[/b]

    fovea config show

    fovea config show dinov2/cifar10_vit_tiny schedule.lr.peak=1e-3 > mine.yaml
    """
    from pipeline.config.load import available, headline, load, show

    if config is None:
        names = available()
        width = max(map(len, names), default=0)
        for name, file in names.items():
            print(f"{name:<{width}}  {headline(file)}")
        return
    print(show(load(config, overrides or ())), end="")


@app.command("check")
def config_check(config: shards.ConfigArgument, overrides: shards.Overrides = None) -> None:
    """Check a configuration without starting a run. All problems are reported at once; the exit code is then 2.

    If it names columns of metadata (guidance), some samples of the shards are read to see whether they have them.

    [b]Example[/b]

    fovea config check my.yaml train.global_batch_size=512
    """
    from pipeline.config.load import fingerprint, load

    loaded = load(config, overrides or ())
    if loaded.config.guidance.columns:
        from pipeline.data.inputs import check_columns

        check_columns(loaded.config)
    if loaded.config.method.views.curriculum:
        from pipeline.data.augment.curriculum import curriculum_text

        print(f"views: {curriculum_text(loaded.config.method.views)}")
    print(f"{loaded.source} is in order; fingerprint {fingerprint(loaded.config)[:12]}")
