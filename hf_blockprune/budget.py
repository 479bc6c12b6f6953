"""`Budget`: what may remain after pruning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .checks import check_whole as _check_whole
from .checks import is_number as _is_number
from .checks import refuse as _refuse
from .errors import ConfigError
from .settings_file import OLD_DENSITY

BUDGET_METRICS = ("flops", "params", "density", "latency", "energy")
DEVICE_METRICS = {"latency": "ms", "energy": "mJ"}  # and the units of their absolute values
# With blocks of the default shape that leaves DeiT-Ti worth keeping (docs/prune.md).
DEFAULT_RATIO = 0.8


@dataclass(frozen=True)
class Budget:
    """What may remain after pruning.

    Args:
        metric: "flops" (of the whole model: patch embedding, attention products and head counted), "params" (weights
            of the whole model), "density" (blocks of the target layers alone), "latency" or "energy" (of the
            whole model on a device, by the hardware model).
        ratio: share kept, in (0, 1]; 0.8 keeps four fifths, and is the default where there is no value.
        value: an absolute amount instead: FLOPs of an image, weights, milliseconds or millijoules of a batch.
        device: the profile for latency and energy: its name or a YAML file.
        batch: images that latency and energy are of.

    Example:
        >>> Budget("latency", 0.6, device="cpu-avx512").ratio
        0.6
    """

    metric: Literal["flops", "params", "density", "latency", "energy"] = "flops"
    ratio: float | None = None
    value: float | None = None
    device: str | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if self.metric == OLD_DENSITY:
            raise ConfigError(
                "budget.metric: sparsity is what is removed, and a budget says what is kept; to remove 90 % of the "
                "blocks write density=0.1, to keep 90 % density=0.9"
            )
        if self.metric not in BUDGET_METRICS:
            _refuse("budget.metric", f"one of {', '.join(BUDGET_METRICS)}", self.metric)
        if self.ratio is None and self.value is None:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        if self.ratio is not None and (not _is_number(self.ratio) or not 0 < self.ratio <= 1):
            _refuse("budget.ratio", "the share to keep, above 0 and at most 1 (0.5 keeps half)", self.ratio)
        if self.value is not None and (not _is_number(self.value) or self.value <= 0):
            _refuse("budget.value", "an amount above 0", self.value)
        if self.ratio is not None and self.value is not None:
            raise ConfigError("budget: ratio and value both say how much may remain; leave one of them out")
        if self.metric == "density" and self.value is not None:
            raise ConfigError("budget: density has no absolute value; give a ratio")
        on_device = self.metric in DEVICE_METRICS
        if on_device and (not isinstance(self.device, str) or not self.device):
            _refuse("budget.device", f"a device profile for {self.metric}, such as cpu-avx512", self.device)
        if not on_device and self.device is not None:
            raise ConfigError(f"budget.device: {self.metric} is the same on every device; leave it out")
        _check_whole("budget.batch", self.batch, 1)

    @property
    def counts_tokens(self) -> bool:
        """Whether fewer tokens save of it."""
        return self.metric not in ("params", "density")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read the command line's form.

        Example:
            >>> Budget.parse("flops=0.75").ratio
            0.75
            >>> Budget.parse("latency=8ms@cpu-avx512").value
            8.0
        """
        metric, _, rest = text.partition("=")
        metric, (amount, _, device) = metric.strip(), rest.partition("@")
        unit = DEVICE_METRICS.get(metric)
        absolute = unit is not None and amount.strip().endswith(unit)
        try:
            number = float(amount.strip().removesuffix(unit) if absolute and unit else amount)
        except ValueError:
            raise ConfigError(
                "budget: expected METRIC=RATIO such as flops=0.75, latency=0.6@cpu-avx512 or "
                f"latency=8ms@my-device.yaml, got {text!r}"
            ) from None
        key = "value" if absolute else "ratio"
        return cls(metric, **{key: number}, device=device.strip() or None)  # type: ignore[arg-type]


def budget_text(budget: Mapping[str, object]) -> str:
    """A budget's values, those of `Budget` by name, as the command line writes them."""
    unit = DEVICE_METRICS.get(str(budget["metric"]))
    amount = f"{budget['ratio']:g}" if budget["value"] is None else f"{budget['value']:g}{unit}"
    return f"{budget['metric']}={amount}" + (f"@{budget['device']}" if budget["device"] else "")
