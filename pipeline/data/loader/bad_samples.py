"""Records bad samples: one JSON line each, counters by reason, and a maximum fraction.

A run that loses too large a fraction of its samples stops with an error instead of silently training on less data.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError

MOST_KNOWN = 100_000  # bad samples that are kept, 3 MB of a checkpoint's manifest


@dataclass(frozen=True)
class Event:
    """A sample that was substituted.

    Attributes:
        step: global step of the sample.
        id: its number, ``shard << 32 | row``.
        key: its name.
        shard: the shard's file name.
        reason: what was wrong, one word.
        substitute: number of the sample used instead, -1 for a blank image.
    """

    step: int
    id: int
    key: str
    shard: str
    reason: str
    substitute: int


class BadSamples:
    """Counts samples, records the bad ones, and stops a run that loses too many.

    Args:
        path: JSON-lines file, appended to; ``None`` keeps the events in memory only.
        budget: maximum fraction of bad samples in the window.
        window: samples over which the fraction is measured.
        excluded: numbers of samples that are substituted although they can be used.
        known: maximum number of bad samples that are kept; others are read again in each epoch, with the same outcome.

    Attributes:
        quarantine: bad samples of this rank and of the checkpoint it started from: their reasons.
        of_all_ranks: the same of all ranks, as of the last checkpoint.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        budget: float = 0.01,
        window: int = 10_000,
        excluded: Iterable[int] = (),
        known: int = MOST_KNOWN,
    ) -> None:
        self._path, self._budget, self._window, self._known = path, budget, window, known
        self._excluded = dict.fromkeys(excluded, "excluded")
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.quarantine: dict[int, str] = dict(self._excluded)
        self.of_all_ranks: dict[int, str] = {}
        self._unsent: dict[int, str] = {}
        self._steps: deque[tuple[int, int]] = deque()  # samples and bad samples of each step in the window, and their sums
        self._recent = self._lost = 0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def saw(self, samples: int, bad: Sequence[Event] = (), counts: Mapping[str, int] | None = None) -> None:
        """Counts one step: its samples, including substituted ones, and its bad samples.

        Args:
            samples: number of samples.
            bad: those that were substituted.
            counts: further counters, such as samples of a data set and empty captions.

        Raises:
            TrainingError: more than ``budget`` of the last ``window`` samples were bad.
        """
        self.seen += samples
        self.counts.update(counts or {})
        self._slide(samples, len(bad))
        if not bad:
            return
        for event in bad:
            self.reasons[event.reason] += 1
            if len(self.quarantine) < self._known or event.id in self.quarantine:
                self.quarantine[event.id] = self._unsent[event.id] = event.reason
        if self._path is not None:
            with self._path.open("a") as file:
                file.writelines(json.dumps(asdict(event)) + "\n" for event in bad)
        if self._lost > self._budget * max(self._recent, self._window):
            worst = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(3))
            raise TrainingError(
                f"{self._lost} of the last {self._recent} samples could not be used ({worst})",
                where=f"shard {bad[-1].shard}, sample {bad[-1].key}",
                hint=f"See {self._path} for all of them; repair the shards, or allow more with data.max_bad_fraction",
            )

    def _slide(self, samples: int, bad: int) -> None:
        """Advances the window: the smallest number of last steps that hold ``window`` samples."""
        self._steps.append((samples, bad))
        self._recent, self._lost = self._recent + samples, self._lost + bad
        while self._recent - self._steps[0][0] >= self._window:
            old, lost = self._steps.popleft()
            self._recent, self._lost = self._recent - old, self._lost - lost

    def state(self) -> dict[str, Any]:
        """Returns counters and quarantine, for the checkpoint."""
        return {
            "seen": self.seen,
            "reasons": dict(self.reasons),
            "counts": dict(self.counts),
            "quarantine": {str(k): v for k, v in self.quarantine.items()},
        }

    def changes(self) -> dict[str, Any]:
        """Returns the counters, and what was added to the quarantine since the last call or :meth:`load`."""
        added, self._unsent = self._unsent, {}
        return {"seen": self.seen, "reasons": dict(self.reasons), "counts": dict(self.counts), "quarantine": added}

    def merge(self, added: Mapping[int, str]) -> None:
        """Adds bad samples of all ranks, as far as there is space for them."""
        new = ((number, reason) for number, reason in added.items() if number not in self.of_all_ranks)
        self.of_all_ranks |= dict(islice(new, max(self._known - len(self.of_all_ranks), 0)))

    def load(self, state: dict[str, Any]) -> None:
        """Restores counters and quarantine from a checkpoint."""
        self.seen = int(state["seen"])
        self.reasons = Counter(state["reasons"])
        self.counts = Counter(state.get("counts", {}))
        self.quarantine = {int(k): v for k, v in islice(state["quarantine"].items(), self._known)} | self._excluded
        self.of_all_ranks, self._unsent = dict(self.quarantine), {}
        self._steps.clear()
        self._recent = self._lost = 0
