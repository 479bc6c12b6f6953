"""The methods that score blocks: what each needs, what holds by default with it, and its removal traces.

All else asks a method here for what it is like, and never for its name, so a new one is an entry of this module.
The command line reads names and defaults while it starts: torch comes with the traces, when they are taken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

    from .statistics import LayerStatistics
    from .trace import RemovalTrace

MethodName = Literal["magnitude", "taylor", "obs"]  # from the simplest to the best
METHODS: tuple[MethodName, ...] = get_args(MethodName)


@dataclass(frozen=True)
class TraceSettings:
    """How traces are taken, by those methods that it matters to.

    Args:
        damping: added to the diagonal of the inputs' covariance, relative to each entry.
        memory_bytes: bound on a trace's working memory.
    """

    damping: float = 1e-2
    memory_bytes: int = 1 << 30


@dataclass(frozen=True)
class Method:
    """What a method is like.

    Attributes:
        name: as settings write it.
        trace: a layer's removal trace from its weight [out_features, in_features], its statistics, the block shape
            (rows, cols) and settings.

            Raises ValueError where statistics that it needs are missing, and torch.linalg.LinAlgError where they cannot
            be worked with.
        gradients: whether it needs statistics of the loss's gradients, which need a classifier and use labels.
        fisher: whether it needs Fisher statistics, which know how inputs vary and how much outputs matter. Features
            can then change places, neighbours' losses be told apart, and predictions be compared with true losses.
        loss: whether its scores are a loss that power can be weighed against.
        queue_per_block_row: whether its traces have a queue for each block row, which balanced rows need.
        refits: whether surviving weights are solved for by default.
        permutes: whether features change places by default.
        in_features_power: a trace takes time in proportion to out_features and to this power of in_features.
    """

    name: MethodName
    trace: "Callable[[Tensor, LayerStatistics | None, tuple[int, int], TraceSettings], RemovalTrace]"
    gradients: bool = False
    fisher: bool = False
    loss: bool = True
    queue_per_block_row: bool = False
    refits: bool = False
    permutes: bool = False
    in_features_power: int = 1

    @property
    def needs_images(self) -> bool:
        """Whether it learns anything from images."""
        return self.gradients or self.fisher


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}")
    return _METHODS[name]


def names_where(trait: Callable[[Method], bool]) -> list[str]:
    """Names of the methods that have a trait.

    Example:
        >>> names_where(lambda method: method.loss)
        ['taylor', 'obs']
    """
    return [name for name in METHODS if trait(_METHODS[name])]


def quoted(names: list[str]) -> str:
    """Names as error texts have them.

    Example:
        >>> quoted(["taylor", "obs"])
        "'taylor' or 'obs'"
    """
    return " or ".join(map(repr, names))


def _magnitude(
    weight: "Tensor", statistics: "LayerStatistics | None", block_shape: tuple[int, int], settings: TraceSettings
) -> "RemovalTrace":
    from .magnitude import magnitude_trace

    return magnitude_trace(weight, block_shape)


def _taylor(
    weight: "Tensor", statistics: "LayerStatistics | None", block_shape: tuple[int, int], settings: TraceSettings
) -> "RemovalTrace":
    from .taylor import taylor_trace

    s = statistics
    if s is None or s.gradient is None or s.block_gradients is None:
        raise ValueError("method 'taylor' needs gradient statistics; collect them with gradients=True")
    return taylor_trace(weight, s.gradient, s.block_gradients, block_shape)


def _obs(
    weight: "Tensor", statistics: "LayerStatistics | None", block_shape: tuple[int, int], settings: TraceSettings
) -> "RemovalTrace":
    """In units of the loss of one image: half the Fisher quadratic, summed over the image's tokens."""
    from .obs import obs_trace

    s = statistics
    if s is None or s.mean is None or s.second_moment is None or s.output_weight is None:
        raise ValueError("method 'obs' needs Fisher statistics; collect them with fisher=True")
    importance = s.output_weight * (0.5 * s.num_tokens / s.num_images)
    options = {"damping": settings.damping, "memory_bytes": settings.memory_bytes}
    return obs_trace(weight, s.safe_covariance, importance, block_shape, **options)


_METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude", _magnitude, loss=False),
    "taylor": Method("taylor", _taylor, gradients=True),
    # The others are published without a refit.
    "obs": Method("obs", _obs, fisher=True, queue_per_block_row=True, refits=True, permutes=True, in_features_power=2),
}
