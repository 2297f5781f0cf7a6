"""Two terms that discourage a column: the variance between means, and a probe whose gradient is reversed (DANN, FINO).

A small network begins with features that carry a site and a class, and one loss keeps it where it begins, as the losses of a
method do; the other discourages the site. Inputs are noisy, so that a direction of little variance cannot be read. A linear probe
then reads both from held-out samples.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.methods.shared.guidance import Guidance
from pipeline.methods.shared.guidance_settings import GuidanceSettings

WEIGHTS: dict[str, tuple[float, ...]] = {"means": (0.0, 1.0, 3.0, 10.0), "reversal": (0.3, 1.0, 3.0)}
RATES = (1e-3, 1e-2)
_SAMPLES, _BATCH, _WIDTH = 2048, 64, 16
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclass(frozen=True)
class GuidanceResult:
    """Result of one run.

    Attributes:
        by: the term; ``discourage_by``.
        weight: its weight, 0 for none.
        rate: learning rate of network and probe.
        seed: of inputs and weights.
        site, label: accuracy of a linear probe on held-out samples; a guess has 1/3 and 1/2.
        distance: from the features that the network began with, 1 - cosine.
    """

    by: str
    weight: float
    rate: float
    seed: int
    site: float
    label: float
    distance: float


def measure(*, seeds: Sequence[int], steps: int = 600) -> Iterator[GuidanceResult]:
    """Every term with every weight, learning rate and seed.

    Args:
        seeds: of inputs and weights.
        steps: of each run.
    """
    for rate, (by, weights), seed in itertools.product(RATES, WEIGHTS.items(), seeds):
        for weight in weights:
            yield one(by, weight, rate, seed=seed, steps=steps)


def one(by: str, weight: float, rate: float, *, seed: int, steps: int) -> GuidanceResult:
    """Trains once and probes; arguments as in the result."""
    generator = torch.Generator().manual_seed(seed)
    sites = torch.randint(0, 3, (_SAMPLES,), generator=generator)
    labels = torch.randint(0, 2, (_SAMPLES,), generator=generator)
    inputs = 0.5 * torch.randn(_SAMPLES, 32, generator=generator)
    inputs[:, :3] += 2 * F.one_hot(sites, 3)
    inputs[:, 3:5] += F.one_hot(labels, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start, network = (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, _WIDTH)) for _ in range(2))
    network.load_state_dict(start.requires_grad_(False).state_dict())
    column = {"name": "site", "direction": "discourage", "values": [0, 1, 2], "weight": weight}
    settings: dict[str, Any] = {"columns": [column] if weight else [], "discourage_by": by}
    guidance = Guidance(GuidanceSettings.model_validate(settings), _WIDTH)
    state = guidance.initial_state()
    optimizer = torch.optim.AdamW([*network.parameters(), *guidance.parameters()], lr=rate)
    for _ in range(steps):
        rows = torch.randint(0, _SAMPLES // 2, (_BATCH,), generator=generator)
        features = network(inputs[rows])
        keep = (1 - F.cosine_similarity(features, start(inputs[rows]))).mean()
        terms, _ = guidance(features, {"site": sites[rows]}, state)
        optimizer.zero_grad()
        torch.stack([keep, *terms.values()]).sum().backward()
        optimizer.step()
        state |= guidance.moved(state)
    with torch.no_grad():
        final = network(inputs)
        distance = float((1 - F.cosine_similarity(final, start(inputs))).mean())
    final = F.normalize(final, dim=1) * _WIDTH**0.5
    return GuidanceResult(by, weight, rate, seed, _probed(final, sites), _probed(final, labels), distance)


def _probed(features: Tensor, labels: Tensor) -> float:
    """Accuracy on the second half of a logistic regression on the first."""
    half = len(features) // 2
    weight = torch.zeros(features.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features[:half] @ weight + bias, labels[:half]) + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return float(((features[half:] @ weight + bias).argmax(1) == labels[half:]).float().mean())


def line(result: GuidanceResult) -> str:
    """One line of a log."""
    name = f"{result.by}, weight {result.weight:g}, rate {result.rate:g}, seed {result.seed}"
    return f"{name}: site {result.site:.3f}, class {result.label:.3f}, distance {result.distance:.3f}"


def markdown(results: Sequence[GuidanceResult], machine: Mapping[str, str], command: str) -> str:
    """The page: means over seeds with 95 % intervals, in percent."""
    head = ["term", "weight", "learning rate", "site", "class", "distance to the start"]
    rows = []
    for key in dict.fromkeys((r.rate, r.by, r.weight) for r in results):
        own = [r for r in results if (r.rate, r.by, r.weight) == key]
        rate, by, weight = key
        cells = [_percent([getattr(r, name) for r in own]) for name in ("site", "label", "distance")]
        rows.append([by if weight else "none", f"{weight:g}", f"{rate:g}", *cells])
    table = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = (
        "Accuracy in percent of linear probes on held-out samples (a guess has 33 for the site and 50 for the class), and "
        "1 - cosine to the features at the start times 100; means over seeds with 95 % intervals of Student's t."
    )
    return "\n".join(["# Terms that discourage a column", "", text, "", *table, "", f"`{command}`", "", about, ""])


def _percent(values: Sequence[float]) -> str:
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * _T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values)):.1f}"
