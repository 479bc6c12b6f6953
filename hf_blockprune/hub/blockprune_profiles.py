"""Devices as a few numbers each: processors, GPUs and systolic arrays, and what work costs on them."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypedDict, get_args, get_origin

from .blockprune_cost import ELEMENT_BYTES, PJ_PER_BYTE_DRAM, PJ_PER_MAC, PJ_TO_MJ, Cost, Linear, Profile
from .blockprune_devices import DEVICES
from .blockprune_systolic import Fold, block_sparse_cycles, dense_cycles, makespan

if TYPE_CHECKING:
    from .blockprune_config import JsonDict


class DeviceError(ValueError):
    """A device that is not known, or one that was asked for what it does not do."""


@dataclass(frozen=True)
class CpuProfile:
    """A processor.

    Args:
        name: in reports.
        cores, ghz, flops_per_cycle: of single-precision vector units; their product is the peak.
        dense_efficiency: share of the peak that a dense product reaches.
        sparse_efficiency_32, sparse_efficiency_16: the same for blocks of a multiple of 32 rows, and of others.
        dense_call_us, sparse_call_us: of a call, whatever its size.
        input_gb_s, output_gb_s, weight_gb_s: rates at which a sparse product takes in x and weights and gives out y.
        dram_gb_s: of elementwise operations.
        idle_w, pj_per_mac, pj_per_byte: energy.
        held_out_error: mean absolute relative error of latencies that the profile was not fitted to, None where it
            was not fitted.
        source: where the numbers come from.
    """

    kind: ClassVar[str] = "cpu"
    name: str
    cores: int
    ghz: float
    flops_per_cycle: float
    dense_efficiency: float = 0.8
    sparse_efficiency_32: float = 0.8
    sparse_efficiency_16: float = 0.75
    dense_call_us: float = 5.0
    sparse_call_us: float = 25.0
    input_gb_s: float = 8.0
    output_gb_s: float = 12.0
    weight_gb_s: float = 20.0
    dram_gb_s: float = 20.0
    idle_w: float = 0.0
    pj_per_mac: float = 1.69
    pj_per_byte: float = 1300 / 64
    held_out_error: float | None = None
    source: str = ""

    def dense(self, work: Linear) -> Cost:
        """See `Profile`."""
        work = work._replace(mask=None)
        latency = self.dense_call_us / 1e3 + 1e3 * work.flops / self._peak(self.dense_efficiency)
        return self._cost(work, max(latency, self._memory_ms(work.weight_bytes)))

    def sparse(self, work: Linear) -> Cost:
        """See `Profile`."""
        element = ELEMENT_BYTES[work.dtype]
        rate = self._peak(self.sparse_efficiency_32 if work.block_shape[0] % 32 == 0 else self.sparse_efficiency_16)
        latency = (
            self.sparse_call_us / 1e3
            + 1e3 * work.flops / rate
            + work.tokens * work.in_features * element / self.input_gb_s / 1e6
            + work.tokens * work.out_features * element / self.output_gb_s / 1e6
            + work.weight_bytes / self.weight_gb_s / 1e6
        )
        return self._cost(work, latency)

    def elementwise(self, size_bytes: float) -> Cost:
        """See `Profile`."""
        latency = self.dense_call_us / 1e3 + self._memory_ms(size_bytes)
        return Cost(0.0, size_bytes, latency, self.idle_w * latency + size_bytes * self.pj_per_byte * PJ_TO_MJ)

    def batched(self, work: Linear, times: int) -> Cost:
        """See `Profile`."""
        return self.dense(work._replace(tokens=times * work.tokens))

    def _peak(self, efficiency: float) -> float:
        return self.cores * self.ghz * 1e9 * self.flops_per_cycle * efficiency

    def _memory_ms(self, size_bytes: float) -> float:
        return size_bytes / self.dram_gb_s / 1e6

    def _cost(self, work: Linear, latency_ms: float) -> Cost:
        energy = work.flops / 2 * self.pj_per_mac + work.size_bytes * self.pj_per_byte
        return Cost(work.flops, work.size_bytes, latency_ms, self.idle_w * latency_ms + energy * PJ_TO_MJ)


@lru_cache(maxsize=4096)
def _scheduled(row_inputs: tuple[int, ...], times: int, workers: int) -> int:
    """Inputs of the worker that has most of them, each row being scheduled so many times, the longest first."""
    return makespan([Fold(0, inputs, 0) for inputs in row_inputs for _ in range(times)], arrays=workers) + 1


@dataclass(frozen=True)
class GpuProfile:
    """A GPU: tiles scheduled over multiprocessors, bound by tensor cores, by L2 or by device memory.

    Args:
        name: in reports.
        sms: multiprocessors.
        tflops: peak by dtype, without sparsity.
        dram_gb_s, l2_gb_s, l2_mb: memory.
        power_limit_w, idle_w: power.
        dense_efficiency, sparse_efficiency, memory_efficiency: shares of peaks that are reached.
        launch_us: of a kernel.
        tile_tokens, tile_outputs: of a dense product's tile; a sparse one's has as many outputs as a block.
        pj_per_mac, pj_per_l2_byte, pj_per_dram_byte: energy on top of idling.
        held_out_error: as for `CpuProfile`.
        source: where the numbers come from.
    """

    kind: ClassVar[str] = "gpu"
    name: str
    sms: int
    tflops: Mapping[str, float]
    dram_gb_s: float
    l2_gb_s: float
    l2_mb: float
    power_limit_w: float
    idle_w: float
    dense_efficiency: float = 0.7
    sparse_efficiency: float = 0.6
    memory_efficiency: float = 0.85
    launch_us: float = 5.0
    tile_tokens: int = 128
    tile_outputs: int = 128
    pj_per_mac: float = PJ_PER_MAC
    pj_per_l2_byte: float = 14 / 8
    pj_per_dram_byte: float = PJ_PER_BYTE_DRAM
    held_out_error: float | None = None
    source: str = ""

    def dense(self, work: Linear) -> Cost:
        """See `Profile`."""
        work = work._replace(mask=None)
        down, across = -(-work.tokens // self.tile_tokens), -(-work.out_features // self.tile_outputs)
        waves = -(-down * across // self.sms)
        tile = self._tile_ms(work, work.in_features, self.tile_outputs, self.dense_efficiency)
        element = ELEMENT_BYTES[work.dtype]
        read = element * work.in_features * down * across * (self.tile_tokens + self.tile_outputs)
        return self._cost(work, waves * tile, read)

    def sparse(self, work: Linear) -> Cost:
        """See `Profile`."""
        down, rows = -(-work.tokens // self.tile_tokens), work.block_shape[0]
        longest = _scheduled(tuple(work.row_inputs.tolist()), down, self.sms)
        read = ELEMENT_BYTES[work.dtype] * down * float(work.row_inputs.sum()) * (self.tile_tokens + rows)
        return self._cost(work, self._tile_ms(work, longest, rows, self.sparse_efficiency), read)

    def elementwise(self, size_bytes: float) -> Cost:
        """See `Profile`."""
        latency = self.launch_us / 1e3 + size_bytes / (self.memory_efficiency * self.dram_gb_s) / 1e6
        energy = self.idle_w * latency + size_bytes * self.pj_per_dram_byte * PJ_TO_MJ
        return Cost(0.0, size_bytes, latency, min(energy, self.power_limit_w * latency))

    def batched(self, work: Linear, times: int) -> Cost:
        """See `Profile`."""
        return self.dense(work._replace(tokens=times * work.tokens))

    def _tile_ms(self, work: Linear, inputs: float, outputs: int, efficiency: float) -> float:
        if work.dtype not in self.tflops:
            raise DeviceError(f"{self.name}: no peak for {work.dtype}; its profile has {', '.join(self.tflops)}")
        rate = self.tflops[work.dtype] * 1e12 * efficiency / self.sms
        return 1e3 * 2 * self.tile_tokens * outputs * float(inputs) / rate

    def _cost(self, work: Linear, busy_ms: float, l2_bytes: float) -> Cost:
        in_memory = work.size_bytes / (self.memory_efficiency * self.dram_gb_s) / 1e6
        in_cache = l2_bytes / (self.memory_efficiency * self.l2_gb_s) / 1e6
        latency = self.launch_us / 1e3 + max(busy_ms, in_memory, in_cache)
        picojoules = work.flops / 2 * self.pj_per_mac + l2_bytes * self.pj_per_l2_byte
        energy = self.idle_w * latency + (picojoules + work.size_bytes * self.pj_per_dram_byte) * PJ_TO_MJ
        return Cost(work.flops, work.size_bytes, latency, min(energy, self.power_limit_w * latency))


class ArraySettings(TypedDict):
    """What `blockprune_systolic` wants to know of arrays; see there."""

    rows: int
    cols: int
    dataflow: str
    overlap: bool
    arrays: int


@dataclass(frozen=True)
class SystolicProfile:
    """A systolic array (see `blockprune_systolic`) with memory beside it.

    Args:
        name: in reports.
        rows, cols, arrays, dataflow, overlap: of the arrays.
        ghz: clock.
        element_bytes: of a number in it.
        dram_gb_s: main memory, which works beside the arrays.
        static_w: power at rest.
        pj_per_mac, pj_per_sram_byte, pj_per_dram_byte: energy.
        source: where the numbers come from.
    """

    kind: ClassVar[str] = "systolic"
    name: str
    rows: int
    cols: int
    ghz: float
    dram_gb_s: float
    dataflow: str = "os"
    overlap: bool = True
    arrays: int = 1
    element_bytes: int = 2
    static_w: float = 0.0
    pj_per_mac: float = PJ_PER_MAC
    pj_per_sram_byte: float = 8.5 / 8
    pj_per_dram_byte: float = PJ_PER_BYTE_DRAM
    held_out_error: float | None = None
    source: str = ""

    def dense(self, work: Linear) -> Cost:
        """See `Profile`."""
        work = work._replace(mask=None)
        return self._cost(work, dense_cycles(work.tokens, work.in_features, work.out_features, **self.array))

    def sparse(self, work: Linear) -> Cost:
        """See `Profile`."""
        assert work.mask is not None
        shape = work.out_features, work.in_features
        cycles = block_sparse_cycles(work.tokens, work.mask, block_shape=work.block_shape, shape=shape, **self.array)
        return self._cost(work, cycles)

    def elementwise(self, size_bytes: float) -> Cost:
        """Beside the arrays, which do not wait for it."""
        return Cost(0.0, size_bytes, 0.0, size_bytes * self.pj_per_sram_byte * PJ_TO_MJ)

    def batched(self, work: Linear, times: int) -> Cost:
        """See `Profile`."""
        return self.dense(work).times(times)

    @property
    def array(self) -> ArraySettings:
        """What `blockprune_systolic` wants to know of the arrays."""
        return {
            "rows": self.rows,
            "cols": self.cols,
            "dataflow": self.dataflow,
            "overlap": self.overlap,
            "arrays": self.arrays,
        }

    def _cost(self, work: Linear, cycles: int) -> Cost:
        macs = work.tokens * work.weights
        size_bytes = work.size_bytes * self.element_bytes / ELEMENT_BYTES[work.dtype]
        latency = max((cycles + 1) / (self.ghz * 1e6), size_bytes / self.dram_gb_s / 1e6)
        sram_bytes = self.element_bytes * macs * (1 / self.rows + 1 / self.cols)  # each operand once for a whole tile
        picojoules = macs * self.pj_per_mac + sram_bytes * self.pj_per_sram_byte + size_bytes * self.pj_per_dram_byte
        return Cost(work.flops, size_bytes, latency, self.static_w * latency + picojoules * PJ_TO_MJ)


DeviceProfile: TypeAlias = CpuProfile | GpuProfile | SystolicProfile
KINDS: dict[str, type[DeviceProfile]] = {cls.kind: cls for cls in (CpuProfile, GpuProfile, SystolicProfile)}


def named_profile(name: str) -> DeviceProfile:
    """The profile of a device that comes with this code.

    Raises:
        DeviceError: there is none of that name; the message has those that there are.

    Example:
        >>> named_profile("systolic-32").rows
        32
    """
    if name not in DEVICES:
        raise DeviceError(f"device: no profile {name!r}; name one of {', '.join(sorted(DEVICES))}")
    return profile_from_dict(DEVICES[name], name)


def usual_dtype(profile: Profile) -> str:
    """What models are run in on such a device."""
    return "float32" if profile.kind == "cpu" else "float16"


def profile_from_dict(values: Mapping[str, object], where: str = "profile") -> DeviceProfile:
    """A profile from plain values, `kind` among them.

    Raises:
        ValueError: naming the key that is unknown, missing or has no sensible value.

    Example:
        >>> profile_from_dict({"kind": "cpu", "name": "mine", "cores": 2, "ghz": 3.0, "flops_per_cycle": 32}).cores
        2
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
    settings: JsonDict = dict(values)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{where}.kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    known = {field.name: field for field in fields(KINDS[kind])}
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r} for a {kind}; known keys are {', '.join(known)}")
        _check_value(f"{where}.{key}", value, known[key].type)
    missing = [key for key, field in known.items() if field.default is MISSING and key not in settings]
    if missing:
        raise ValueError(f"{where}: a {kind} needs {', '.join(missing)} too")
    return KINDS[kind](**settings)


def _check_value(where: str, value: object, kind: object) -> None:
    if kind is str:
        right, expected = isinstance(value, str), "a text"
    elif kind is bool:
        right, expected = isinstance(value, bool), "true or false"
    elif get_origin(kind) is Mapping:
        right = isinstance(value, Mapping) and all(_positive(v) for v in value.values())
        expected = "numbers above 0 by dtype"
    elif kind is int:
        right, expected = isinstance(value, int) and _positive(value), "a whole number from 1"
    else:
        optional = type(None) in get_args(kind) and value is None
        may_be_zero = where.rpartition(".")[2] in ("idle_w", "static_w", "held_out_error", "pj_per_mac")
        right = optional or _positive(value) or (may_be_zero and value == 0)
        expected = "a number above 0"
    if not right:
        raise ValueError(f"{where}: expected {expected}, got {value!r}")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
