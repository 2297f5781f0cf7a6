"""Settings of the evaluations (section ``evaluation``)."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.types import Count, FilePath, Length, Positive, Settings, Shards, Share

_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
_EVERY = "distance of two evaluations"


class KnnSettings(Settings):
    """Weighted k-nearest-neighbour classification on the teacher's features."""

    enabled: bool = Field(default=False, description="run this evaluation")
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
    image_size: int | None = Field(
        default=None, ge=8, le=4096, description="side of the image in pixels; null means the size of a global crop"
    )
    batch_size: Count = Field(default=256, description="images per forward pass")
    baselines: bool = Field(default=True, description="also evaluate the untrained network and raw pixels, once")


class LinearSettings(Settings):
    """Linear probe trained by gradient descent on the images of ``knn``: its feature bank is the training set."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(50, "epochs"), description=_EVERY)
    learning_rates: tuple[Positive, ...] = Field(
        default=_RATES, min_length=1, description="learning rates of the grid, for a batch of 256 samples"
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


class LogisticSettings(Settings):
    """scikit-learn's logistic regression on the images of ``knn``: its feature bank is the training set."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(50, "epochs"), description=_EVERY)
    C: tuple[Positive, ...] = Field(
        default=(1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3),
        min_length=1,
        description="inverse regularization strengths (scikit-learn's C), of which the best is chosen",
    )
    max_iter: Count = Field(default=1000, description="maximum number of iterations")
    validation_fraction: Share = Field(default=0.1, le=0.5, description="share of the training samples held out to choose C")


class SegmentationSettings(Settings):
    """Linear segmentation: a linear layer on patch tokens, trained on images with a class for each pixel."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(50, "epochs"), description=_EVERY)
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
        default=_RATES, min_length=1, description="learning rates, of which the best is chosen"
    )
    epochs: Count = Field(default=20, description="passes over the training images")
    batch_size: Count = Field(default=16, description="images per step and per forward pass")
    validation_fraction: Share = Field(
        default=0.1, le=0.5, description="share of the training images held out to choose the learning rate"
    )
    sliding_window: bool = Field(
        default=False,
        description="evaluate whole class maps at their own resolution with a sliding window, as in published results; false "
        "evaluates the centre square at the network's input size, which is faster",
    )


class ZeroShotSettings(Settings):
    """Zero-shot classification of the images of ``knn``, for methods with a text encoder."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(10, "epochs"), description=_EVERY)
    class_names: FilePath | None = Field(
        default=None, description="file with one class name per line, in the order of the class numbers"
    )
    templates: FilePath | None = Field(
        default=None, description="file with one prompt template per line, each containing {}; null means SLIP's seven"
    )


class RetrievalSettings(Settings):
    """Image-to-text and text-to-image retrieval on the validation images of ``knn``."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(10, "epochs"), description=_EVERY)
    merge_equal_captions: bool = Field(
        default=False,
        description="count images with the same caption as correct for each other; false is the published protocol "
        "(CLIP_benchmark), true suits data whose captions repeat, such as class names",
    )


class RobustnessSettings(Settings):
    """Universal adversarial perturbation, fitted on the feature bank of ``knn`` and evaluated on its validation images."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(50, "epochs"), description=_EVERY)
    epsilon: float = Field(default=10 / 255, gt=0, lt=1, description="largest change of a pixel, as a share of full intensity")
    epochs: Count = Field(default=2, description="passes over the images on which the perturbation is fitted")
    k: Count = Field(default=20, description="number of nearest neighbours")


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

    @property
    def enabled(self) -> dict[str, Length]:
        """Names and intervals of the enabled evaluations."""
        found = {name: getattr(self, name) for name in NAMES}
        return {name: settings.every for name, settings in found.items() if settings.enabled}

    @property
    def labelled(self) -> bool:
        """Whether any enabled evaluation needs the images of ``knn``."""
        return bool(self.enabled.keys() - {"segmentation"})

    @property
    def scores(self) -> list[str]:
        """Names of the metrics of the enabled evaluations for which higher is better."""
        recalls = [f"retrieval/{way}/recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
        metrics = {
            "knn": [f"knn/k{k}" for k in self.knn.k],
            "linear": ["linear/top1"],
            "logistic": ["logistic/top1"],
            "segmentation": ["segmentation/miou", "segmentation/pixels"],
            "zeroshot": ["zeroshot/top1", "zeroshot/top5", "zeroshot/mean_per_class"],
            "retrieval": recalls,
            "robustness": ["robustness/cosine"],
        }
        return [metric for name in self.enabled for metric in metrics[name]]

    def only(self, *names: str, **changes: Settings) -> EvaluationSettings:
        """A copy in which only the named evaluations are enabled."""
        sections = {name: changes.get(name, getattr(self, name)).model_copy(update={"enabled": name in names}) for name in NAMES}
        return self.model_copy(update=sections)


VOTED = frozenset(
    ("knn", "linear", "logistic", "robustness")
)  # evaluations that learn from the labels of the ``knn`` feature bank
NAMES = ("knn", "linear", "logistic", "segmentation", "zeroshot", "retrieval", "robustness")
