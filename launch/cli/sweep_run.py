"""Runs a sweep: checks every member, then trains them here or on a cluster, and compares them at the rungs of halving."""

from __future__ import annotations

import contextlib
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch import members
from launch.cli import sweep_mlflow
from launch.sweep import grid, halving
from launch.sweep.state import STOP, Halving, Record, Sweep, create, swept
from pipeline.config.load import Loaded, fingerprint, flatten, load
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, FoveaError, LaunchError, NonFiniteError, TrainingError
from pipeline.runtime import job_record
from pipeline.runtime.locks import lock
from pipeline.untrusted import printable

if TYPE_CHECKING:
    from launch.slurm.profile import ClusterProfile
    from launch.slurm.status import Status
    from pipeline.tracking.settings import TrackingSettings

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_POLL = 5.0  # seconds between two looks at the queue


@dataclass(frozen=True)
class Order:
    """What ``fovea sweep`` was asked for; see its options."""

    config: str
    settings: tuple[str, ...]
    name: str
    list: Path | None
    directory: Path | None
    cluster: str
    max_jobs: int | None
    halving: str
    eta: int
    drop_failed: bool
    index: bool
    wait: bool


def train(order: Order) -> int:
    """Train what is not trained yet; returns the exit code, 0 if nothing is left to do or everything left is in the queue.

    Raises:
        FoveaError: settings of a member that cannot be, another sweep in the directory, a cluster that refuses the jobs.
    """
    own = [text.removeprefix("cluster.") for text in order.settings if text.startswith("cluster.")]
    rest = [text for text in order.settings if not text.startswith("cluster.")]
    combinations = grid.members(rest, grid.read_list(order.list) if order.list is not None else ((),))
    _check_options(order, own, len(combinations))
    loaded = _loaded(order.config, combinations)
    profile = _profile(order.cluster, own, loaded)
    rule = _rule(order, [one.config for one in loaded], profile)
    name = order.name or (order.directory.name if order.directory else f"{loaded[0].config.run.name}_sweep")
    if not _NAME.fullmatch(name):
        raise ConfigError("must consist of letters, digits, _ and -", where=f"--name {printable(name)}", hint="Choose another")
    path = (order.directory or Path("runs") / name).absolute()
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a") as file:
        try:
            lock(file.fileno(), file.name, wait=False)
        except BlockingIOError:
            raise LaunchError("this sweep is running already", where=str(path), hint="Wait for it, or stop it") from None
        record = Record(
            id=uuid.uuid4().hex[:12],
            config=order.config,
            members=tuple(combinations),
            fingerprints=tuple(fingerprint(one.config) for one in loaded),
            halving=rule,
        )
        sweep = create(path, record)
        (path / STOP).unlink(missing_ok=True)
        tracking = loaded[0].config.tracking
        driver = _Cluster(sweep, profile, order) if profile is not None else _Local(sweep, tracking)
        code = _rounds(sweep, driver, drop_failed=order.drop_failed)
        if code is None:
            return 0
        print("\n".join(map(printable, ranking(sweep))))
        sweep_mlflow.close(sweep, finished=not code)
    return code


def _rounds(sweep: Sweep, driver: _Local | _Cluster, *, drop_failed: bool) -> int | None:
    """Rung after rung, then the rest; returns the exit code, ``None`` if the members go on without this process."""
    rule = sweep.record.halving
    count = halving.rungs(len(sweep.record.members), rule.eta) if rule is not None else 0
    for rung in range(len(sweep.comparisons()), count):
        assert rule is not None
        pauses = {number: halving.rung_step(rule.steps[number], rung, count, rule.eta) for number in sweep.left()}
        if not driver.train(sweep.left(), pauses):
            return _stopped(sweep)
        if not drop_failed:
            _all_arrived(sweep, pauses)
        compared = sweep.compare(rung)
        for number, score in compared.scores.items():
            where = f"{rule.metric} {score:.4f}" if score is not None else f"no {rule.metric}"
            goes_on = "continues" if int(number) in compared.continued else "is stopped"
            print(f"rung {rung}: member {int(number):03d}: {where} at step {compared.steps[number]}: {goes_on}", flush=True)
    if not driver.train(sweep.left(), {}):
        return _stopped(sweep)
    if driver.leaves:
        return None
    return 0 if all(members.finished(sweep.run(number)) for number in sweep.left()) else 1


def _all_arrived(sweep: Sweep, pauses: dict[int, int]) -> None:
    """Refuse to compare members of which one has not reached its step, other than by a loss that stays non-finite.

    Raises:
        TrainingError: names the first.
    """
    for number, step in pauses.items():
        run = sweep.run(number)
        failure = job_record.failure(run, run.next_attempt() - 1) or {}
        if not _done(sweep, number, step) and failure.get("cause") != NonFiniteError.cause:
            raise TrainingError(
                f"member {number:03d} has not reached step {step}, at which members are compared",
                where=str(sweep.path),
                hint="Repeat the same command to continue it, or add --drop-failed to go on without it",
            )


def _stopped(sweep: Sweep) -> int:
    print(f"{printable(sweep.path.name)} is stopped; the same command continues it")
    return 1


# ---- before anything starts ------------------------------------------------------------------------------------------------


def _check_options(order: Order, own: Sequence[str], number: int) -> None:
    if not order.cluster and (order.max_jobs is not None or order.wait or own):
        raise ConfigError("needs --cluster", where="--max-jobs, --wait, cluster.KEY", hint="Leave it out: members run one by one")
    if order.cluster and order.halving and not order.wait:
        raise ConfigError(
            "needs --wait on a cluster", where="--halving", hint="Add --wait; if killed, the same command continues"
        )
    if order.halving and number < order.eta:
        raise ConfigError(f"needs at least {order.eta} members", where="--halving", hint="Leave it out, or lower --eta")


def _loaded(config: str, combinations: Sequence[Sequence[str]]) -> list[Loaded]:
    """The settings of all members.

    Raises:
        ConfigError: those of a member are refused, or two members are the same; names the first and counts the others.
    """
    loaded, refused = [], []
    for number, texts in enumerate(combinations):
        try:
            loaded.append(load(config, texts))
        except ConfigError as error:
            refused.append((number, error))
    if refused:
        number, first = refused[0]
        others = f"; {len(refused)} of {len(combinations)} members are refused" if len(refused) > 1 else ""
        raise ConfigError(
            f"{first.what or first}{others}",
            where=f"member {number:03d} ({' '.join(combinations[number])})" + (f": {first.where}" if first.where else ""),
            hint=first.hint or "Correct the settings; nothing was started",
        )
    seen: dict[str, int] = {}
    for number, one in enumerate(loaded):
        key = repr(flatten(one.config))
        if key in seen:
            raise ConfigError(f"is the same as member {seen[key]:03d}", where=f"member {number:03d}", hint="Name each value once")
        seen[key] = number
    return loaded


def _profile(name: str, own: Sequence[str], loaded: Sequence[Loaded]) -> ClusterProfile | None:
    if not name:
        return None
    from launch.slurm import profile as profiles
    from pipeline.config.validate import check_ranks

    profile = profiles.load(name, own)
    for number, one in enumerate(loaded):
        if broken := check_ranks(one.config, profile.world):
            raise ConfigError(broken[0][1], where=f"member {number:03d}", hint=f"Match the profile's {profile.world} ranks")
    return profile


def _rule(order: Order, configs: Sequence[Config], profile: ClusterProfile | None) -> Halving | None:
    """The rule of early stopping, with each member's number of steps.

    Raises:
        ConfigError: a member does not compute the score, or it ranks nothing.
    """
    if not order.halving:
        return None
    for number, config in enumerate(configs):
        metric = config.evaluation.metrics.get(order.halving)
        if metric is None or metric.higher_is_better is None:
            known = [name for name, one in config.evaluation.metrics.items() if one.higher_is_better is not None]
            hint = f"Choose one of {', '.join(known)}" if known else "Set evaluation.knn.enabled=true"
            raise ConfigError(f"member {number:03d} has no score {order.halving!r}", where="--halving", hint=hint)
    higher = bool(configs[0].evaluation.metrics[order.halving].higher_is_better)
    steps = tuple(
        _steps(config, profile.world if profile is not None else config.launch.num_processes or 1) for config in configs
    )
    rungs = halving.rungs(len(configs), order.eta)
    if min(steps) < order.eta**rungs:
        raise ConfigError(
            f"{min(steps)} steps are too few for {rungs} comparisons", where="--halving", hint="Raise train.duration"
        )
    return Halving(metric=order.halving, higher=higher, eta=order.eta, steps=steps)


def _steps(config: Config, ranks: int) -> int:
    duration, batch = config.train.duration, config.train.global_batch_size
    if duration.unit != "epochs":
        return duration.steps(1, batch)
    from pipeline.data.inputs import prepare

    return duration.steps(prepare(config, ranks).order.samples_per_epoch, batch)


# ---- the members ---------------------------------------------------------------------------------------------------------


def _done(sweep: Sweep, number: int, pause: int | None) -> bool:
    """Whether a member has reached its end, or the step of a rung."""
    run = sweep.run(number)
    ended = members.outcome(run)
    step = ended.get("step")
    return ended.get("stop") == "FINISHED" or (pause is not None and isinstance(step, int) and step >= pause)


class _Local:
    """Members one after the other on this machine."""

    leaves = False

    def __init__(self, sweep: Sweep, tracking: TrackingSettings) -> None:
        self._sweep = sweep
        self._database = sweep_mlflow.shared_database(sweep, tracking)

    def train(self, left: Sequence[int], pauses: dict[int, int]) -> bool:
        """Train members to their end or pause; a failed one does not end the others; returns whether none was stopped."""
        sweep = self._sweep
        for number in left:
            if sweep.stopped:
                return False
            if _done(sweep, number, pauses.get(number)):
                continue
            print(f"member {number:03d}: {sweep.settings(number)}", flush=True)
            code, _ = members.train(sweep.record.config, [*sweep.record.members[number], *self._own(number, pauses)])
            if code:
                print(f"member {number:03d} ended with {code}; its messages are above", flush=True)
            elif not _done(sweep, number, pauses.get(number)):
                return False
        return True

    def _own(self, number: int, pauses: dict[int, int]) -> list[str]:
        own = self._sweep.own(number)
        if number in pauses:
            own.append(f"train.pause_at={pauses[number]} steps")
        return [*own, *([f"tracking.uri={self._database}"] if self._database else [])]


class _Cluster:
    """Members as Slurm jobs. Without ``--wait`` they go on without this process.

    Of ``--max-jobs`` chains, each job name is one: Slurm starts a job with ``--dependency=singleton`` when no other of its name
    runs. A member that comes back after a time limit queues behind the next of its chain.
    """

    def __init__(self, sweep: Sweep, profile: ClusterProfile, order: Order) -> None:
        self._sweep, self._profile, self._order = sweep, profile, order
        self.leaves = not order.wait

    def train(self, left: Sequence[int], pauses: dict[int, int]) -> bool:
        """Submit the members that are not done and not in the queue; with ``--wait``, wait for their end."""
        from launch.slurm.submit import AlreadySubmitted, submit

        sweep, submitted, present = self._sweep, 0, 0
        for number in left:
            if _done(sweep, number, pauses.get(number)):
                continue
            pause = [f"train.pause_at={pauses[number]} steps"] if number in pauses else []
            loaded = load(sweep.record.config, [*sweep.record.members[number], *sweep.own(number), *pause])
            try:
                done = submit(loaded, self._in_chain(number), index=self._order.index)
            except AlreadySubmitted:
                present += 1
                continue
            except FoveaError as error:
                raise LaunchError(
                    f"{error.what} (member {number:03d}; {submitted} were submitted before it)",
                    where=error.where,
                    hint=error.hint,
                ) from error
            submitted += 1
            print(f"member {number:03d}: job {done.job}: {sweep.settings(number)}", flush=True)
        print(
            f"{submitted} members submitted, {present} in the queue already, {len(left) - submitted - present} done", flush=True
        )
        if self._order.wait:
            self._wait(left)
        return not sweep.stopped

    def _in_chain(self, number: int) -> ClusterProfile:
        if self._order.max_jobs is None:
            return self._profile
        name = f"{self._sweep.path.name}-{self._sweep.record.id[:6]}-{number % self._order.max_jobs}"
        options = (*self._profile.options, f"--job-name={name}", "--dependency=singleton")
        return self._profile.model_copy(update={"options": options})

    def _wait(self, left: Sequence[int]) -> None:
        from launch.slurm.submit import living

        waiting = list(left)
        while waiting and not self._sweep.stopped:
            with contextlib.suppress(LaunchError):  # Slurm is away for a moment
                waiting = [number for number in waiting if living(self._sweep.run(number))]
            if waiting:
                time.sleep(_POLL)


# ---- what users see ------------------------------------------------------------------------------------------------------


def statuses(sweep: Sweep) -> list[Status | None]:
    """Status of each member; ``None`` for one that has not begun."""
    from launch.slurm.status import queue_of, status

    runs = [sweep.run(number) for number in sweep.numbers]
    listed = queue_of(runs)
    return [status(run, listed) if run.config.exists() else None for run in runs]


def overview(sweep: Sweep) -> str:
    """One line of counts, and one for each member."""
    rows, states = [], Counter[str]()
    for number, one in enumerate(statuses(sweep)):
        state, text = _state(sweep, number, one)
        states[state] += 1
        done = f"step {one.step}" + (f" of {one.steps}" if one.steps else "") if one is not None else ""
        rows.append(f"  {number:03d}  {state:<8}  {done:<20}  {sweep.settings(number)}" + (f"  ({text})" if text else ""))
    counted = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return "\n".join([f"{sweep.path.name}: {len(rows)} members: {counted}", *rows])


def ranking(sweep: Sweep, score: str = "") -> list[str]:
    """A table of the members: best score first, then those without."""
    rule = sweep.record.halving
    ones = statuses(sweep)
    names = [name for one in ones if one is not None for name in one.scores if not name.startswith("baseline/")]
    metric = score or (rule.metric if rule is not None else next(iter(names), ""))
    higher = _higher(sweep, metric)
    values: dict[int, float | None] = {}
    for number, one in enumerate(ones):
        cut = sweep.stopped_at(number)
        value = one.scores.get(metric) if one is not None else None
        values[number] = cut.scores[str(number)] if cut is not None and cut.metric == metric else value
    order = sorted(sweep.numbers, key=lambda n: (_rank(values[n], higher=higher), n))
    keys = swept(sweep.record.members)
    header = ["member", "state", "step", metric or "score", *keys]
    rows = [header]
    for number in order:
        one, value = ones[number], values[number]
        own = dict(text.partition("=")[::2] for text in sweep.record.members[number])
        done = str(one.step) if one is not None else "-"
        cells = [f"{number:03d}", _state(sweep, number, one)[0], done, "-" if value is None else f"{value:.4f}"]
        rows.append([*cells, *(own.get(key, "-") for key in keys)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _rank(value: float | None, *, higher: bool) -> float:
    return math.inf if value is None or math.isnan(value) else -value if higher else value


def _higher(sweep: Sweep, metric: str) -> bool:
    rule = sweep.record.halving
    if rule is not None and rule.metric == metric:
        return rule.higher
    for number in sweep.numbers:
        run = sweep.run(number)
        if run.config.exists():
            known = run.settings().evaluation.metrics.get(metric)
            return known is None or known.higher_is_better is not False
    return True


def _state(sweep: Sweep, number: int, one: Status | None) -> tuple[str, str]:
    """A member's state in one word, and what explains it."""
    if (cut := sweep.stopped_at(number)) is not None:
        score = cut.scores[str(number)]
        value = f"{cut.metric} {score:.4f}" if score is not None else f"no {cut.metric}"
        return "halved", f"rung {cut.rung}: {value} at step {cut.steps[str(number)]}"
    if one is None:
        return "not begun", ""
    return one.state, "" if one.state == "finished" else one.why
