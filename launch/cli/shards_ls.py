"""``fovea shards ls``: lists the samples of a step or the steps of a sample, from the order only; nothing is decoded."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.config.load import Loaded
from pipeline.config.schema import Config
from pipeline.data.index.fields import STATUSES
from pipeline.data.inputs import Inputs, prepare
from pipeline.errors import ConfigError, DataError
from pipeline.masking import shown
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import printable, read_bytes

_LEDGER = 1 << 30  # maximum bytes of a rank's record
_STEP = ("place", "rank", "stream", "set", "epoch", "shard", "row", "key", "replaced")
_KEY = ("step", "rank", "stream", "place", "set", "epoch", "shard", "row", "key", "replaced")


def run(
    loaded: Loaded,
    *,
    step: int | None = None,
    key: str | None = None,
    epochs: float = 1,
    until: int | None = None,
    ranks: int | None = None,
    as_json: bool = False,
) -> None:
    """Print the samples of a step, or the steps of a key.

    Args:
        loaded: the configuration.
        step: the step to show, from 0.
        key: the sample to look for; ``shard.tar/key`` searches that shard only.
        epochs: range to search for the key, in epochs of the order.
        until: end of the range of steps (exclusive), instead of ``epochs``.
        ranks: world size; ``None`` means as configured, or one.
        as_json: print a JSON document instead of a table.

    Raises:
        ConfigError: neither or both of step and key, or an invalid number.
        DataError: shards that cannot be used, or no such key.
    """
    if (step is None) == (key is None):
        raise ConfigError(
            "needs either --step or --key", where="ls", hint="Give one of them, such as --step 1234 or --key 000123"
        )
    # The shards of the k-NN evaluation are not needed here and may be missing.
    config = loaded.config.replace(evaluation=loaded.config.evaluation.only())
    world = ranks or config.launch.num_processes or 1
    inputs = prepare(config, world)
    last = math.ceil(epochs * inputs.order.samples_per_epoch / inputs.order.global_batch) if until is None else until
    if last < 0 or (step or 0) < 0:
        raise ConfigError(f"step {min(last, step or 0)} is negative", where="ls", hint="Give a step of 0 or more")
    document = at_step(config, inputs, step, world) if step is not None else of_key(config, inputs, str(key), world, last)
    if as_json:
        print(json.dumps(document, indent=1))
        return
    print(shown(document["about"]))
    rows = document["samples"] if step is not None else document["seen"]
    for line in table(rows, _STEP if step is not None else _KEY):
        print(shown(line))


def at_step(config: Config, inputs: Inputs, step: int, world: int) -> dict[str, Any]:
    """The samples of a step in the order of the global batch, as a JSON document.

    Args:
        config: the settings.
        inputs: the data sets and their order.
        step: from 0.
        world: world size.
    """
    batch, replaced = inputs.order.batch(step), _replaced(config)
    samples = [
        _row(inputs, step, position, number, epoch, world, replaced)
        for position, (number, epoch) in enumerate(zip(batch.ids.tolist(), batch.epochs.tolist(), strict=True))
    ]
    shards = len({sample["shard_number"] for sample in samples})
    about = (
        f"step {step}: {len(samples)} samples of {shards} shards, epoch {inputs.order.epoch_of(step)} of the order, {world} ranks"
    )
    return {"about": about, "step": step, "ranks": world, "fingerprint": inputs.train.fingerprint, "samples": samples}


def of_key(config: Config, inputs: Inputs, key: str, world: int, last: int) -> dict[str, Any]:
    """The steps before ``last`` that hold a sample, as a JSON document.

    Args:
        config: the settings.
        inputs: the data sets and their order.
        key: the sample's key; several samples may have it.
        world: world size.
        last: end of the range of steps (exclusive).

    Raises:
        DataError: no shard has such a key.
    """
    places = list(_find(inputs, key))
    if not places:
        raise DataError(
            f"no shard has a sample with the key {key!r}",
            where=f"{len(inputs.train.shards)} shards",
            hint="Give a member's name up to the first dot after its last slash, or shard.tar/key",
        )
    replaced, seen, left_out = _replaced(config), [], []
    for shard, row, status in places:
        if row < 0:
            left_out.append({"shard": inputs.train.shards[shard].name, "status": status})
            continue
        number = shard << 32 | row
        for step in sorted(set(inputs.order.steps_of(number, 0, last))):
            batch = inputs.order.batch(step)
            for position in np.flatnonzero(batch.ids == number).tolist():
                seen.append({"step": step, **_row(inputs, step, position, number, int(batch.epochs[position]), world, replaced)})
    seen.sort(key=lambda row: (row["step"], row["place"]))
    samples = f"{len(places)} {'sample' if len(places) == 1 else 'samples'}"
    lines = [f"{printable(key)}: {samples}, seen {len(seen)} times in steps 0 to {last - 1}"]
    lines += [f"left out of {entry['shard']} by the index ({entry['status']})" for entry in left_out]
    return {
        "about": "; ".join(lines),
        "key": key,
        "steps": last,
        "ranks": world,
        "fingerprint": inputs.train.fingerprint,
        "left_out": left_out,
        "seen": seen,
    }


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """Rows as lines of aligned text under their column names; empty columns are omitted."""
    shown = [name for name in columns if any(row[name] not in (None, "") for row in rows)]
    texts = [shown, *([printable(str(row[name] if row[name] is not None else "")) for name in shown] for row in rows)]
    widths = [max(len(text[column]) for text in texts) for column in range(len(shown))]
    numbers = [all(isinstance(row[name], int) for row in rows) for name in shown]
    return [
        "  ".join(
            text.rjust(width) if number else text.ljust(width) for text, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in texts
        if line
    ]


def _row(
    inputs: Inputs, step: int, position: int, number: int, epoch: int, world: int, replaced: dict[tuple[int, int], str]
) -> dict[str, Any]:
    order, (shard, row) = inputs.order, (number >> 32, number & 0xFFFFFFFF)
    which = bisect.bisect_right([source.first for source in inputs.sources], shard) - 1
    return {
        "place": position,
        "rank": position // (order.global_batch // world),
        "stream": position // (order.global_batch // order.streams),
        "set": inputs.sources[which].name if inputs.sources else None,
        "epoch": epoch,
        "shard": inputs.train.shards[shard].name,
        "shard_number": shard,
        "row": row,
        "key": inputs.train.rows(shard).keys[row],
        "id": number,
        "replaced": replaced.get((step, number)),
    }


def _find(inputs: Inputs, key: str) -> Iterator[tuple[int, int, str]]:
    """Shard, row (-1 if it was rejected) and status of all samples with a key."""
    name, slash, rest = key.partition("/")
    named = [number for number, shard in enumerate(inputs.train.shards) if slash and shard.name == name]
    member_key = rest if named else key
    for number in named or range(len(inputs.train.shards)):
        index = inputs.train.index(number)
        for at in [at for at, known in enumerate(index.keys) if known == member_key]:
            status = int(index.columns["status"][at])
            row = -1 if status else int((index.columns["status"][:at] == 0).sum())
            yield number, row, STATUSES[status]


def _replaced(config: Config) -> dict[tuple[int, int], str]:
    """Substituted samples from the run's records of bad samples: the reason, by step and sample."""
    replaced = {}
    for path in sorted((RunDirectory(config.run.folder).bad_samples(0).parent).glob("rank-*.jsonl")):
        try:
            text = read_bytes(path, limit=_LEDGER).decode("utf-8", "replace")
        except OSError as error:
            raise DataError(
                f"cannot be read ({error.strerror})", where=printable(str(path)), hint="Check the path and its permissions"
            ) from None
        for line in text.splitlines():
            try:
                event = json.loads(line)
                replaced[int(event["step"]), int(event["id"])] = str(event["reason"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # truncated by a crash
                continue
    return replaced
