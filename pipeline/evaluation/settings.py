"""Section ``evaluation`` of the settings: who judges the weights, on what, how often."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.types import Count, FilePath, Length, Positive, Settings, Shards, Share

_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
_EVERY = "distance of two evaluations"


class KnnSettings(Settings):
    """Nearest neighbours on the teacher's features."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(10, "epochs"), description="distance of two evaluations")
    train_shards: Shards | None = Field(default=None, description="labelled shards to vote; null means the training shards")
    val_shards: Shards | None = Field(
        default=None, description="labelled shards to judge; null means *val-*.tar beside the training shards"
    )
    k: tuple[Count, ...] = Field(default=(10, 20), min_length=1, description="neighbours that vote")
    temperature: Positive = Field(default=0.07, description="temperature of the votes' weights")
    max_train: Count | None = Field(default=None, description="voters used at most; null means all")
    max_val: Count | None = Field(default=None, description="judged samples at most; null means all")
    image_size: int | None = Field(
        default=None, ge=8, le=4096, description="side of the picture, pixels; null means a global crop's"
    )
    batch_size: Count = Field(default=256, description="pictures of one forward pass")
    baselines: bool = Field(default=True, description="judge the untrained network and raw pixels too, once")


class LinearSettings(Settings):
    """A linear layer by gradient descent, on the pictures of ``knn``: the voters train it."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(50, "epochs"), description=_EVERY)
    learning_rates: tuple[Positive, ...] = Field(
        default=_RATES, min_length=1, description="learning rates of the grid, for 256 samples"
    )
    layers: tuple[Count, ...] = Field(
        default=(1, 4), min_length=1, description="last blocks that are read, the grid's other side"
    )
    epochs: Count = Field(default=10, description="passes over the training samples")
    batch_size: Count = Field(default=256, description="samples of a step")
    validation_fraction: Share = Field(
        default=0.1, le=0.5, description="share of the training samples that choose the best of the grid"
    )


class LogisticSettings(Settings):
    """scikit-learn's logistic regression, on the pictures of ``knn``: the voters train it."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(50, "epochs"), description=_EVERY)
    C: tuple[Positive, ...] = Field(
        default=(1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3), min_length=1, description="scikit-learn's C, of which the best is chosen"
    )
    max_iter: Count = Field(default=1000, description="iterations at most")
    validation_fraction: Share = Field(default=0.1, le=0.5, description="share of the training samples that choose the cost")


class SegmentationSettings(Settings):
    """A linear layer on patch tokens, on pictures with a class for each pixel."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(50, "epochs"), description=_EVERY)
    train_shards: Shards | None = Field(default=None, description="shards to learn from; required")
    val_shards: Shards | None = Field(default=None, description="shards to judge; required")
    num_classes: int | None = Field(default=None, ge=2, le=250, description="number of classes; required")
    ignore_index: tuple[int, ...] = Field(default=(255,), description="numbers in class maps that are no class")
    class_names: tuple[str, ...] = Field(default=(), description="names of the classes; their numbers if none are given")
    image_size: int | None = Field(
        default=None, ge=8, le=4096, description="side of the picture, pixels; null means a global crop's"
    )
    max_train: Count | None = Field(default=None, description="pictures learned from at most; null means all")
    max_val: Count | None = Field(default=None, description="pictures judged at most; null means all")
    learning_rates: tuple[Positive, ...] = Field(
        default=_RATES, min_length=1, description="learning rates, of which the best is chosen"
    )
    epochs: Count = Field(default=20, description="passes over the training pictures")
    batch_size: Count = Field(default=16, description="pictures of a step and of a forward pass")
    validation_fraction: Share = Field(default=0.1, le=0.5, description="share of the training pictures that choose the rate")
    sliding_window: bool = Field(
        default=False,
        description="judge whole class maps in their own size, by squares that slide over the picture, as published figures are; "
        "false judges the centre square in the size that the network sees, which is faster",
    )


class ZeroShotSettings(Settings):
    """Pictures of ``knn`` put to the class whose name is nearest, by a method that reads captions."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(10, "epochs"), description=_EVERY)
    class_names: FilePath | None = Field(
        default=None, description="file of class names, one a line, in the order of their numbers"
    )
    templates: FilePath | None = Field(default=None, description="file of sentences with {}, one a line; null means SLIP's seven")


class RetrievalSettings(Settings):
    """Captions by pictures and pictures by captions, on the judged pictures of ``knn``."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(10, "epochs"), description=_EVERY)
    merge_equal_captions: bool = Field(
        default=False,
        description="images that share a caption answer for each other; off is the published protocol (CLIP_benchmark), on is "
        "for sets whose captions repeat, such as class names",
    )


class RobustnessSettings(Settings):
    """A universal adversarial perturbation, fitted on the voters of ``knn`` and judged on the judged."""

    enabled: bool = Field(default=False, description="run this evaluation")
    every: Length = Field(default=Length(50, "epochs"), description=_EVERY)
    epsilon: float = Field(default=10 / 255, gt=0, lt=1, description="largest change of a pixel, as a share of full intensity")
    epochs: Count = Field(default=2, description="passes over the pictures it is fitted on")
    k: Count = Field(default=20, description="neighbours that vote")


class EvaluationSettings(Settings):
    """What the weights are worth, measured as training goes."""

    max_time_percent: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="percent of the training time that evaluations may take; one that would take more waits; null for no limit",
    )
    log_images: bool = Field(
        default=True,
        description="keep sheets at each evaluation: PCA of patches, attention, pictures found by captions or by pictures",
    )
    knn: KnnSettings = Field(default=KnnSettings(), description="nearest neighbours")
    linear: LinearSettings = Field(default=LinearSettings(), description="linear probe")
    logistic: LogisticSettings = Field(default=LogisticSettings(), description="logistic regression")
    segmentation: SegmentationSettings = Field(default=SegmentationSettings(), description="linear segmentation")
    zeroshot: ZeroShotSettings = Field(default=ZeroShotSettings(), description="zero-shot classification")
    retrieval: RetrievalSettings = Field(default=RetrievalSettings(), description="image-text retrieval")
    robustness: RobustnessSettings = Field(default=RobustnessSettings(), description="adversarial perturbation")

    @property
    def enabled(self) -> dict[str, Length]:
        """The evaluations that are on, and how far apart each one is."""
        found = {name: getattr(self, name) for name in NAMES}
        return {name: settings.every for name, settings in found.items() if settings.enabled}

    @property
    def labelled(self) -> bool:
        """Whether the pictures of ``knn`` are wanted."""
        return bool(self.enabled.keys() - {"segmentation"})

    @property
    def scores(self) -> list[str]:
        """Metrics of the evaluations that are on, of which more is better."""
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
        """A copy in which these are on and all others off."""
        sections = {name: changes.get(name, getattr(self, name)).model_copy(update={"enabled": name in names}) for name in NAMES}
        return self.model_copy(update=sections)


VOTED = frozenset(("knn", "linear", "logistic", "robustness"))  # those that learn from the labels of the shards that vote
NAMES = ("knn", "linear", "logistic", "segmentation", "zeroshot", "retrieval", "robustness")
