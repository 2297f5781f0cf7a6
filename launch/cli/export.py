"""``fovea export``: exports the weights of a run for timm, Hugging Face, open_clip or ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.config.sizes import Size
from pipeline.errors import ConfigError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import Shipper, destination_of
from pipeline.untrusted import printable
from pipeline.weights.export import networks
from pipeline.weights.export.write import write
from pipeline.weights.from_checkpoint import chosen
from pipeline.weights.interpolate import interpolated


def run(
    path: Path,
    *,
    to: str,
    out: Path | None,
    network: str,
    size: Size | None,
    license_: str,
    best: bool,
    force: bool,
    register: str | None = None,
    student: str | None = None,
    interpolate: float | None = None,
) -> int:
    """Write the export and print its path; returns the exit code.

    Args:
        path: a run or a checkpoint.
        to: the export format.
        out: output directory; ``<run>/export/<layout>`` by default.
        network: auto, teacher or student.
        size: side, or height and width, of the images in pixels; the training size by default.
        license_: licence for the model card.
        best: export the best checkpoint of a run instead of the newest.
        force: overwrite existing files.
        register: name of a model in the registry of the run's MLflow server; the export becomes a new version of it.
        interpolate: share of the way from the run's initial weights to the checkpoint's; ``None`` for the checkpoint's.
        student: name of the student, if several were distilled together; by default the one described by ``model``.

    Raises:
        FoveaError: no checkpoint, a damaged one, or a format that cannot hold the networks.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}", license_):
        raise ConfigError(
            f"{printable(license_, limit=80)!r} is not an SPDX license identifier",
            where="--license",
            hint="Write one such as apache-2.0 or cc-by-4.0",
        )
    path = path.absolute()
    saved = chosen(path, best=best)
    run_folder = path if (path / "checkpoints").is_dir() else saved.path.parent.parent
    parts = [to, *([student] if student else []), *([f"{interpolate:g}"] if interpolate is not None else [])]
    folder = out if out is not None else RunDirectory(run_folder).own_folder("export") / "-".join(parts)
    shipper = _shipper(run_folder) if register is not None else None
    selected = networks.read(saved, network=network, size=size, student=student)  # type: ignore[arg-type]
    if interpolate is not None:
        selected = interpolated(selected, interpolate)
    write(selected, to, folder, license_=license_, overwrite=force)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: the {selected.network} of {saved.path.name} for {to}, {total / 1e6:.1f} MB; README.md says how to load it")
    if shipper is not None and register is not None:
        from pipeline.tracking.registry import register as add

        print(f"version {add(shipper, folder, register)} of {register} in MLflow")
    return 0


def _shipper(run_folder: Path) -> Shipper:
    """The MLflow shipper of a run."""
    run = RunDirectory(run_folder)
    if not run.config.is_file():
        raise ConfigError(
            "is not a run directory",
            where=str(run_folder),
            hint="Name the run directory: --register reads its settings and scores",
        )
    config = run.settings()
    target = destination_of(config.tracking, run.path)
    return Shipper(
        run.tracking,
        uri=target.uri,
        experiment=target.experiment,
        name=config.run.name,
        sweep=run.sweep if target.origin else None,
    )
