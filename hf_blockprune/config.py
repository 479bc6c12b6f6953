"""`BlockPruneConfig`: how to prune. What was stored is another thing, see `BlockPruneQuantizationConfig`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import yaml

from .budget import Budget
from .checks import check_keys as _check_keys
from .checks import check_whole as _check_whole
from .checks import is_number as _is_number
from .checks import refuse as _refuse
from .errors import ConfigError
from .files import partial_file
from .score.methods import METHODS, Method, MethodName, find_method, names_where, quoted
from .settings_file import read_settings, with_todays_budgets
from .types import JsonDict

FORMAT_VERSION = 1
MoveName: TypeAlias = Literal["blocks", "units", "heads"]
MOVES: tuple[MoveName, ...] = ("blocks", "units", "heads")
MAX_SEED = 2**32
# What leaves DeiT-Ti, which is small and has little to spare, worth keeping; of larger models it was not measured.
# The numbers are in docs/prune.md.
DEFAULT_BLOCK_SHAPE = (16, 16)


def shape_text(shape: Sequence[int]) -> str:
    """ROWSxCOLS."""
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class CalibrationConfig:
    """Which images the statistics are taken from.

    Args:
        samples: number of images, drawn once at random from the data set; all of them where it holds fewer.
        batch_size: images in one forward pass on each process.
        seed: of the draw, and of the labels sampled for images that have none.
        cache_mb: bound on the memory, in MiB, of preprocessed images that are kept on each process for the steps after
            calibration, at 0.15 MB an image of 224 x 224; those past it are read again. It changes no result.
    """

    samples: int = 512
    batch_size: int = 16
    seed: int = 0
    cache_mb: int = 1024

    def __post_init__(self) -> None:
        _check_whole("calibration.samples", self.samples, 1)
        _check_whole("calibration.batch_size", self.batch_size, 1)
        _check_whole("calibration.seed", self.seed, 0)
        _check_whole("calibration.cache_mb", self.cache_mb, 0)
        if self.seed >= MAX_SEED:
            _refuse("calibration.seed", f"a whole number below {MAX_SEED}", self.seed)


@dataclass(frozen=True)
class RecoveryConfig:
    """How a pruned model is trained to behave like the dense one; needs no labels, and leaves the masks as they are.

    Args:
        samples: number of images, drawn like those of calibration, which are among them; kept decoded in memory, at
            0.3 MB an image of 224 x 224.
        reconstruction_epochs: passes over the images in which each layer by itself learns the dense layer's outputs.
        epochs: passes of distillation, in which the whole model learns the dense one's outputs.
        lr: peak learning rate of biases, norms and a factor for each row and column of a pruned weight; these few
            parameters generalise from few images.
        weight_lr: peak learning rate of the weights themselves, which learn single images by heart where it is high.
        hidden_weight: weight of the layers' outputs beside the predictions in distillation.
        token_weights: share of a token's weight that is its squared gradient; the rest is the same for all tokens.
        batch_size: images of a step, on all processes together.
    """

    samples: int = 1024
    reconstruction_epochs: int = 1
    epochs: int = 12
    lr: float = 2e-3
    weight_lr: float = 3e-5
    hidden_weight: float = 10.0
    token_weights: float = 0.9
    batch_size: int = 32

    def __post_init__(self) -> None:
        for key in ("samples", "batch_size"):
            _check_whole(f"recovery.{key}", getattr(self, key), 2)
        for key in ("reconstruction_epochs", "epochs"):
            _check_whole(f"recovery.{key}", getattr(self, key), 0)
        for key in ("lr", "weight_lr", "hidden_weight"):
            value = getattr(self, key)
            if not _is_number(value) or value < 0:
                _refuse(f"recovery.{key}", "a number from 0 (YAML reads 1e-3 as text: write 1.0e-3)", value)
        if not _is_number(self.token_weights) or not 0 <= self.token_weights < 1:
            _refuse("recovery.token_weights", "a share from 0 to below 1", self.token_weights)


@dataclass(frozen=True)
class BlockPruneConfig:
    """How to prune a vision transformer.

    Args:
        block_shape: (rows, cols) of a block, in (out_features, in_features) order.
        method: "obs" (block Optimal Brain Surgeon), "taylor" (LPViT, arXiv 2407.02068) or "magnitude".
        refit: solve for the surviving weights after pruning, with the inputs that the pruned model sees; by default
            with "obs" alone, since the other two are published without it.
        permute: let hidden units, heads and their features, and the residual stream's features change places first,
            so that those worth little share blocks; predictions stay the same, hidden states come in another order. By
            default with "obs", which it needs.
        permute_stream: let the residual stream's features be among them. False keeps hidden states, and with them
            embeddings, in the dense model's order. By default as `permute`.
        rotate: let the features of each attention head mix first, so that few of them carry most; predictions stay the
            same. By default where heads are among the moves.
        moves: what may leave: "blocks" of weights, hidden "units" of MLPs, and "heads", that is whole attention heads
            and features within all heads of a layer. One budget decides between them. By default, with "obs", all that
            the model's family supports, else "blocks"; ("blocks",) alone is the published setting, and an empty list
            leaves all to tokens.
        tokens: how many patches leave each layer, by merging with those that are most alike: "auto" finds that, and how
            much of the budget it should save; "keep" merges none; a list gives numbers, one for each layer. By default
            "keep".
        coupling_rounds: how often "obs" chooses blocks anew, knowing what the last choice left of each Linear's
            neighbours; 0 leaves their dependence out of account.
        true_loss_rounds: how often "obs" measures what the chosen blocks really cost the model's predictions, layer by
            layer, and chooses anew with losses corrected by that.
        token_weights: share of a token's weight in the refit that is its squared gradient; the rest is the same for
            all tokens, because far from the dense model even a token without a gradient matters a little.
        residual_targets: let Linears that write to the residual stream aim at the dense model's stream in the refit,
            which cancels the error so far, instead of at their own dense output.
        balance: keep as many blocks in every block row of a layer, because a kernel's time is that of its longest
            row; "obs" alone.
        damping: added to the diagonal of the inputs' covariance in "obs", relative to each entry.
        memory_mb: bound on the working memory of one layer's "obs" trace, in MiB; less takes longer.
        budget: what may remain; also given as {"metric": ..., "ratio": ...}.
        second_budget: another one that must be met too.
        power_weight: weight of the power term beside the distortion; "auto" makes what would leave without
            it save as much weighted power as it adds loss, 0 leaves power out.
        targets: glob patterns of module names to prune; "*" is every Linear of the repeated layers.
        ignore: glob patterns of module names to leave dense.
        min_kept_per_layer: share of its blocks that every target layer keeps, whatever its score,
            but for blocks that nothing reads.
        calibration: see `CalibrationConfig`.
        recovery: see `RecoveryConfig`; nothing leaves the model as pruning left it.
        format_version: version of this schema.

    Raises:
        ConfigError: naming the key and the remedy.

    Example:
        >>> BlockPruneConfig(block_shape=(32, 32), budget={"metric": "flops", "ratio": 0.75}).budget.ratio
        0.75
    """

    block_shape: tuple[int, int] = DEFAULT_BLOCK_SHAPE
    method: MethodName = "obs"
    refit: bool | None = None
    permute: bool | None = None
    permute_stream: bool | None = None
    rotate: bool | None = None
    moves: tuple[MoveName, ...] | None = None
    tokens: Literal["auto", "keep"] | tuple[int, ...] = "keep"
    coupling_rounds: int = 2
    true_loss_rounds: int = 1
    token_weights: float = 0.95
    residual_targets: bool = True
    balance: bool = False
    damping: float = 0.01
    memory_mb: int = 1024
    budget: Budget = field(default_factory=Budget)
    second_budget: Budget | None = None
    power_weight: float | Literal["auto"] = "auto"
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    min_kept_per_layer: float = 0.05
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    recovery: RecoveryConfig | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self._normalise()
        self._check_values()
        self._check_agreement()

    def _normalise(self) -> None:
        """Accept what YAML and JSON can write: lists for tuples, mappings for the nested settings."""
        nested = {
            "budget": Budget,
            "second_budget": Budget,
            "calibration": CalibrationConfig,
            "recovery": RecoveryConfig,
        }
        for key, cls in nested.items():
            value = getattr(self, key)
            if not isinstance(value, cls) and not (key in ("second_budget", "recovery") and value is None):
                _check_keys(cls, value, key)
                object.__setattr__(self, key, cls(**value))
        for key in ("block_shape", "targets", "ignore", "moves", "tokens"):
            value = getattr(self, key)
            if isinstance(value, list):
                object.__setattr__(self, key, tuple(value))

    def _check_values(self) -> None:
        if not isinstance(self.block_shape, tuple) or len(self.block_shape) != 2:
            _refuse("block_shape", "two whole numbers, rows and columns, such as [32, 32]", self.block_shape)
        for size in self.block_shape:
            _check_whole("block_shape", size, 1)
        if self.method not in METHODS:
            _refuse("method", f"one of {', '.join(METHODS)}", self.method)
        for key in ("refit", "permute", "permute_stream", "rotate"):
            if getattr(self, key) is not None and not isinstance(getattr(self, key), bool):
                _refuse(key, "true, false, or nothing for the method's default", getattr(self, key))
        self._check_moves()
        self._check_tokens()
        for key in ("residual_targets", "balance"):
            if not isinstance(getattr(self, key), bool):
                _refuse(key, "true or false", getattr(self, key))
        for key in ("coupling_rounds", "true_loss_rounds"):
            _check_whole(key, getattr(self, key), 0)
        _check_whole("memory_mb", self.memory_mb, 1)
        if not _is_number(self.token_weights) or not 0 <= self.token_weights < 1:
            _refuse("token_weights", "a share from 0 to below 1", self.token_weights)
        if not _is_number(self.damping) or self.damping <= 0:
            _refuse("damping", "a number above 0, such as 0.01", self.damping)
        if self.power_weight != "auto" and not (_is_number(self.power_weight) and self.power_weight >= 0):
            _refuse(
                "power_weight", "'auto' or a number from 0 (YAML reads 1e-3 as text: write 1.0e-3)", self.power_weight
            )
        for key in ("targets", "ignore"):
            patterns = getattr(self, key)
            if not isinstance(patterns, tuple) or not all(isinstance(p, str) and p for p in patterns):
                _refuse(key, "a list of module-name patterns such as ['*.fc1']", patterns)
        if not _is_number(self.min_kept_per_layer) or not 0 <= self.min_kept_per_layer < 1:
            _refuse("min_kept_per_layer", "a share from 0 to below 1", self.min_kept_per_layer)
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            _refuse("format_version", f"{FORMAT_VERSION} (a newer hf_blockprune may read it)", self.format_version)

    def _check_moves(self) -> None:
        names = self.moves
        if names is None:
            return
        if not isinstance(names, tuple) or any(names.count(n) > 1 or n not in MOVES for n in names):
            _refuse("moves", f"a list of some of {', '.join(MOVES)}, each once", names)
        if not names and self.tokens == "keep":
            raise ConfigError("moves: an empty list leaves all to tokens, which stay; name a move, or let tokens merge")
        if shrinking := [name for name in names if name != "blocks"]:
            if not self.scoring.fisher:
                able = quoted(names_where(lambda m: m.fisher))
                raise ConfigError(
                    f"moves: {shrinking[0]} need the statistics of method {able}, not {self.method!r}; leave them out"
                )
            if not self.refits:
                raise ConfigError(f"moves: {shrinking[0]} need refit, which is off here; leave one of them out")

    def _check_tokens(self) -> None:
        counts = self.tokens
        if counts in ("auto", "keep"):
            return
        if not isinstance(counts, tuple) or not counts or any(type(c) is not int or c < 0 for c in counts):
            _refuse("tokens", "'auto', 'keep', or a list of numbers from 0, one for each layer", counts)

    def _check_agreement(self) -> None:
        method = self.scoring
        if self.permute and not method.fisher:
            able = quoted(names_where(lambda m: m.fisher))
            raise ConfigError(f"permute: needs the statistics of method {able}, not {self.method!r}; leave it out")
        if self.permute_stream and not self.permutes:
            raise ConfigError("permute_stream: is part of permute, which is off here; leave one of them out")
        if self.rotate and not self.permutes:
            raise ConfigError("rotate: is part of permute, which is off here; leave one of them out")
        if self.balance and not method.queue_per_block_row:
            able = quoted(names_where(lambda m: m.queue_per_block_row))
            raise ConfigError(f"balance: needs the traces of method {able}, not {self.method!r}; leave it out")
        second = self.second_budget
        if second is not None and (second.metric, second.device) == (self.budget.metric, self.budget.device):
            raise ConfigError(f"second_budget: {self.budget.metric} has a budget already; name another metric")
        if self.tokens == "auto":
            budgets = [budget for budget in (self.budget, self.second_budget) if budget is not None]
            if not any(budget.counts_tokens for budget in budgets):
                raise ConfigError("tokens: merging saves no weights, so a budget of these cannot say how many leave")
            if not self.refits:
                raise ConfigError("tokens: 'auto' needs calibration images, and so refit, which is off here")
        if not self.targets:
            raise ConfigError("targets: an empty list prunes nothing; leave the key out to prune every layer")
        both = sorted(set(self.targets) & set(self.ignore))
        if both:
            raise ConfigError(f"targets and ignore both list {', '.join(both)}; take it out of one of them")
        if not method.loss and self.power_weight not in ("auto", 0):
            raise ConfigError(
                f"power_weight: {self.method} scores are no loss that power could be weighed against; "
                f"remove power_weight or use method: {' or '.join(names_where(lambda m: m.loss))}"
            )
        if self.budget.metric == "density" and self.min_kept_per_layer > (self.budget.ratio or 0.0):
            raise ConfigError(
                f"min_kept_per_layer {self.min_kept_per_layer} keeps more than budget.ratio {self.budget.ratio}; "
                "lower min_kept_per_layer or raise the budget"
            )

    @property
    def scoring(self) -> Method:
        """What the method is like."""
        return find_method(self.method)

    @property
    def refits(self) -> bool:
        """Whether surviving weights are solved for."""
        return self.scoring.refits if self.refit is None else self.refit

    @property
    def needs_images(self) -> bool:
        """Whether there is anything to learn from images."""
        return self.scoring.needs_images or self.refits

    @property
    def permutes(self) -> bool:
        """Whether hidden units change places before blocks are chosen."""
        return self.scoring.permutes and bool(self.allowed_moves) if self.permute is None else self.permute

    @property
    def allowed_moves(self) -> tuple[MoveName, ...]:
        """What may leave, in models of a family that supports it."""
        if self.moves is not None:
            return self.moves
        return MOVES if self.scoring.fisher and self.refits and not self.balance else ("blocks",)

    @property
    def rotates(self) -> bool:
        """Whether features of heads mix before anything is chosen."""
        return self.permutes and ("heads" in self.allowed_moves if self.rotate is None else self.rotate)

    @property
    def permutes_stream(self) -> bool:
        """Whether the residual stream's features are among what changes places."""
        return self.permutes and self.permute_stream is not False

    def replace(self, **changes: object) -> "BlockPruneConfig":
        """A copy with some settings changed, checked again."""
        _check_keys(type(self), changes, "config")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "BlockPruneConfig":
        """Build from plain values, such as a file's; unknown keys are refused."""
        _check_keys(cls, values, "config")
        return cls(**with_todays_budgets(values, saved="format_version" in values))

    def to_dict(self) -> JsonDict:
        """Plain values that JSON and YAML can write; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_file(cls, path: str | Path) -> "BlockPruneConfig":
        """Read a .yaml, .yml or .json file."""
        return cls.from_dict(read_settings(path))

    def save(self, path: str | Path) -> None:
        """Write JSON for a `.json` name and YAML for any other."""
        path = Path(path)
        values = self.to_dict()
        text = (
            json.dumps(values, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(values, sort_keys=False)
        )
        with partial_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
