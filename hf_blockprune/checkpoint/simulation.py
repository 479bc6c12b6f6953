"""What a pruned checkpoint takes on a device, layer by layer, beside the dense model."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..cost.device_cost import usual_dtype
from ..cost.flops import ModelFlops
from ..cost.profiles import load_profile
from ..cost.shapes import transformer_shape
from ..cost.systolic import Array, analyse, dense_cycles
from ..errors import ConfigError, ModelError
from ..hub.blockprune_cost import Cost, Linear, Profile, layer_cost, other_cost
from ..hub.blockprune_flops import UncountableError
from ..hub.blockprune_model_cost import hardware_cost, linear_works
from ..hub.blockprune_profiles import ArraySettings, DeviceError, SystolicProfile
from ..hub.blockprune_systolic import weights_kept
from ..types import JsonDict
from .fetching import checkpoint_folder
from .inspection import StoredLayer, StoredModel, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What cards tell of, with the images of a pass.
CARD_DEVICES = {"cpu-avx512": 1, "h100-sxm": 64, "systolic-32": 1}
CARD_VALUES = ("device", "batch", "dtype", "latency_ms", "dense_latency_ms", "speedup", "energy_ratio")


@dataclass(frozen=True)
class Cycles:
    """What a layer takes of a systolic array.

    Attributes:
        cycles: until its last sum.
        utilisation: share of all elements' cycles in which they multiply.
        macs: multiplications, those with zeros inside of kept tiles included.
        dense_cycles: of the dense layer.
    """

    cycles: int
    utilisation: float
    macs: int
    dense_cycles: int


@dataclass(frozen=True)
class LayerSimulation:
    """What a pruned Linear takes on a device.

    Attributes:
        name: as stored.
        tokens, dense_tokens: rows that it multiplies, of all images, and those where no tokens merge.
        density: kept share of its blocks.
        pruned, dense: its cost, and that of the dense layer.
        cycles: None on a device that is no systolic array.
    """

    name: str
    tokens: int
    dense_tokens: int
    density: float
    pruned: Cost
    dense: Cost
    cycles: Cycles | None

    def to_dict(self) -> JsonDict:
        """JSON-ready values, those of the dense layer under keys that begin with `dense_`."""
        values: JsonDict = {"name": self.name, "tokens": self.tokens, "density": self.density}
        if self.dense_tokens != self.tokens:
            values["dense_tokens"] = self.dense_tokens
        dense = {f"dense_{key}": value for key, value in self.dense._asdict().items()}
        cycles = {} if self.cycles is None else asdict(self.cycles)
        return {**values, **self.pruned._asdict(), **dense, **cycles}


@dataclass(frozen=True)
class Simulation:
    """What a pruned model takes on a device.

    Attributes:
        device: its profile.
        batch: images.
        dtype: of all numbers.
        layers: the pruned Linears.
        rest: cost of all other parts, Linears that were not pruned among them.
        dense_rest: the same of the dense model, whose attentions have all their heads.
    """

    device: Profile
    batch: int
    dtype: str
    layers: list[LayerSimulation]
    rest: Cost
    dense_rest: Cost

    @cached_property
    def pruned(self) -> Cost:
        """Of the pruned Linears together."""
        return _sum(layer.pruned for layer in self.layers)

    @cached_property
    def dense(self) -> Cost:
        """Of the same Linears when they were dense."""
        return _sum(layer.dense for layer in self.layers)

    def to_dict(self) -> JsonDict:
        """What `simulate_checkpoint` gives."""
        made = {"device": self.device.name, "kind": self.device.kind, "batch": self.batch, "dtype": self.dtype}
        made |= self._totals()
        if isinstance(self.device, SystolicProfile):
            made |= self._cycle_totals(self.device)
        return {**made, "layers": [layer.to_dict() for layer in self.layers]}

    def _totals(self) -> JsonDict:
        pruned, dense = self.pruned.plus(self.rest), self.dense.plus(self.dense_rest)
        values: JsonDict = {}
        for key in ("latency_ms", "energy_mj", "flops", "size_bytes"):
            values[key], values[f"dense_{key}"] = getattr(pruned, key), getattr(dense, key)
        values["speedup"] = dense.latency_ms / pruned.latency_ms
        values["energy_ratio"] = dense.energy_mj / pruned.energy_mj
        values["linear_speedup"] = _times_less(self.dense.latency_ms, self.pruned.latency_ms)
        values["other_parts"], values["dense_other_parts"] = self.rest._asdict(), self.dense_rest._asdict()
        return values

    def _cycle_totals(self, profile: SystolicProfile) -> JsonDict:
        """Cycles of the whole model: layers one after the other, and what other parts take at the array's clock."""
        found = [layer.cycles for layer in self.layers if layer.cycles is not None]
        other, dense_other = (round(cost.latency_ms * profile.ghz * 1e6) for cost in (self.rest, self.dense_rest))
        cycles, dense = sum(each.cycles + 1 for each in found), sum(each.dense_cycles + 1 for each in found)
        elements = profile.rows * profile.cols * profile.arrays
        macs = sum(each.macs for each in found)
        return {
            "array": asdict(Array(**profile.array)),
            "cycles": cycles + other,
            "dense_cycles": dense + dense_other,
            "other_cycles": other,
            "utilisation": macs / (elements * cycles) if cycles else 0.0,
            "cycle_speedup": (dense + dense_other) / (cycles + other),
            "linear_cycle_speedup": _times_less(dense, cycles),
        }


def _sum(costs: Iterable[Cost]) -> Cost:
    return Cost(*(sum(values) for values in zip(*costs, strict=True)))


def _times_less(dense: float, pruned: float) -> float:
    return dense / pruned if pruned else float("inf")


def simulate_checkpoint(
    source: str | Path,
    device: str | Path,
    *,
    dataflow: str | None = None,
    overlap: bool | None = None,
    arrays: int | None = None,
    batch: int = 1,
    dtype: str | None = None,
    revision: str | None = None,
) -> JsonDict:
    """Latency and energy of a pruned checkpoint on a device; cycles and utilisation too on a systolic array.

    Args:
        source: a block-sparse checkpoint: a folder, or a name on the Hub.
        device: a profile's name or file.
        dataflow, overlap, arrays: of a systolic array, instead of the profile's.
        batch: images.
        dtype: of all numbers; by default "float16" on GPUs and arrays and "float32" on CPUs.
        revision: branch, tag or commit on the Hub.

    Returns:
        JSON-ready totals of the whole model and of the pruned Linears, pruned and dense, and the `layers`, see
        `LayerSimulation`: times in ms, energies in mJ, sizes in bytes.

    Raises:
        CheckpointError: no block-sparse checkpoint.
        ConfigError: no such profile, or one that has no dataflow; a revision of a folder.
        ModelError: a model that is no plain vision transformer.
    """
    profile = _profile(device, dataflow=dataflow, overlap=overlap, arrays=arrays)
    stored = open_checkpoint(checkpoint_folder(source, revision))
    return simulate_stored(stored, profile, batch, dtype).to_dict()


def simulate_stored(stored: StoredModel, profile: Profile, batch: int = 1, dtype: str | None = None) -> Simulation:
    """What a checkpoint that was opened takes; arguments are those of `simulate_checkpoint`.

    Raises:
        ModelError: a model that is no plain vision transformer.
    """
    dtype = dtype or usual_dtype(profile)
    layers = [_layer(profile, layer, stored.flops, batch, dtype) for layer in stored.layers]
    rests = [_rest(stored, profile, batch, dtype, dense=dense) for dense in (False, True)]
    return Simulation(profile, batch, dtype, layers, *rests)


def _rest(stored: StoredModel, profile: Profile, batch: int, dtype: str, *, dense: bool) -> Cost:
    """Of all that is no pruned Linear: in the checkpoint, or in the dense model."""
    flops = stored.flops.dense if dense else stored.flops
    heads, model = ((), None) if dense else (stored.heads, stored.architecture)
    first = stored.layers[0].module if stored.layers else next(iter(flops.linear_tokens))
    tokens = stored.flops.dense.linear_tokens[first]
    shape = transformer_shape(stored.architecture.config, flops.image_size, tokens, heads, model)
    rest = other_cost(profile, shape, batch=batch, dtype=dtype)
    pruned = {layer.module for layer in stored.layers}
    for name, work in linear_works(stored.architecture, flops.linear_tokens).items():
        if name not in pruned:
            rest = rest.plus(layer_cost(profile, work._replace(tokens=batch * work.tokens, dtype=dtype)))
    return rest


def load_devices(devices: Mapping[str, int] | Mapping[str | Path, int]) -> list[tuple[Profile, int]]:
    """(profile, images of a pass) of devices by name or file.

    Raises:
        ConfigError: no such profile.
    """
    return [(load_profile(device), batch) for device, batch in devices.items()]


def predictions(stored: StoredModel, devices: Iterable[tuple[Profile, int]], keys: Iterable[str]) -> list[JsonDict]:
    """Some of what `simulate_checkpoint` says of a checkpoint on several devices, each in its usual dtype.

    Args:
        stored: the checkpoint.
        devices: what `load_devices` gives.
        keys: of the values that are wanted.

    Raises:
        ModelError: the cost of such a model is not known.
    """
    keys = tuple(keys)
    found = [simulate_stored(stored, profile, batch).to_dict() for profile, batch in devices]
    return [{key: values[key] for key in keys} for values in found]


def predict_checkpoint(stored: StoredModel) -> list[JsonDict]:
    """What a checkpoint should take, beside the dense model, on a few devices; nothing where its cost is not known.

    Returns:
        JSON-ready `CARD_VALUES` of each, as cards tell of them.
    """
    devices = load_devices(CARD_DEVICES)
    try:
        return predictions(stored, devices, CARD_VALUES)
    except ModelError:
        return []


def predict(
    model: "PreTrainedModel",
    device: Profile | str | Path,
    *,
    batch: int = 1,
    dtype: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> Cost:
    """What a forward pass of a loaded model takes on a device: `model.hardware_cost()`, also for files of one's own.

    Args:
        model: a classifier of ViT's form, dense or with block-sparse layers.
        device: a profile, its name or its file.
        batch: images.
        dtype: of all numbers, as for `simulate_checkpoint`.
        image_size: (height, width) of an image; the config's by default.

    Raises:
        ConfigError: no such profile, or one without this dtype.
        ModelError: a model that is no plain vision transformer.
    """
    profile = load_profile(device) if isinstance(device, (str, Path)) else device
    try:
        return hardware_cost(model, profile, batch=batch, dtype=dtype, image_size=image_size)
    except UncountableError as error:
        raise ModelError(str(error)) from None
    except DeviceError as error:
        raise ConfigError(str(error)) from None


def _profile(device: str | Path, **changes: str | bool | int | None) -> Profile:
    """A profile, with what was given of a systolic array instead of its own."""
    profile = load_profile(device)
    wanted = {key: value for key, value in changes.items() if value is not None}
    if not wanted:
        return profile
    if (array := _array(profile)) is None:
        raise ConfigError(f"{profile.name}: {', '.join(wanted)} belong to systolic arrays; name one, or leave them out")
    try:
        Array(**{**array, **wanted})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return replace(profile, **wanted)


def _array(profile: Profile) -> ArraySettings | None:
    """What `Array` takes; None of another device."""
    return profile.array if isinstance(profile, SystolicProfile) else None


def _layer(profile: Profile, layer: StoredLayer, flops: ModelFlops, batch: int, dtype: str) -> LayerSimulation:
    """A layer pruned and dense; cut rows and columns make the pruned one smaller, and merged tokens its inputs."""
    tokens, dense_tokens = (batch * round(f.linear_tokens[layer.module]) for f in (flops, flops.dense))
    outputs, inputs = layer.values["stored_shape"]
    rows, cols = layer.values["block_shape"]
    mask = layer.mask.numpy()
    work = Linear(tokens, outputs, inputs, dtype, mask, (rows, cols))
    dense = Linear(dense_tokens, layer.values["shape"][0], layer.values["shape"][1], dtype)
    cycles = None
    if isinstance(profile, SystolicProfile):
        run = analyse(tokens, weights_kept(mask, work.block_shape, (outputs, inputs)), Array(**profile.array))
        whole = dense_cycles(dense_tokens, dense.in_features, dense.out_features, **profile.array)
        cycles = Cycles(run.cycles, run.utilisation, run.macs, whole)
    density = layer.values["density"]
    return LayerSimulation(
        layer.name, tokens, dense_tokens, density, layer_cost(profile, work), profile.dense(dense), cycles
    )
