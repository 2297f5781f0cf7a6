"""``fovea checkpoint``: lists, verifies, inspects and converts checkpoints."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.cli.choices import Precision, Weights, local_only
from pipeline.checkpoint.catalog import Row, rows
from pipeline.checkpoint.files import Saved, read, verify
from pipeline.checkpoint.manifest import MANIFEST
from pipeline.checkpoint.retention import read_best
from pipeline.checkpoint.selection import newest
from pipeline.errors import CheckpointError, ConfigError
from pipeline.untrusted import hide_secrets, printable

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(no_args_is_help=True, help="List, verify, inspect and convert checkpoints.")

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
AnyArgument = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint (a directory step_…), or a run for its newest.")]


@app.command("list")
def list_(run: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List a run's checkpoints, the newest last. File contents are not read; verify does that.

    [b]Example[/b]

    fovea checkpoint list runs/cifar10_vit_tiny
    """
    folder = _folder(run)
    listed = _rows(folder)
    if as_json:
        print(json.dumps(listed, indent=2))
        return
    if not listed:
        print(f"no checkpoint in {folder}")
        return
    head = {name: name for name in ("checkpoint", "samples", "size", "ranks", "zero", "age", "marks", "state")}
    table = [head, *({**row, "size": _size(row["size"]), "age": _age(row["age"])} for row in listed)]
    width = {name: max(len(str(row[name])) for row in table) for name in head}
    for row in table:
        print(printable("  ".join(f"{row[name]!s:<{width[name]}}" for name in head).rstrip()))


@app.command("verify")
def verify_(path: Annotated[Path, typer.Argument(metavar="RUN|PATH", help="A run directory, or one checkpoint.")]) -> None:
    """Verify the size and checksum of every file against the manifest. Exit code 1 if anything is damaged.

    [b]Examples[/b]

    fovea checkpoint verify runs/cifar10_vit_tiny

    fovea checkpoint verify runs/cifar10_vit_tiny/checkpoints/step_000003750
    """
    single = (path / MANIFEST).exists() or path.name.startswith("step_")
    paths = [path] if single else sorted(_folder(path).glob("step_*"))
    if not paths:
        print(f"no checkpoint in {_folder(path)}")
    bad = 0
    for one in paths:
        try:
            verify(read(one))
            print(f"{printable(one.name)}: complete")
        except CheckpointError as error:
            bad += 1
            print(printable(f"{one.name}: {error.what} ({error.where})"))
    if bad:
        raise typer.Exit(1)


@app.command("inspect")
def inspect(
    path: AnyArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor with its shape.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entire manifest as JSON.")] = False,
) -> None:
    """Show the contents of a checkpoint: step, scores, data, versions, settings.

    [b]Examples[/b]

    fovea checkpoint inspect runs/cifar10_vit_tiny

    fovea checkpoint inspect runs/cifar10_vit_tiny/checkpoints/step_000003750 --tensors
    """
    saved = _one(path)
    manifest = saved.manifest
    if as_json:
        print(json.dumps(manifest, indent=2))
        return
    config = manifest.get("config") or {}
    data = manifest.get("data") or {}
    shapes = manifest.get("shapes", {})
    facts = {
        "checkpoint": saved.path,
        "step": f"{saved.step} ({manifest.get('applied', '?')} applied, {manifest.get('skipped', '?')} skipped)",
        "samples seen": manifest.get("samples_seen", "?"),
        "run": f"{manifest.get('run', '?')}, attempt {manifest.get('attempt', '?')}",
        "begun at": ", ".join(origin["path"] for origin in saved.origins) or "its first step",
        "written by": ", ".join(f"{name} {manifest.get(name, '?')}" for name in ("fovea", "torch", "python")),
        "ranks": f"{manifest.get('world', '?')}, ZeRO stage {_zero(manifest)}",
        "data": f"{data.get('samples', '?')} samples, fingerprint {data.get('fingerprint', '?')}",
        "settings": f"fingerprint {str(manifest.get('fingerprint', '?'))[:12]}",
        "scores": ", ".join(f"{name} {value:.4f}" for name, value in manifest.get("scores", {}).items()) or "none yet",
        "scored at": "never" if manifest.get("scored") == -1 else manifest.get("scored", "?"),
        "parameters": f"{sum(math.prod(shape) for shape in shapes.values())} in {len(shapes)} tensors that train",
        "files": f"{len(manifest['files'])}, {_size(sum(file['size'] for file in manifest['files']))}",
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {hide_secrets(printable(str(value)))}")
    if tensors:
        print()
        for name, kind, shape in _tensors(saved):
            print(printable(f"{kind:<5} {name}  {list(shape)}"))
        return
    print("\nsettings:")
    for key, value in sorted(_flat(config), key=lambda pair: pair[0]):
        print(hide_secrets(f"  {printable(key)} = {json.dumps(value)}"))


@app.command("convert")
def convert(
    path: AnyArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output file, such as teacher.safetensors.", callback=local_only)],
    weights: Annotated[
        Weights, typer.Option(help="Weights to write; those of both have names prefixed by teacher. and student.")
    ] = Weights.TEACHER,
    dtype: Annotated[Precision, typer.Option(help="Data type of the weights.")] = Precision.FP32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite OUT.")] = False,
) -> None:
    """Merge the shards of all ranks into one safetensors file of full tensors, with the method's parameter names.

    [b]Examples[/b]

    fovea checkpoint convert runs/cifar10_vit_tiny teacher.safetensors

    fovea checkpoint convert runs/cifar10_vit_tiny/checkpoints/step_000003750 both.safetensors --weights both --dtype bf16
    """
    if out.exists() and not overwrite:
        raise ConfigError("exists already", where=str(out), hint="Name another file, or add --overwrite")
    saved = _one(path)
    verify(saved)
    from pipeline.checkpoint.reader import read_student, read_teacher
    from pipeline.checkpoint.tensor_writer import write_tensors
    from pipeline.models.lora import merged_state
    from pipeline.weights.init_from import lora_scale

    tensors: dict[str, Tensor] = {}
    for kind, reader in (("teacher", read_teacher), ("student", read_student)):
        if weights in (kind, Weights.BOTH):
            start = f"{kind}." if weights == Weights.BOTH else ""
            merged = merged_state(dict(reader(saved)), lora_scale(saved))
            tensors |= {start + name: _typed(tensor, dtype) for name, tensor in merged.items()}
    if not tensors:
        raise CheckpointError("its method has no teacher", where=str(saved.path), hint="Convert with --weights student")
    temporary = out.with_name(f".{out.name}.part")
    facts = {"format": "pt", "fovea.step": str(saved.step), "fovea.weights": weights.value, "fovea.checkpoint": saved.id}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        written = write_tensors(temporary, tensors, metadata=facts)
        temporary.replace(out)
    except OSError as error:
        raise CheckpointError(
            f"cannot be written ({error.strerror})", where=str(out), hint="Free space, or name another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {len(tensors)} tensors, {_size(written['size'])}, of step {saved.step} to {out}")


def _typed(tensor: Tensor, dtype: Precision) -> Tensor:
    return tensor.bfloat16() if dtype == Precision.BF16 and tensor.is_floating_point() else tensor


def _folder(run: Path) -> Path:
    """The checkpoint directory of a run."""
    for folder in (run / "checkpoints", run):
        if folder.is_dir() and (folder.name == "checkpoints" or any(folder.glob("step_*"))):
            return folder
    raise CheckpointError("is not a run directory", where=str(run), hint="Name the directory that `fovea train` wrote")


def _one(path: Path) -> Saved:
    """The given checkpoint, or the newest complete one of the given run."""
    if (path / MANIFEST).exists() or path.name.startswith("step_"):
        return read(path)
    checkpoint, complaints = newest(_folder(path))
    for complaint in complaints:
        typer.echo(complaint, err=True)
    if checkpoint is None:
        raise CheckpointError(
            "the run has no checkpoint yet", where=str(path), hint="Train until the first one (checkpoint.every)"
        )
    return checkpoint


def _rows(folder: Path) -> list[dict[str, Any]]:
    saved = rows(folder)
    best, now = read_best(folder), time.time()
    result = []
    for one in saved:
        marks = ["newest"] if one is saved[-1] else []
        marks += [f"best {best['metric']} {best['score']:.4f}"] if best.get("checkpoint") == one.name else []
        result.append(
            {
                "checkpoint": one.name,
                "step": one.step,
                "samples": "?" if one.samples is None else one.samples,
                "size": one.size,
                "ranks": "?" if one.world is None else one.world,
                "zero": "?" if one.zero is None else one.zero,
                "age": now - os.stat(f"{folder}/{one.name}/{MANIFEST}").st_mtime,
                "marks": ", ".join(marks),
                "state": _state(f"{folder}/{one.name}", one),
            }
        )
    known = {row["checkpoint"] for row in result}
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith("step_")):
        if name not in known:
            blank = dict.fromkeys(("step", "samples", "size", "ranks", "zero", "age"), None)
            result.insert(0, {"checkpoint": name, **blank, "marks": "", "state": "damaged: its manifest cannot be read"})
    return result


def _zero(manifest: dict[str, Any]) -> Any:
    """The ZeRO stage in the settings of a checkpoint, which may be of another version."""
    train = (manifest.get("config") or {}).get("train")
    return train.get("zero_stage", "?") if isinstance(train, dict) else "?"


def _state(path: str, row: Row) -> str:
    for name, size in row.files:
        try:
            actual = os.lstat(f"{path}/{name}").st_size
        except OSError:
            return f"damaged: {name} is missing"
        if actual != size:
            return f"damaged: {name} has the wrong size"
    return "complete"


def _tensors(saved: Saved) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and full shape of every tensor.

    Raises:
        CheckpointError: a file cannot be read as tensors.
    """
    from pipeline.checkpoint.reader import unsharded_files
    from pipeline.models.tensor_files import opened

    shapes = saved.manifest.get("shapes", {})
    rows = []
    for name, shape in shapes.items():
        rows += [(f"{kind}/{name}", "F32", tuple(shape)) for kind in ("master", "exp_avg", "exp_avg_sq")]
    teacher: set[str] = set()
    for rank in range(len(saved.manifest.get("fragments", []))):
        with opened(saved.path / f"rank_{rank:05d}.safetensors") as file:
            teacher |= {key for key in file.keys() if key.startswith("teacher/")}  # noqa: SIM118
    rows += [(key, "F32", tuple(shapes.get(key.removeprefix("teacher/"), ()))) for key in sorted(teacher)]
    for path in unsharded_files(saved):
        with opened(path) as file:
            for key in sorted(file.keys()):
                piece = file.get_slice(key)
                rows.append((key, str(piece.get_dtype()), tuple(piece.get_shape())))
    return rows


def _flat(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(config, dict) or not config:
        return [(prefix, config)] if prefix else []
    return [pair for key, value in config.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else str(key))]


def _size(amount: int | None) -> str:
    if amount is None:
        return "?"
    value = float(amount)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


@app.command("now")
def now(run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name below runs/.")]) -> None:
    """Request a checkpoint from a running training after the current step; training continues.

    [b]Example[/b]

    fovea checkpoint now my_run
    """
    from launch.slurm.status import find
    from pipeline.runtime import job_record

    run_directory = find(run)
    before = job_record.saved_step(run_directory)
    job_record.request(run_directory, job_record.SAVE, "requested")
    print(f"requested; the newest checkpoint so far is of step {before}")
