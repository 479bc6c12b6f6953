"""`FinetuneConfig`: how to train a pruned model, or to prune one while it trains."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..budget import Budget
from ..checks import check_keys, check_number, check_whole, is_number, refuse
from ..config import MAX_SEED, BlockPruneConfig
from ..errors import ConfigError
from ..score.methods import METHODS, Method, MethodName, find_method
from ..settings_file import read_settings, with_todays_budgets
from ..types import JsonDict

FORMAT_VERSION = 1
USUAL_WARMUP = 5.0  # epochs, of DeiT's training
PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("tensorboard", "trackio", "wandb")
# What changes how a run is carried out, and not what comes of it.
NO_PART_OF_THE_RESULT = ("workers", "save_every", "trackers")


@dataclass(frozen=True)
class AugmentConfig:
    """Random views of the images, as DeiT (arXiv 2012.12877) trains on.

    Args:
        smallest_crop: least share of a picture's area that a crop shows; 1 shows as much as fits the model's input.
        flip: share of views that are mirrored.
        operations: of RandAugment (arXiv 1909.13719) on each view, each applied with a probability of one half; 0 for
            none.
        magnitude: theirs, from 0 to 10.
        magnitude_std: standard deviation of the magnitude.
        erasing: share of views of which a rectangle becomes noise (arXiv 1708.04896).
        mixup: both parameters of the Beta distribution of mixup (arXiv 1710.09412); 0 for none.
        cutmix: those of CutMix (arXiv 1905.04899); 0 for none. Where both are on, each pair of images takes one of
            them.
        mixing: share of the pairs that are mixed.
    """

    smallest_crop: float = 0.08
    flip: float = 0.5
    operations: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mixing: float = 1.0

    def __post_init__(self) -> None:
        for key in ("flip", "erasing", "mixing"):
            check_number(f"augment.{key}", getattr(self, key), 0, 1)
        for key in ("mixup", "cutmix", "magnitude_std"):
            check_number(f"augment.{key}", getattr(self, key))
        check_number("augment.magnitude", self.magnitude, 0, 10)
        check_whole("augment.operations", self.operations, 0)
        if not is_number(self.smallest_crop) or not 0 < self.smallest_crop <= 1:
            refuse("augment.smallest_crop", "a share above 0 and at most 1", self.smallest_crop)

    @property
    def mixes(self) -> bool:
        """Whether images are ever mixed."""
        return self.mixing > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class DistillationConfig:
    """What is learned from the dense model beside the labels.

    Args:
        kind: "soft" (KL divergence of its predictions from the model's), "hard" (cross entropy with the class that it
            takes for the most likely, or each class that it finds likely; not for a regression) or "none".
        temperature: what both models' logits are divided by in "soft"; the loss is multiplied by its square.
        weight: of that loss.
        hidden_weight: of the squared distance between the hidden states after each layer, over the variance of the
            dense model's.
    """

    kind: Literal["soft", "hard", "none"] = "soft"
    temperature: float = 1.0
    weight: float = 1.0
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("soft", "hard", "none"):
            refuse("distillation.kind", "one of soft, hard, none", self.kind)
        for key in ("weight", "hidden_weight"):
            check_number(f"distillation.{key}", getattr(self, key))
        if not is_number(self.temperature) or self.temperature <= 0:
            refuse("distillation.temperature", "a number above 0", self.temperature)
        if self.kind != "soft" and self.temperature != 1:
            raise ConfigError(f"distillation.temperature: kind {self.kind!r} has none; leave it out, or use kind: soft")

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model is asked for anything."""
        return (self.kind != "none" and self.weight > 0) or self.hidden_weight > 0


@dataclass(frozen=True)
class GradualConfig:
    """How blocks leave while the model trains: the share kept falls along a cubic curve (arXiv 1710.01878).

    Args:
        budget: what may remain at the end, as in `BlockPruneConfig`.
        block_shape: (rows, cols) of a block; a model that is pruned already has its own.
        method: what scores blocks, as in `BlockPruneConfig`.
        every: steps from one choice of blocks to the next.
        start: share of the training after which blocks begin to go.
        end: share of the training by which the budget is met.
        samples: images that "taylor" and "obs" take their statistics from, anew at each choice.
        min_kept_per_layer: share of its blocks that every layer keeps.
        damping: of "obs".
        targets: patterns of the layers of a dense model to prune; a pruned one has its own.
        ignore: patterns of those to leave dense.
    """

    budget: Budget = field(default_factory=Budget)
    block_shape: tuple[int, int] | None = None
    method: MethodName = "taylor"
    every: int = 100
    start: float = 0.0
    end: float = 0.5
    samples: int = 512
    min_kept_per_layer: float = 0.05
    damping: float = 0.01
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            check_keys(Budget, self.budget, "gradual.budget")
            object.__setattr__(self, "budget", Budget(**self.budget))
        for key in ("block_shape", "targets", "ignore"):
            if isinstance(value := getattr(self, key), list):
                object.__setattr__(self, key, tuple(value))
        if self.method not in METHODS:
            refuse("gradual.method", f"one of {', '.join(METHODS)}", self.method)
        check_whole("gradual.every", self.every, 1)
        check_whole("gradual.samples", self.samples, 1)
        for key in ("start", "end"):
            check_number(f"gradual.{key}", getattr(self, key), 0, 1)
        if self.start > self.end or not self.end:
            raise ConfigError(
                f"gradual: start {self.start} and end {self.end} leave no time; end comes after start, and above 0"
            )
        self.pruning(self.block_shape or (1, 1), self.budget)  # checks the rest

    @property
    def scoring(self) -> Method:
        """What the method needs: images, gradients, or neither."""
        return find_method(self.method)

    def pruning(self, block_shape: tuple[int, int], budget: Budget) -> BlockPruneConfig:
        """The settings of one choice of blocks.

        Args:
            block_shape: that of the model's layers.
            budget: what may remain this time.
        """
        return BlockPruneConfig(
            block_shape=block_shape,
            method=self.method,
            refit=False,
            permute=False,
            moves=("blocks",),
            coupling_rounds=0,
            true_loss_rounds=0,
            damping=self.damping,
            budget=budget,
            power_weight=0,
            targets=self.targets,
            ignore=self.ignore,
            min_kept_per_layer=self.min_kept_per_layer,
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """How to train a pruned model.

    Args:
        epochs: passes over the images.
        batch_size: images of a step, on all processes together.
        micro_batch: images that a process takes at once; it adds up the gradients of as many such passes as a step
            needs.
        lr: peak learning rate, for this batch size.
        min_lr: that at the end; a cosine leads there.
        warmup_epochs: passes in which the rate rises on a straight line; None for 5, but at most a sixth of the epochs.
        warmup_lr: where it begins.
        weight_decay: AdamW's, of weight matrices alone: biases, norms, tokens and positions have none.
        betas: AdamW's.
        eps: AdamW's.
        clip: largest norm of the gradient; None leaves it as it is.
        ema: decay of the average of the weights over steps; what is evaluated and saved is that average. None for the
            weights themselves.
        label_weight: of the loss with the labels (see `model.tasks`); 0 needs no labels.
        label_smoothing: share of each label that is spread over all classes; of a regression none is.
        distillation: see `DistillationConfig`.
        augment: see `AugmentConfig`; None takes images as evaluation does.
        gradual: see `GradualConfig`; None leaves masks as they are.
        precision: "no", or "bf16" or "fp16" for mixed precision.
        epoch_images: images of an epoch of a stream, whose length nobody knows; None for other data sets.
        evaluate_every: epochs from one evaluation to the next, where there are images for it.
        save_every: steps from one saved state to the next; None saves after each epoch.
        workers: processes that prepare images, for each process that trains; 0 prepares them in between.
        trackers: programs that the course of training is logged to: tensorboard, trackio, wandb.
        seed: of the order of images and of their views.
        format_version: version of this schema.

    Raises:
        ConfigError: naming the key and the remedy.

    Example:
        >>> FinetuneConfig(epochs=30, distillation={"kind": "hard"}).distillation.kind
        'hard'
    """

    epochs: int = 30
    batch_size: int = 512
    micro_batch: int = 64
    lr: float = 5e-4
    min_lr: float = 1e-5
    warmup_epochs: float | None = None
    warmup_lr: float = 1e-6
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = None
    ema: float | None = None
    label_weight: float = 1.0
    label_smoothing: float = 0.1
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    gradual: GradualConfig | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    epoch_images: int | None = None
    evaluate_every: int = 1
    save_every: int | None = None
    workers: int = 0
    trackers: tuple[str, ...] = ()
    seed: int = 0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self._normalise()
        self._check_counts()
        self._check_values()
        if not self.label_weight and not self.distillation.needs_teacher:
            raise ConfigError("label_weight and distillation: all weights are 0, so nothing is learned; raise one")
        if self.micro_batch % 2 and self.augment is not None and self.augment.mixes:
            raise ConfigError(f"micro_batch: images are mixed in pairs; give an even number, not {self.micro_batch}")

    def _normalise(self) -> None:
        """Accept what YAML and JSON can write: lists for tuples, mappings for the nested settings."""
        for key, cls in _NESTED.items():
            off = getattr(self, key) is None and key != "distillation"
            if not off and not isinstance(getattr(self, key), cls):
                check_keys(cls, getattr(self, key), key)
                object.__setattr__(self, key, cls(**getattr(self, key)))
        for key in ("betas", "trackers"):
            if isinstance(value := getattr(self, key), list):
                object.__setattr__(self, key, tuple(value))

    def _check_counts(self) -> None:
        for key in ("epochs", "batch_size", "micro_batch", "evaluate_every"):
            check_whole(key, getattr(self, key), 1)
        for key in ("epoch_images", "save_every"):
            if getattr(self, key) is not None:
                check_whole(key, getattr(self, key), 1)
        for key in ("workers", "seed"):
            check_whole(key, getattr(self, key), 0)
        if self.seed >= MAX_SEED:
            refuse("seed", f"a whole number below {MAX_SEED}", self.seed)
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            refuse("format_version", f"{FORMAT_VERSION} (a newer hf_blockprune may read it)", self.format_version)

    def _check_values(self) -> None:
        for key in ("lr", "min_lr", "warmup_lr", "weight_decay", "label_weight"):
            check_number(key, getattr(self, key))
        if self.min_lr > self.lr or self.warmup_lr > self.lr:
            raise ConfigError(f"lr: {self.lr} is the peak; min_lr and warmup_lr may not lie above it")
        check_number("warmup_epochs", self.warmup)
        if self.warmup > self.epochs:
            raise ConfigError(
                f"warmup_epochs: {self.warmup} are more than the {self.epochs} epochs; lower it, or leave it out for a "
                "sixth of them"
            )
        shares: dict[str, float] = {"label_smoothing": self.label_smoothing, "ema": 0 if self.ema is None else self.ema}
        for key, value in shares.items():
            if not is_number(value) or not 0 <= value < 1:
                refuse(key, "a share from 0 to below 1", value)
        positive: dict[str, float] = {"eps": self.eps, "clip": 1 if self.clip is None else self.clip}
        for key, value in positive.items():
            if not is_number(value) or value <= 0:
                refuse(key, "a number above 0 (YAML reads 1e-8 as text: write 1.0e-8)", value)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            refuse("betas", "two numbers such as [0.9, 0.999]", self.betas)
        for beta in self.betas:
            if not is_number(beta) or not 0 <= beta < 1:
                refuse("betas", "two shares from 0 to below 1", self.betas)
        if self.precision not in PRECISIONS:
            refuse("precision", "'no', 'bf16' or 'fp16' (in YAML with quotes: a bare no is false)", self.precision)
        for tracker in self.trackers if isinstance(self.trackers, tuple) else [self.trackers]:
            if tracker not in TRACKERS:
                refuse("trackers", f"a list of {', '.join(TRACKERS)}", self.trackers)

    @property
    def warmup(self) -> float:
        """Epochs in which the rate rises."""
        return min(USUAL_WARMUP, self.epochs / 6) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def uses_labels(self) -> bool:
        """Whether the images' labels are read at all."""
        return self.label_weight > 0 or (self.gradual is not None and self.gradual.scoring.gradients)

    def replace(self, **changes: object) -> "FinetuneConfig":
        """A copy with some settings changed, checked again.

        Raises:
            ConfigError: an unknown key, or a value that cannot be.
        """
        check_keys(type(self), changes, "config")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: JsonDict) -> "FinetuneConfig":
        """Build from plain values, as `to_dict` gives them or a recipe holds them.

        Raises:
            ConfigError: an unknown key, or a value that cannot be.
        """
        check_keys(cls, values, "config")
        gradual = values.get("gradual")
        if isinstance(gradual, Mapping):
            values = {**values, "gradual": with_todays_budgets(gradual, saved="format_version" in values)}
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "FinetuneConfig":
        """Read a .yaml, .yml or .json file; errors as for `from_dict`, and where the file cannot be read."""
        return cls.from_dict(read_settings(path))

    def to_dict(self) -> JsonDict:
        """Plain values that JSON and YAML can write; `from_dict` reads them back."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    def result_settings(self) -> JsonDict:
        """Plain values of all that decides what comes of a run."""
        return {key: value for key, value in self.to_dict().items() if key not in NO_PART_OF_THE_RESULT}


_NESTED = {"distillation": DistillationConfig, "augment": AugmentConfig, "gradual": GradualConfig}


def _plain(value: object) -> object:
    """With lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
