"""What a pruned checkpoint takes on a device, layer by layer, beside the dense model."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..cost.device_cost import usual_dtype
from ..cost.profiles import load_profile
from ..cost.shapes import transformer_shape
from ..cost.systolic import Array, analyse, dense_cycles
from ..errors import ConfigError, ModelError
from ..hub.blockprune_cost import Cost, Linear, layer_cost, other_cost
from ..hub.blockprune_flops import UncountableError
from ..hub.blockprune_model_cost import hardware_cost, linear_works
from ..hub.blockprune_profiles import DeviceError, SystolicProfile
from ..hub.blockprune_systolic import weights_kept
from .fetching import checkpoint_folder
from .inspection import StoredLayer, StoredModel, open_checkpoint

# What cards tell of, with the images of a pass.
CARD_DEVICES = {"cpu-avx512": 1, "h100-sxm": 64, "systolic-32": 1}


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
) -> dict[str, Any]:
    """Latency and energy of a pruned checkpoint on a device; cycles and utilisation too on a systolic array.

    Args:
        source: a block-sparse checkpoint: a folder, or a name on the Hub.
        device: a profile's name or file.
        dataflow, overlap, arrays: of a systolic array, instead of the profile's.
        batch: images.
        dtype: of all numbers; by default "float16" on GPUs and arrays and "float32" on CPUs.
        revision: branch, tag or commit on the Hub.

    Returns:
        JSON-ready totals of the whole model and of the pruned Linears, pruned and dense, and the layers.

    Raises:
        CheckpointError: no block-sparse checkpoint.
        ConfigError: no such profile, or one that has no dataflow; a revision of a folder.
        ModelError: a model that is no plain vision transformer.
    """
    profile = _profile(device, dataflow=dataflow, overlap=overlap, arrays=arrays)
    stored = open_checkpoint(checkpoint_folder(source, revision))
    return simulate_stored(stored, profile, batch, dtype or usual_dtype(profile))


def simulate_stored(stored: StoredModel, profile: Any, batch: int, dtype: str) -> dict[str, Any]:
    """What `simulate_checkpoint` says of a checkpoint that was opened."""
    tokens = stored.flops.linear_tokens
    first = stored.layers[0].module if stored.layers else next(iter(tokens))
    shape = transformer_shape(stored.architecture.config, stored.flops.image_size, tokens[first])
    layers = [_layer(profile, layer, batch * round(tokens[layer.module]), dtype) for layer in stored.layers]
    rest = other_cost(profile, shape, batch=batch, dtype=dtype)
    pruned = {layer.module for layer in stored.layers}
    for name, work in linear_works(stored.architecture, tokens).items():
        if name not in pruned:
            rest = rest.plus(layer_cost(profile, work._replace(tokens=batch * work.tokens, dtype=dtype)))
    result: dict[str, Any] = {"device": profile.name, "kind": profile.kind, "batch": batch, "dtype": dtype}
    result |= _totals(layers, rest)
    if isinstance(profile, SystolicProfile):
        result |= _cycle_totals(profile, layers, rest)
    return {**result, "layers": layers}


def predict_checkpoint(stored: StoredModel) -> list[dict[str, Any]]:
    """What a checkpoint should take, beside the dense model, on a few devices; nothing where its cost is not known.

    Returns:
        JSON-ready `device`, `batch`, `dtype`, `latency_ms`, `dense_latency_ms`, `speedup` and `energy_ratio` of each.
    """
    keys = ("device", "batch", "dtype", "latency_ms", "dense_latency_ms", "speedup", "energy_ratio")
    try:
        profiles = [(load_profile(device), batch) for device, batch in CARD_DEVICES.items()]
        found = [simulate_stored(stored, profile, batch, usual_dtype(profile)) for profile, batch in profiles]
    except ModelError:
        return []
    return [{key: values[key] for key in keys} for values in found]


def predict(
    model: nn.Module,
    device: Any,
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


def _profile(device: str | Path, **changes: Any) -> Any:
    profile = load_profile(device)
    wanted = {key: value for key, value in changes.items() if value is not None}
    if not wanted:
        return profile
    if not isinstance(profile, SystolicProfile):
        raise ConfigError(f"{profile.name}: {', '.join(wanted)} belong to systolic arrays; name one, or leave them out")
    profile = replace(profile, **wanted)
    try:
        Array(**profile.array)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return profile


def _layer(profile: Any, layer: StoredLayer, tokens: int, dtype: str) -> dict[str, Any]:
    """A layer pruned and dense; cut rows and columns make the pruned one smaller."""
    outputs, inputs = layer.values["stored_shape"]
    mask = layer.mask.numpy()
    work = Linear(tokens, outputs, inputs, dtype, mask, tuple(layer.values["block_shape"]))
    dense = Linear(tokens, layer.values["shape"][0], layer.values["shape"][1], dtype)
    found: dict[str, Any] = {"name": layer.name, "tokens": tokens, "density": layer.values["density"]}
    found |= layer_cost(profile, work)._asdict()
    found |= {f"dense_{key}": value for key, value in profile.dense(dense)._asdict().items()}
    if isinstance(profile, SystolicProfile):
        run = analyse(tokens, weights_kept(mask, work.block_shape, (outputs, inputs)), Array(**profile.array))
        found |= {"cycles": run.cycles, "utilisation": run.utilisation, "macs": run.macs}
        found["dense_cycles"] = dense_cycles(tokens, dense.in_features, dense.out_features, **profile.array)
    return found


def _totals(layers: list[dict[str, Any]], rest: Cost) -> dict[str, Any]:
    pruned = {key: sum(layer[key] for layer in layers) for key in Cost._fields}
    dense = {key: sum(layer[f"dense_{key}"] for layer in layers) for key in Cost._fields}
    others = rest._asdict()
    result: dict[str, Any] = {}
    for key in ("latency_ms", "energy_mj", "flops", "size_bytes"):
        result[key], result[f"dense_{key}"] = pruned[key] + others[key], dense[key] + others[key]
    result["speedup"] = result["dense_latency_ms"] / result["latency_ms"]
    result["energy_ratio"] = result["dense_energy_mj"] / result["energy_mj"]
    result["linear_speedup"] = dense["latency_ms"] / pruned["latency_ms"] if pruned["latency_ms"] else float("inf")
    result["other_parts"] = others
    return result


def _cycle_totals(profile: SystolicProfile, layers: list[dict[str, Any]], rest: Cost) -> dict[str, Any]:
    """Cycles of the whole model: layers one after the other, and what other parts take at the array's clock."""
    other = round(rest.latency_ms * profile.ghz * 1e6)
    cycles, dense = (sum(layer[key] + 1 for layer in layers) for key in ("cycles", "dense_cycles"))
    elements = profile.rows * profile.cols * profile.arrays
    macs = sum(layer["macs"] for layer in layers)
    return {
        "array": asdict(Array(**profile.array)),
        "cycles": cycles + other,
        "dense_cycles": dense + other,
        "other_cycles": other,
        "utilisation": macs / (elements * cycles) if cycles else 0.0,
        "cycle_speedup": (dense + other) / (cycles + other),
        "linear_cycle_speedup": dense / cycles if cycles else float("inf"),
    }
