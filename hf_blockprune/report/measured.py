"""What was measured of a pruned model, as its report holds it.

Keys that only some versions, tasks or comparisons have are None where there is nothing, see `Part.absent`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .parts import Part


@dataclass(kw_only=True)
class Measurement(Part):
    """One measurement, with where and when it was made.

    Attributes:
        dataset, split: of the images.
        batch_size: images in one pass.
        against: name of the dense model that it compares with, None where it has none or does not compare.
        measured_at: date and time in UTC, in ISO format.
        device, dtype: the processor, and the kind of numbers of the weights.
        environment: see `runs.environment.environment`.
    """

    dataset: str | None = None
    split: str | None = None
    batch_size: int | None = None
    against: str | None = None
    measured_at: str | None = None
    device: str | None = None
    dtype: str | None = None
    environment: Mapping[str, object] | None = None

    @property
    def threads(self) -> object:
        """How many of the CPU were used, None where nobody said; of a file, which may say anything."""
        return (self.environment or {}).get("threads")

    @property
    def compares(self) -> bool:
        """Whether it says by how much a score changed."""
        return False


@dataclass(kw_only=True)
class MeasuredScores(Measurement):
    """What an evaluation found; the scores are those of the model's task, see `Evaluation` and the other tasks'."""

    num_images: int | None = None
    skipped: list[str] | None = None
    left_out: list[str] | None = None
    top1: float | None = None
    top5: float | None = None
    mean_average_precision: float | None = None
    f1: float | None = None
    r2: float | None = None
    mean_squared_error: float | None = None
    baseline_top1: float | None = None
    baseline_mean_average_precision: float | None = None
    baseline_r2: float | None = None
    delta: float | None = None
    interval: list[float] | None = None
    flipped_to_wrong: int | None = None
    flipped_to_right: int | None = None

    @property
    def compares(self) -> bool:
        return self.delta is not None


@dataclass(kw_only=True)
class MeasuredFidelity(Measurement):
    """How close embeddings are to the dense model's, see `Fidelity`."""

    num_images: int | None = None
    skipped: list[str] | None = None
    cosine: float | None = None
    least_cosine: float | None = None
    relative_squared_error: float | None = None


@dataclass(kw_only=True)
class LatencyRow(Part):
    """Latencies in ms and images a second at one batch size, see `measure_latency`."""

    batch: int
    dense_latency_ms: float | None = None
    latency_ms: float | None = None
    dense_throughput_img_s: float | None = None
    throughput_img_s: float | None = None
    speedup: float | None = None
    speedup_quartiles: list[float] | None = None


@dataclass(kw_only=True)
class MeasuredLatency(Measurement):
    """How fast the model runs beside the dense one; `backends` counts layers by what multiplies with them."""

    backends: dict[str, int] | None = None
    rows: list[LatencyRow] = field(default_factory=list)


@dataclass(kw_only=True)
class History(Part):
    """Measurements of other data sets and machines than the newest, by kind, newest first."""

    absent: frozenset[str] = frozenset({"evaluation", "fidelity", "latency"})
    evaluation: list[MeasuredScores] | None = None
    fidelity: list[MeasuredFidelity] | None = None
    latency: list[MeasuredLatency] | None = None


@dataclass(kw_only=True)
class Measurements(Part):
    """All measurements in a report, the newest of each kind under its own key.

    Attributes:
        weights_sha256: fingerprint of the stored weights that they are of, None where an older version did not say.
    """

    absent: frozenset[str] = frozenset({"history", "weights_sha256"})
    evaluation: MeasuredScores | None = None
    fidelity: MeasuredFidelity | None = None
    latency: MeasuredLatency | None = None
    history: History | None = None
    weights_sha256: str | None = None
