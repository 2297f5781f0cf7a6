"""Base class of evaluators; finds an evaluator by the name of its settings section; evaluates with several."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar

from pipeline.evaluation.images import EvalData
from pipeline.evaluation.settings import EvaluatorSettings, Metric, Need
from pipeline.models.eval_model import EvalModel

_S = TypeVar("_S", bound=EvaluatorSettings)


class Evaluator(ABC, Generic[_S]):
    """Base class of evaluators. To add one, write ``evaluation/<name>.py`` with a subclass, and a section in ``settings.py``.

    What it needs and the names of its metrics are declared by its section, which config checks read without importing torch.

    Args:
        settings: the evaluator's section.
        data: images of this rank, and how to open more.
    """

    def __init__(self, settings: _S, data: EvalData) -> None:
        self.settings, self.data = settings, data

    @property
    def needs(self) -> frozenset[Need]:
        """What the evaluator needs of the data and the network."""
        return self.settings.needs

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that :meth:`__call__` returns, and for which of them higher is better."""
        return self.settings.metrics

    @abstractmethod
    def __call__(self, model: EvalModel) -> dict[str, float]:
        """Scores by metric, the same on all ranks; all ranks call it together.

        Raises:
            FoveaError: on all ranks, if the data or the network cannot be evaluated.
        """

    def raw_pixel_scores(self) -> dict[str, float]:
        """The same scores with raw pixels as features, a baseline; empty for evaluators that do not have it."""
        return {}


def evaluator_class(name: str) -> type[Evaluator[EvaluatorSettings]]:
    """The evaluator of a settings section: the one subclass of :class:`Evaluator` in ``evaluation/<name>.py``.

    Raises:
        TypeError: the file defines none, or several.
    """
    module = importlib.import_module(f"{__package__}.{name}")
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    evaluators = [cls for cls in classes if issubclass(cls, Evaluator) and not inspect.isabstract(cls)]
    if len(evaluators) != 1:
        raise TypeError(f"{module.__name__} must define one subclass of Evaluator, and defines {len(evaluators)}")
    return evaluators[0]


def evaluate_all(evaluators: Mapping[str, Evaluator[EvaluatorSettings]], model: EvalModel) -> dict[str, float]:
    """Scores of several evaluators by full metric name, ``<evaluator>/<metric>``."""
    return {f"{name}/{metric}": value for name, evaluator in evaluators.items() for metric, value in evaluator(model).items()}
