"""HTML page with the curves of the collapse ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.bench.collapse_ablation import TrialResult
from pipeline.reports.figures import Chart, Line
from pipeline.reports.page import render

_METRICS = {
    "feature_std": "standard deviation of the features, 0 is collapse",
    "feature_rank": "rank of the features",
    "target_entropy": "entropy of the targets, 1 is uniform",
}


def page(results: Sequence[TrialResult]) -> str:
    """One row of charts per question: k-NN accuracy and the logged metrics of each setting."""
    rows = []
    for question in dict.fromkeys(one.trial.question for one in results):
        trials = [one for one in results if one.trial.question == question and one.knn]
        start = next((one.untrained for one in trials if one.untrained is not None), None)
        levels = [("untrained", start, 2)] if start is not None else []
        accuracy = _lines(trials, {one.trial.name: one.knn or {} for one in trials}, dots=True)
        charts = [Chart(f"{question}: k-NN", accuracy, levels=levels, percent=True, floor=0.0)]
        for metric, title in _METRICS.items():
            logged = {one.trial.name: (one.curves or {}).get(metric, {}) for one in trials}
            if any(logged.values()):
                charts.append(Chart(f"{question}: {title}", _lines(trials, logged), floor=0.0))
        rows.append(charts)
    return render("collapse_ablation", title="Ablations of what prevents collapse", rows=rows)


def _lines(trials: Sequence[TrialResult], points: Mapping[str, Mapping[int, float]], *, dots: bool = False) -> list[Line]:
    names = [one.trial.name for one in trials]
    return [Line(name, sorted(points[name].items()), number % 3, dots) for number, name in enumerate(names) if points[name]]
