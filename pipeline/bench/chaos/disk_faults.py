"""Faults of the disk of the run directory: full, read-only, damaged checkpoints."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from pipeline.bench.chaos.kinds import SAME, Case, Kind
from pipeline.bench.chaos.process_faults import kill_all
from pipeline.bench.chaos.runs import Run, until
from pipeline.bench.chaos.site import Site, may_mount


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _unmount(folder: Path) -> None:
    until(lambda: not subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode, "it is in use", 60)


def _no_mounts(site: Site) -> str:
    return "" if may_mount() else "file systems cannot be mounted"


def _prepare_full(case: Case) -> None:
    small = case.folder / "small"
    small.mkdir()
    _mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small))
    case.stack.callback(_unmount, small)
    case.directory = small / "run"
    case.repair, case.action = lambda: (small / "fill").unlink(missing_ok=True), f"space, {SAME}"


def _full(case: Case, run: Run) -> str:
    file, seconds = case.folder / "small" / "fill", 10 ** case.rng.uniform(-0.5, 1)
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(bytes(4096))
        except OSError:
            pass
    _pass(run, seconds)
    if not run.running():
        return "full until the run ended"
    file.unlink()
    return f"full for {seconds:.1f} s"


def _pass(run: Run, seconds: float) -> None:
    end = time.monotonic() + seconds
    while run.running() and time.monotonic() < end:
        time.sleep(0.02)


def _prepare_readonly(case: Case) -> None:
    case.directory = case.folder / "run"
    folder = case.directory / "checkpoints"
    folder.mkdir(parents=True)

    def writable() -> None:
        if subprocess.run(["mountpoint", "-q", str(folder)], check=False).returncode == 0:
            _unmount(folder)

    case.stack.callback(writable)
    case.repair, case.action = writable, f"writable disk, {SAME}"


def _readonly(case: Case, run: Run) -> str:
    folder, seconds = run.directory / "checkpoints", 10 ** case.rng.uniform(-0.5, 1)
    _mount("--bind", str(folder), str(folder))
    _mount("-o", "remount,ro,bind", str(folder))
    _pass(run, seconds)
    if run.running() and case.repair is not None:
        case.repair()
        return f"checkpoints read-only for {seconds:.1f} s"
    return "checkpoints read-only until the run ended"


def _damaged(case: Case, run: Run) -> str:
    kill_all(case, run)
    until(lambda: not run.running() and not run.alive(), "ranks were left behind", 120)
    newest = run.newest()
    if newest is None:  # nothing to damage
        return ""
    if len(list(newest.parent.glob("step_*"))) == 1:  # fovea then refuses to start from nothing
        case.repair = lambda: _move_away(newest, case.folder)
        case.action = f"the only checkpoint, damaged, moved away, {SAME}"
    file = case.rng.choice(sorted(path for path in newest.iterdir() if path.is_file()))
    size, how = file.stat().st_size, case.rng.choice(("bit", "short", "gone"))
    if how == "bit":
        offset = case.rng.randrange(size)
        with file.open("r+b") as out:
            out.seek(offset)
            byte = out.read(1)[0] ^ 1 << case.rng.randrange(8)
            out.seek(offset)
            out.write(bytes([byte]))
        return f"{newest.name}/{file.name}: a bit of byte {offset} flipped"
    if how == "short":
        length = case.rng.randrange(size)
        with file.open("r+b") as out:
            out.truncate(length)
        return f"{newest.name}/{file.name}: {length} of {size} bytes left"
    file.unlink()
    return f"{newest.name}/{file.name}: deleted"


def _move_away(checkpoint: Path, folder: Path) -> None:
    if checkpoint.exists():
        checkpoint.rename(folder / checkpoint.name)


KINDS = (
    Kind("full-disk", "the disk of the run is full for 0.3 to 10 s", _full, _prepare_full, missing=_no_mounts),
    Kind("read-only", "checkpoints cannot be written for 0.3 to 10 s", _readonly, _prepare_readonly, missing=_no_mounts),
    Kind("damaged", "killed, then its newest checkpoint is damaged", _damaged, first=11),
)
