"""Settings of the evaluations (section ``evaluation``), with what each evaluator needs and which metrics it has."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from pipeline.config.types import Count, FilePath, ImageSize, Length, Positive, Settings, Shards, Share

Need = Literal["bank", "queries", "captions", "text_encoder", "class_maps"]
"""What an evaluator needs: labelled images to learn from, labelled images to evaluate, images with captions to evaluate, a text
encoder, images with a class for each pixel to learn from and to evaluate."""

_LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


class Metric(NamedTuple):
    """A metric of an evaluator.

    Attributes:
        name: without the evaluator's name in front.
        higher_is_better: ``None`` for a value that does not rank networks, such as a chosen learning rate.
        fraction: whether it lies in 0..1 and is shown as a percentage.
    """

    name: str
    higher_is_better: bool | None = True
    fraction: bool = True


class EvaluatorSettings(Settings):
    """Settings of one evaluator, a subclass of :class:`pipeline.evaluation.base.Evaluator` in ``evaluation/<section>.py``."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(50, "epochs"), description="interval between two evaluations")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that the evaluator computes."""
        return ()


class KnnSettings(EvaluatorSettings):
    """Weighted k-nearest-neighbour classification on the teacher's features."""

    needs = frozenset(("bank", "queries"))

    every: Length = Field(default=Length(10, "epochs"), description="interval between two evaluations")
    train_shards: Shards | None = Field(
        default=None, description="labelled shards of the feature bank; null means the training shards"
    )
    val_shards: Shards | None = Field(
        default=None, description="labelled validation shards; null means *val-*.tar beside the training shards"
    )
    k: tuple[Count, ...] = Field(default=(10, 20), min_length=1, description="numbers of nearest neighbours; each is evaluated")
    temperature: Positive = Field(default=0.07, description="temperature of the softmax that weights the neighbours")
    max_train: Count | None = Field(default=None, description="maximum number of samples in the feature bank; null means all")
    max_val: Count | None = Field(default=None, description="maximum number of validation samples; null means all")
    image_size: ImageSize | None = Field(
        default=None, description="side of the image in pixels, or [height, width]; null means the size of a global crop"
    )
    batch_size: Count = Field(default=256, description="images per forward pass")
    baselines: bool = Field(
        default=True, description="also evaluate the network before its first step, by every evaluator, and raw pixels, once"
    )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy for each k."""
        return tuple(Metric(f"k{k}") for k in self.k)


class LinearSettings(EvaluatorSettings):
    """Linear probe trained by gradient descent on the images of ``knn``: its feature bank is the training set."""

    needs = frozenset(("bank", "queries"))

    learning_rates: tuple[Positive, ...] = Field(
        default=_LEARNING_RATES, min_length=1, description="learning rates of the grid, for a batch of 256 samples"
    )
    layers: tuple[Count, ...] = Field(
        default=(1, 4),
        min_length=1,
        description="numbers of last blocks whose features are concatenated, the second axis of the grid",
    )
    epochs: Count = Field(default=10, description="passes over the training samples")
    batch_size: Count = Field(default=256, description="samples per step")
    validation_fraction: Share = Field(
        default=0.1, le=0.5, description="share of the training samples held out to choose the best of the grid"
    )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy, and the choice from the grid."""
        choice = (Metric(name, None, False) for name in ("rate", "layers", "patches"))
        return (Metric("top1"), Metric("chosen_on", None), *choice)


class LogisticSettings(EvaluatorSettings):
    """scikit-learn's logistic regression on the images of ``knn``: its feature bank is the training set."""

    needs = frozenset(("bank", "queries"))

    C: tuple[Positive, ...] = Field(
        default=(1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3),
        min_length=1,
        description="inverse regularization strengths (scikit-learn's C), of which the best is chosen",
    )
    max_iter: Count = Field(default=1000, description="maximum number of iterations")
    validation_fraction: Share = Field(default=0.1, le=0.5, description="share of the training samples held out to choose C")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy, and the chosen C."""
        return (Metric("top1"), Metric("cost", None, False))


class SegmentationSettings(EvaluatorSettings):
    """Linear segmentation: a linear layer on patch tokens, trained on images with a class for each pixel."""

    needs = frozenset(("class_maps",))

    train_shards: Shards | None = Field(default=None, description="training shards with class maps; required")
    val_shards: Shards | None = Field(default=None, description="validation shards with class maps; required")
    num_classes: int | None = Field(default=None, ge=2, le=250, description="number of classes; required")
    ignore_index: tuple[int, ...] = Field(default=(255,), description="values in the class maps that are not a class")
    class_names: tuple[str, ...] = Field(default=(), description="names of the classes; by default their numbers")
    image_size: int | None = Field(
        default=None, ge=8, le=4096, description="side of the image in pixels; null means the size of a global crop"
    )
    max_train: Count | None = Field(default=None, description="maximum number of training images; null means all")
    max_val: Count | None = Field(default=None, description="maximum number of validation images; null means all")
    learning_rates: tuple[Positive, ...] = Field(
        default=_LEARNING_RATES, min_length=1, description="learning rates, of which the best is chosen"
    )
    epochs: Count = Field(default=20, description="passes over the training images")
    batch_size: Count = Field(default=16, description="images per step and per forward pass")
    validation_fraction: Share = Field(
        default=0.1, le=0.5, description="share of the training images held out to choose the learning rate"
    )
    sliding_window: bool = Field(
        default=False,
        description="evaluate entire class maps at their own resolution with a sliding window, as in published results; false "
        "evaluates the centre square at the network's input size, which is faster",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, or else their numbers."""
        return self.class_names or tuple(str(number) for number in range(self.num_classes or 0))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Mean IoU, pixel accuracy, mean IoU of the most frequent class, the chosen learning rate, and the IoU of each class."""
        ious = (Metric(f"iou/{name}", None) for name in self.names)
        return (Metric("miou"), Metric("pixels"), Metric("majority", None), Metric("rate", None, False), *ious)


class ZeroShotSettings(EvaluatorSettings):
    """Zero-shot classification of the images of ``knn``, for methods with a text encoder."""

    needs = frozenset(("queries", "text_encoder"))

    every: Length = Field(default=Length(10, "epochs"), description="interval between two evaluations")
    class_names: FilePath | None = Field(
        default=None, description="file with one class name per line, in the order of the class numbers"
    )
    templates: FilePath | None = Field(
        default=None, description="file with one prompt template per line, each containing {}; null means SLIP's seven"
    )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracies."""
        return (Metric("top1"), Metric("top5"), Metric("mean_per_class"))


class RetrievalSettings(EvaluatorSettings):
    """Image-to-text and text-to-image retrieval on the validation images of ``knn``."""

    needs = frozenset(("captions", "text_encoder"))

    every: Length = Field(default=Length(10, "epochs"), description="interval between two evaluations")
    merge_equal_captions: bool = Field(
        default=False,
        description="count images with the same caption as correct for each other; false is the published protocol "
        "(CLIP_benchmark), true suits data whose captions repeat, such as class names",
    )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Recalls and ranks in both directions."""
        directions = ("image_to_text", "text_to_image")
        recalls = (Metric(f"{direction}/recall@{k}") for direction in directions for k in (1, 5, 10))
        ranks = (Metric(f"{direction}/{rank}_rank", False, False) for direction in directions for rank in ("mean", "median"))
        return (*recalls, *ranks)


class RobustnessSettings(EvaluatorSettings):
    """Universal adversarial perturbation, fitted on the feature bank of ``knn`` and evaluated on its validation images."""

    needs = frozenset(("bank", "queries"))

    epsilon: float = Field(default=10 / 255, gt=0, lt=1, description="largest change of a pixel, as a share of full intensity")
    epochs: Count = Field(default=2, description="passes over the images on which the perturbation is fitted")
    k: Count = Field(default=20, description="number of nearest neighbours")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Effects of the perturbation, and of random signs of the same size (``noise_``)."""
        effects = (
            *(Metric(name, False) for name in ("fooling", "of_right", "identity")),
            Metric("disturbed"),
            *(Metric(name, True, False) for name in ("cosine", "cosine_p10")),
        )
        noise = (Metric(f"noise_{name}", None, fraction) for name, _, fraction in effects)
        return (Metric("accuracy"), *effects, *noise)


class EvaluationSettings(Settings):
    """Evaluations during training."""

    max_time_percent: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="percentage of the training time that evaluations may take; an evaluation that would exceed it is postponed; "
        "null means no limit",
    )
    log_images: bool = Field(
        default=True,
        description="save image sheets at each evaluation: PCA of patches, attention, retrieval results",
    )
    knn: KnnSettings = Field(default=KnnSettings(), description="k-nearest-neighbour classification")
    linear: LinearSettings = Field(default=LinearSettings(), description="linear probe")
    logistic: LogisticSettings = Field(default=LogisticSettings(), description="logistic regression")
    segmentation: SegmentationSettings = Field(default=SegmentationSettings(), description="linear segmentation")
    zeroshot: ZeroShotSettings = Field(default=ZeroShotSettings(), description="zero-shot classification")
    retrieval: RetrievalSettings = Field(default=RetrievalSettings(), description="image-text retrieval")
    robustness: RobustnessSettings = Field(default=RobustnessSettings(), description="universal adversarial perturbation")

    @classmethod
    def evaluators(cls) -> tuple[str, ...]:
        """Names of all evaluators: the fields that are an evaluator's section."""
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return tuple(name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, EvaluatorSettings))

    def section(self, name: str) -> EvaluatorSettings:
        """The settings of the evaluator ``name``."""
        settings: EvaluatorSettings = getattr(self, name)
        return settings

    @property
    def enabled(self) -> dict[str, Length]:
        """Names and intervals of the enabled evaluators."""
        sections = {name: self.section(name) for name in self.evaluators()}
        return {name: settings.every for name, settings in sections.items() if settings.enabled}

    def needing(self, *needs: Need) -> set[str]:
        """Names of the enabled evaluators that need any of ``needs``."""
        return {name for name in self.enabled if self.section(name).needs & set(needs)}

    @property
    def uses_knn_images(self) -> bool:
        """Whether any enabled evaluator needs the images of ``knn``."""
        return bool(self.needing("bank", "queries", "captions"))

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metrics of the enabled evaluators by full name, ``<evaluator>/<metric>``."""
        return {f"{name}/{metric.name}": metric for name in self.enabled for metric in self.section(name).metrics}

    @property
    def scores(self) -> list[str]:
        """Full names of the metrics of the enabled evaluators for which higher is better."""
        return [name for name, metric in self.metrics.items() if metric.higher_is_better]

    def only(self, *names: str, **changes: EvaluatorSettings) -> EvaluationSettings:
        """A copy in which only the named evaluators are enabled."""
        sections = {
            name: changes.get(name, self.section(name)).model_copy(update={"enabled": name in names})
            for name in self.evaluators()
        }
        return self.model_copy(update=sections)
