"""``fovea adapt``: writes the config that continues training from pretrained weights on the user's images, and runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.cli import shards
from launch.cli.choices import Trained, local_only
from pipeline.errors import ConfigError, FoveaError
from pipeline.masking import shown
from pipeline.untrusted import read_bytes, read_json

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.weights.adapt.prepare import Prepared

_LARGEST = 4 << 20  # bytes of a config


def enter(app: typer.Typer, command: Sequence[str]) -> None:
    """Add the subcommand.

    Args:
        app: the command ``fovea``.
        command: list that holds the command line after ``fovea`` when the subcommand runs.
    """

    @app.command(short_help="Continue training from pretrained weights on your images.")
    def adapt(
        shards_: Annotated[str, typer.Argument(metavar="SHARDS", help="Your shards: a path or URL, with {000..123} or *.")],
        weights: Annotated[
            str,
            typer.Option(
                "--from",
                metavar="WEIGHTS",
                help="A run or checkpoint of fovea; a file or folder in the layout of DINOv2, DINOv3, timm, open_clip or Hugging "
                "Face; or timm:NAME.",
            ),
        ],
        overrides: shards.Overrides = None,
        to: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Run directory; runs/adapt-WEIGHTS by default.", callback=local_only)
        ] = None,
        train: Annotated[
            Trained, typer.Option(help="Part of the tower that is trained: all of it, its last blocks, or low-rank adapters.")
        ] = Trained.ALL,
        discourage: Annotated[
            list[str] | None,
            typer.Option(
                metavar="COLUMN",
                help="JSON column that features are to lose, such as a scanner; may be repeated.",
            ),
        ] = None,
        encourage: Annotated[
            list[str] | None,
            typer.Option(
                metavar="COLUMN",
                help="JSON column that features are to carry, such as an organ; may be repeated.",
            ),
        ] = None,
        replay: Annotated[
            str | None,
            typer.Option(metavar="SHARDS", help="Old shards that are shown along, so that less is forgotten."),
        ] = None,
        replay_share: Annotated[
            float, typer.Option(min=0.01, max=0.99, help="Share of the samples that are old ones, with --replay.")
        ] = 0.5,
        interpolate: Annotated[
            float | None,
            typer.Option(
                min=0, max=1, help="In the end, also export the weights this share of the way from WEIGHTS to the result."
            ),
        ] = None,
        only_config: Annotated[bool, typer.Option("--config-only", help="Write the config and stop.")] = False,
    ) -> None:
        """Continue self-supervised training (DINOv2) from pretrained weights on your own images.

        Architecture, patch size, registers, resolution and normalization are read from the weights. The settings are written to
        DIR/adapt.yaml, an ordinary config whose header explains each choice. New heads are trained first while the tower is
        frozen. The same command resumes the run.

        [b]Examples[/b]

        fovea adapt '/data/cells/*.tar' --from dinov2_vits14_reg4_pretrain.pth

        fovea adapt '/data/cells/*.tar' --from ./dinov3-vits16-pretrain-lvd1689m --to runs/cells train.duration='20 epochs'

        fovea adapt '/data/cells/*.tar' --from timm:vit_small_patch14_dinov2.lvd142m --config-only

        fovea adapt '/data/cells/*.tar' --from runs/scenes_vit_tiny --replay 'runs/scenes/*train-*.tar'

        fovea adapt '/data/cells/*.tar' --from runs/scenes_vit_tiny --discourage scanner --encourage stain
        """
        columns = tuple((name, "discourage") for name in discourage or ()) + tuple(
            (name, "encourage") for name in encourage or ()
        )
        old = (replay, replay_share) if replay is not None else None
        options = AdaptOptions(train.value, interpolate, only_config, columns, old)
        raise typer.Exit(run(shards_, weights, to, overrides or (), options, command=command))


@dataclass(frozen=True)
class AdaptOptions:
    """Options of ``fovea adapt``.

    Attributes:
        train: part of the tower that is trained, as in ``adapt.train``.
        interpolate: share of the way from the start to the result of the weights that are exported in the end.
        only_config: write the config and do not train.
        columns: columns of metadata, each with ``discourage`` or ``encourage``.
        replay: pattern of old shards that are shown along, and their share of the samples.
    """

    train: str = "all"
    interpolate: float | None = None
    only_config: bool = False
    columns: tuple[tuple[str, str], ...] = ()
    replay: tuple[str, float] | None = None


def run(
    patterns: str,
    weights: str,
    directory: Path | None,
    overrides: Sequence[str],
    options: AdaptOptions,
    *,
    command: Sequence[str],
) -> int:
    """Choose settings, write them as a config, and train; returns the exit code. The same command resumes the run.

    Args:
        patterns: pattern of the training shards.
        weights: fovea run or checkpoint, file or folder of weights, or ``timm:NAME``.
        directory: run directory; by default ``runs/adapt-NAME``, after the weights.
        overrides: ``KEY=VALUE`` settings.
        options: the rest of the command line.
        command: the command line after ``fovea``, for the config's header.

    Raises:
        FoveaError: weights or images that cannot be used, before anything is written.
    """
    from launch.cli.train import run as train
    from pipeline.weights.adapt.prepare import loaded, prepare

    folder = directory if directory is not None else Path("runs") / f"adapt-{_name_of(weights)}"
    prepared = prepare(
        [patterns],
        weights,
        folder,
        overrides,
        train=options.train,
        columns=options.columns,
        command=command,
        progress=_indexing,
        replay=options.replay,
    )
    for note in prepared.notes:
        print(shown(f"{weights}: {note}"), flush=True)
    new = _write(prepared)
    try:
        ready = loaded(prepared)
    except FoveaError:
        if new:
            prepared.file.unlink()
        raise
    print(shown(f"{prepared.file}: the settings and the reason of each; `fovea train {prepared.file}` runs it too"), flush=True)
    if prepared.plan.freeze:
        print(f"the heads are new: the tower is frozen for the first {prepared.plan.freeze} samples", flush=True)
    if options.only_config:
        return 0
    code = train(ready)
    if code == 0 and options.interpolate is not None and _is_finished(folder):
        _interpolate(folder, ready.config, options.interpolate)
    return code


def _is_finished(folder: Path) -> bool:
    """Whether the run has reached its end; a signal stops it earlier with the same exit code."""
    outcome = folder / "outcome.json"
    document = read_json(outcome) if outcome.is_file() else {}
    return isinstance(document, dict) and document.get("stop") == "FINISHED"


def _interpolate(folder: Path, config: Config, share: float) -> None:
    """Evaluate several points between start and result, if the run evaluates anything, and export the one that was asked for."""
    from launch.cli import eval as evaluation
    from launch.cli import export

    if config.evaluation.enabled:
        points = tuple(sorted({0.0, 0.25, 0.5, 0.75, 1.0, share}))
        text = ",".join(f"{point:g}" for point in points)
        chosen = evaluation.EvalOptions(tuple(config.evaluation.enabled), between=points)
        evaluation.run(str(folder), (), chosen, ["eval", str(folder), "--between", text])
    else:
        print(
            "the points between start and result are not evaluated: no evaluation is enabled, such as evaluation.knn", flush=True
        )
    defaults: dict[str, Any] = {"out": None, "network": "auto", "size": None, "license_": "unknown", "best": False, "force": True}
    export.run(folder, to="safetensors", interpolate=share, **defaults)


def _write(prepared: Prepared) -> bool:
    """Write the config, unless it is there; returns whether it was written.

    Raises:
        ConfigError: another one is there.
    """
    file = prepared.file
    if file.exists():
        before = read_bytes(file, limit=_LARGEST, error=ConfigError).decode("utf-8", "replace")
        if _settings(before) == _settings(prepared.text):
            return False
        if any((file.parent / name).exists() for name in ("config.yaml", "checkpoints")):
            raise ConfigError(
                "the run has begun with other settings",
                where=str(file),
                hint=f"Choose another folder with --to, or resume it: fovea train {file}",
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(prepared.text, encoding="utf-8")
    temporary.replace(file)
    return True


def _settings(text: str) -> list[str]:
    """The lines that set something: not the header."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _name_of(weights: str) -> str:
    """A folder's name after the weights: only letters, digits, dots, dashes and underscores."""
    last = weights.rstrip("/").replace(":", "/").rpartition("/")[2]
    stem = last.rsplit(".", 1)[0] if last.endswith((".pth", ".pt", ".bin", ".safetensors")) else last
    return "".join(c if (c.isascii() and c.isalnum()) or c in "._-" else "-" for c in stem).strip(".-_") or "weights"


def _indexing(done: int, total: int, shard: Any) -> None:
    bad = {status: count for status, count in getattr(shard, "counts", {}).items() if status != "ok" and count}
    if bad:
        print(f"indexed {done}/{total} shards  {bad}", file=sys.stderr, flush=True)
