"""Detects failing runs from the logged metrics.

Non-finite numbers are handled by the trainer (skip, rollback). The failure modes detected here are *collapse* of the targets
(uniform, or the same for all samples) or of the features (into few directions), *divergence* (progress is lost again) and
*plateau*. All but one need the method's description of its metrics (:mod:`pipeline.methods.health_metrics`).

Every sign is a mean over the last :data:`SMOOTH` steps and has to hold for :data:`PATIENCE` steps: a failure is reported within
200 steps of its onset, provided that metrics are logged at least every :data:`SMOOTH` steps, and a single bad batch is not. Each
failure mode is reported once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.methods.base import Step
from pipeline.methods.health_metrics import DIVERGENCE, PLATEAU, PROTOTYPE_COLLAPSE, RANK_COLLAPSE, UNIFORM_TARGETS, HealthMetrics

SMOOTH, PATIENCE, WINDOW = 40, 100, 150  # steps
NEAR_GUESS, UNDECIDED = 0.01, 0.99  # relative to the loss of a guess, and to the maximum entropy
FAR_WORSE, NEARLY = 0.1, 0.95  # thresholds that must hold together, with the same units
_DEFAULT = "the steps are too large: lower schedule.lr.peak, or lengthen schedule.lr.warmup"
_STUCK = "nothing is trained, or everything is frozen: see gradient_norm and schedule.lr"


@dataclass(frozen=True)
class Alert:
    """A detected failure mode; reported once per run.

    Attributes:
        failure_mode: one of the constants of :mod:`pipeline.methods.health_metrics`.
        since: step at which the signs first appeared.
        text: one sentence: what is wrong, the likely cause, the setting to change.
    """

    failure_mode: str
    since: int
    text: str


class Alerts:
    """Detects failure modes from the metrics of successive logged steps.

    Args:
        health_metrics: names and meaning of the method's metrics; without them only a constant loss, or one that has risen far
            above its initial value, is detected.
    """

    def __init__(self, health_metrics: HealthMetrics | None = None) -> None:
        self._vitals = health_metrics or HealthMetrics()
        self._reported: set[str] = set()
        self._first: dict[str, float] | None = None
        self._forget()

    def look(self, step: Step, done: int, values: Mapping[str, float]) -> list[Alert]:
        """Record the metrics of a step; returns the alerts that are due.

        Args:
            step: the schedules' values.
            done: steps done; if it decreases, as after a rollback, the history is discarded.
            values: ``loss`` and the method's metrics, means since the last call.
        """
        if self._seen and done <= self._seen[-1][0]:
            self._forget()
        if not math.isfinite(values.get("loss", math.nan)):
            return []
        self._seen.append((done, {"lr": step.lr, **values}))
        while self._seen[0][0] <= done - WINDOW:
            self._seen.popleft()
        smooth = self._mean(done - SMOOTH)
        self._first = self._first or (smooth if done > SMOOTH else None)
        alerts = []
        ill = dict(self._signs(done, smooth))
        if UNIFORM_TARGETS in ill:
            ill.pop(PLATEAU, None)  # implied by uniform targets
        for failure_mode in (UNIFORM_TARGETS, PROTOTYPE_COLLAPSE, RANK_COLLAPSE, DIVERGENCE, PLATEAU):
            if failure_mode not in ill:
                self._since.pop(failure_mode, None)
                continue
            since = self._since.setdefault(failure_mode, done)
            # A plateau has already been observed over a whole window.
            if failure_mode not in self._reported and (done - since >= PATIENCE or failure_mode == PLATEAU):
                self._reported.add(failure_mode)
                suggest_fix = self._vitals.suggest_fix(failure_mode, step) if self._vitals.suggest_fix else _DEFAULT
                cause = _STUCK if failure_mode == PLATEAU and self._frozen() else suggest_fix
                alerts.append(Alert(failure_mode, since, f"{ill[failure_mode]}; likely {cause}"))
        return alerts

    def _forget(self) -> None:
        self._seen: deque[tuple[int, dict[str, float]]] = deque()
        self._since: dict[str, int] = {}
        self._first = None
        self._best: dict[str, float] = {}

    def _mean(self, after: int, until: float = math.inf) -> dict[str, float]:
        """Means of the values logged in steps ``(after, until]``."""
        chosen = [values for done, values in self._seen if after < done <= until]
        return {name: sum(values.get(name, math.nan) for values in chosen) / len(chosen) for name in chosen[-1]} if chosen else {}

    def _signs(self, done: int, now: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Failure modes whose signs are present, with a description."""
        v = self._vitals
        entropy, use, below, rank = (now.get(name or "", math.nan) for name in (v.entropy, v.use, v.below_guess, v.rank))
        # Right after initialization the network does not distinguish samples, which is normal while the learning rate warms up.
        decided = self._most("decided", 1.0 - entropy) > 3 * (1.0 - UNDECIDED)
        fresh = self._rising(done, SMOOTH) and not decided
        guess = v.guess or math.nan
        aimless = entropy >= UNDECIDED and below <= NEAR_GUESS * guess
        # With too high a learning rate the student is far worse than a guess, and the targets are not uniform at every step.
        thrown = entropy >= NEARLY and below <= -FAR_WORSE * guess
        if v.guess is not None and (aimless or thrown) and not fresh:
            yield (
                UNIFORM_TARGETS,
                f"the targets have become uniform (their entropy is {entropy:.1%} of the most possible) and the loss is no "
                f"better than a guess ({v.guess - below:.2f}, ln K is {v.guess:.2f})",
            )
        if v.guess is not None and use * v.guess <= math.log(2):
            yield (
                PROTOTYPE_COLLAPSE,
                f"nearly all samples have the same target: {math.exp(max(use * v.guess, 0.0)):.1f} prototypes are in use",
            )
        if rank < max(0.0 if fresh else 1.2, self._most("rank", rank) / 4):
            yield RANK_COLLAPSE, f"features differ in {rank:.1f} directions only, of {self._best['rank']:.1f} at best"
        yield from self._lost(now, below)
        yield from self._unmoved(done, below)

    def _lost(self, now: Mapping[str, float], below: float) -> Iterator[tuple[str, str]]:
        if self._first is None:
            return
        loss, begun, guess = now["loss"], self._first["loss"], self._vitals.guess
        if loss > begun + 0.3 * (guess or abs(begun)):
            yield DIVERGENCE, f"the loss has risen to {loss:.3g}, far above the {begun:.3g} it began with"
        elif guess is not None and self._most("below", below) > 0.05 * guess and below < 0.25 * self._best["below"]:
            yield DIVERGENCE, f"the loss was {self._best['below']:.2f} nats better than a guess, and is {below:.2f} now"

    def _unmoved(self, done: int, below: float) -> Iterator[tuple[str, str]]:
        span = done - self._seen[0][0]
        if span < 0.8 * WINDOW or len(self._seen) < 3:
            return
        early, late = self._mean(-1, done - WINDOW / 2), self._mean(int(done - WINDOW / 2))
        if not early or not late:
            return
        v, guess = self._vitals, self._vitals.guess
        if self._frozen():
            yield PLATEAU, f"the loss has been exactly {late['loss']:.6g} for {span} steps"
        elif guess and v.below_guess and abs(below) < NEAR_GUESS * guess and not self._rising(done, WINDOW):
            firmer = late.get(v.agreement or "", 0.0) - early.get(v.agreement or "", 0.0)
            if late[v.below_guess] - early[v.below_guess] < 0.001 * guess and firmer < 0.01:
                yield PLATEAU, f"for {span} steps the loss has been that of a guess ({guess - below:.2f}, ln K is {guess:.2f})"

    def _rising(self, done: int, steps: int) -> bool:
        """Whether the learning rate has grown over the last ``steps`` steps, as it does during a warm-up."""
        rates = [values["lr"] for step, values in self._seen if step >= done - steps]
        if len(rates) < 2:
            rates = [values["lr"] for _, values in self._seen][-2:]
        return len(rates) < 2 or rates[-1] > rates[0] * (1 + 1e-6)

    def _frozen(self) -> bool:
        losses = [values["loss"] for _, values in self._seen]
        return max(losses) - min(losses) <= 1e-7 * abs(losses[-1]) and self._seen[-1][1]["lr"] > 0

    def _most(self, sign: str, value: float) -> float:
        """Update and return the maximum of a sign."""
        if not math.isnan(value):
            self._best[sign] = max(value, self._best.get(sign, value))
        return self._best.get(sign, math.nan)
