"""Prints how a replay compares with what the run recorded. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch.replay import compare, plan
from launch.replay.compare import Result, Steps
from launch.replay.plan import Start
from launch.replay.recorded import RankRecord
from pipeline.config.load import difference
from pipeline.config.schema import Config
from pipeline.data.inputs import Inputs
from pipeline.masking import shown
from pipeline.training.signature_file import Header, sketched
from pipeline.untrusted import printable

_TENSORS = 8  # tensors that are named
_STOPPED = 130  # exit code of a replay that was interrupted


@dataclass(frozen=True)
class Replay:
    """A replay that has ended.

    Attributes:
        start: where it started.
        first, last: the steps that the user named.
        steps: all steps that were executed, except those that the run left out.
        recorded, replayed: what the run and the replay recorded, by rank.
        of_step: the header of the attempt that recorded each step.
        header: the replay's.
        tensors: rank, and how its tensors compare with those of a checkpoint.
    """

    start: Start
    first: int
    last: int
    steps: list[int]
    recorded: list[RankRecord]
    replayed: list[RankRecord]
    of_step: dict[int, Header]
    header: Header
    tensors: list[tuple[int, dict[str, Any]]]

    @property
    def pair(self) -> tuple[Steps, Steps]:
        """Signatures of the run and of the replay, by rank."""
        return [one.signatures for one in self.recorded], [one.signatures for one in self.replayed]


def print_start(directory: Path, start: Start, first: int, last: int, ranks: int, *, again: bool) -> None:
    """Print what is going to be replayed; ``again`` if the run left the first step out later."""
    for note in start.notes:
        print(shown(f"passed over: {note}"))
    begin = f"the checkpoint of step {start.step}" if start.saved is not None else "the start"
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    print(
        shown(f"replaying {steps} of {printable(str(directory))} from {begin} on {ranks} {'rank' if ranks == 1 else 'ranks'}"),
        flush=True,
    )
    if again:
        print(f"step {first} was left out after a rollback; it is replayed as the run did it before", flush=True)


def report(
    replay: Replay, config: Config, settings: Config, inputs: Inputs, *, changes: Sequence[str], without: Sequence[str]
) -> int:
    """Print how replay and record compare; returns the exit code.

    Args:
        replay: the replay.
        config: the run's settings.
        settings: the replay's.
        inputs: the data.
        changes: settings that the user changed, ``KEY=VALUE``.
        without: keys of samples that were left out.
    """
    changed = bool(changes or without)
    of_step, now = replay.of_step, replay.header
    result = compare.compare(*replay.pair, (of_step, now), replay.steps, partial(_sample, inputs, of_step))
    for line in _circumstances(replay):
        print(shown(line))
    if changed:
        _print_losses(replay, config, settings, changes, without)
    weights = _weights(replay, result)
    events = [(step, 0, text) for step, text in weights]
    events += [(one.step, 1, _described(one)) for one in result.differences[:1]]
    stopped = [step for step in result.missing if step in of_step and any(step not in one.signatures for one in replay.replayed)]
    if stopped:
        print(f"the replay was stopped before step {stopped[0]}")
    absent = [step for step in result.missing if replay.first <= step <= replay.last and step not in stopped]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        print(f"not compared: step {absent[0]}{more}, of which the run has not the signatures of all ranks")
    if not any(step >= replay.first for step in result.compared) and not events:
        if not stopped and not absent:
            print("nothing was compared: the run has no signatures of these steps")
        return _STOPPED if stopped else 1
    if not events:
        print(shown(_equal(replay, result)))
        return _STOPPED if stopped else int(bool(absent))
    print(shown(f"first difference: {min(events)[2]}"))
    for _, _, text in sorted(events)[1:6]:
        print(shown(f"  then: {text}"))
    if result.differences:
        print(f"{len(result.differences)} of {len(result.compared)} steps differ")
    return 0 if changed else 1


def _described(one: compare.Difference) -> str:
    rank = f", rank {one.rank}" if one.rank is not None else ""
    return f"step {one.step}{rank}, {one.stage}: {one.text}"


def _equal(replay: Replay, result: Result) -> str:
    count = f"{len(result.compared)} step{'s' if len(result.compared) != 1 else ''}"
    what = "samples, inputs, schedules, loss terms and gradient norms"
    if result.exact:
        text = f"equal: {count}, bit for bit ({what})"
    else:
        what = what if result.pixels else what.replace(" inputs,", "")
        if not result.values:
            compared = f"samples{', inputs' * result.pixels}, schedules"
            return f"equal: {count} ({compared}); loss terms and norms are those of other micro-batches"
        bounds = f"loss terms and norms within {compare.FIRST_BOUND:g} at the first step and {compare.LATER_BOUND:g} later"
        text = f"equal within bounds: {count} ({what}; {bounds}, the largest difference is {result.deviation:.2g})"
        return f"{text}; not bit for bit, since ranks, device, ZeRO stage, micro-batches or threads are not those of the run"
    for step in sorted({line["step"] for _, line in replay.tensors if "error" not in line}):
        count_of = sum(line["tensors"] for _, line in replay.tensors if line["step"] == step)
        text += f"; {count_of} tensors of the checkpoint of step {step}"
    return text


def _circumstances(replay: Replay) -> Iterable[str]:
    """What may explain a difference: other versions, ranks or device; and whether the run itself repeated steps equally."""
    then = replay.of_step.get(replay.first) or next(iter(replay.of_step.values()), None)
    if then is None:
        return
    now = replay.header
    names = {"code": "fovea's source", "fovea": "fovea", "torch": "torch", "device": "device", "world": "number of ranks"}
    names |= {"threads": "threads", "zero_stage": "train.zero_stage", "micro_batch": "micro-batch"}
    for name, title in names.items():
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            yield f"note: {title} was {printable(str(before))} and is {printable(str(after))}"
        others = [step for step, one in replay.of_step.items() if getattr(one, name) != before]
        if others and name not in ("code", "fovea", "torch"):
            other = printable(str(getattr(replay.of_step[others[0]], name)))
            yield f"note: {title} of {len(others)} of these steps was another, such as {other} of step {others[0]}"
    if missing := [step for step in replay.steps if step not in replay.of_step]:
        yield f"note: {len(missing)} steps have no signature, the first is {missing[0]}"
    redone = set().union(*(one.redone for one in replay.recorded))
    if unequal := sorted(set().union(*(one.unequal for one in replay.recorded))):
        yield f"note: the run did {len(redone)} of these steps twice, and step {unequal[0]} otherwise the second time"
    elif redone:
        yield f"note: the run did {len(redone)} of these steps twice, equal bit for bit"


def _weights(replay: Replay, result: Result) -> list[tuple[int, str]]:
    """Differences of weights, with the step that they precede."""
    events = []
    seen: set[int] = set()
    for rank, line in replay.tensors:
        step = line["step"]
        if "error" in line:
            events.append((step, f"the checkpoint of step {step} cannot be compared: {line['error']}"))
        elif line["differing"] and result.exact:
            seen.add(step)
            names = [
                f"{one['name']} ({one['differing']} of {one['elements']} elements, by up to {one['largest']:.3g})"
                for one in line["differing"]
            ]
            more = f" and {len(names) - _TENSORS} more" if len(names) > _TENSORS else ""
            events.append((step, f"weights after {step} steps, rank {rank}: {', '.join(names[:_TENSORS])}{more}"))
    now, start = replay.header, replay.start.step
    for rank, (theirs, ours) in enumerate(zip(replay.recorded, replay.replayed, strict=False)):
        for step in sorted(theirs.weights.keys() & ours.weights.keys() - seen):
            then, recorded = theirs.weights[step]
            if (then.world, then.zero_stage) != (now.world, now.zero_stage) or not (result.exact or step == start):
                continue  # other ranks have other parts
            before, after = recorded.digests, ours.weights[step][1].digests
            if groups := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
                whose = "of the checkpoint that the replay starts from" if step == start else f"after {step} steps"
                events.append((step, f"weights {whose}, rank {rank}, are not those that the run saved: {', '.join(groups)}"))
    return events


def _sample(inputs: Inputs, of_step: dict[int, Header], step: int, rank: int, position: int) -> str:
    """Names the samples that a byte of the sketches covers."""
    header = of_step[step]
    ids = inputs.order.rank_batch(step, header.world, rank).ids.tolist()
    names = []
    for index in sketched(len(ids))[position] if position < len(sketched(len(ids))) else ():
        shard, row = ids[index] >> 32, ids[index] & 0xFFFFFFFF
        key = printable(inputs.train.rows(shard).keys[row])
        names.append(f"{key} (sample {index} of the rank, micro-batch {index // header.micro_batch})")
    return " or ".join(names) or f"sample {position}"


def losses_of(ranks: Steps, steps: Iterable[int]) -> dict[int, float]:
    """The loss of each step that has signatures."""
    of_step = {step: [rank[step] for rank in ranks if step in rank] for step in steps}
    return {step: compare.loss(signatures) for step, signatures in of_step.items() if signatures}


def _print_losses(replay: Replay, config: Config, settings: Config, changes: Sequence[str], without: Sequence[str]) -> None:
    """The recorded and the replayed loss of each step side by side, and where each rises most."""
    changed = {key: pair for key, pair in difference(config, settings, runtime=True).items() if _changed(key, changes)}
    for key, (was, now) in changed.items():
        print(shown(f"{key} was {was!r}, replayed with {now!r}"))
    for key in without:
        print(shown(f"without {printable(key)}"))
    then, now = (losses_of(ranks, replay.steps) for ranks in replay.pair)
    print("  step      recorded      replayed")
    for step in replay.steps:
        if step >= replay.first:
            print(f"{step:>6}  {_loss(then.get(step))}  {_loss(now.get(step))}")
    for name, losses in (("recorded", then), ("replayed", now)):
        rises = {b: plan.rise(losses[a], losses[b]) for a, b in pairwise(losses)}
        if rises:
            step = max(rises, key=lambda one: rises[one])
            print(f"{name}: largest rise from one step to the next {rises[step]:+.6g}, at step {step}")


def _loss(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.6g}':>12}"


def _changed(key: str, changes: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in (text.partition("=")[0].strip() for text in changes))
