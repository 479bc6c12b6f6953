"""What a saved block-sparse checkpoint holds, read without running its code and without its weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

from .blocks import block_sizes
from .checkpoint import CONFIG_FILE, PROCESSOR_FILE, read_json
from .errors import BlockSparseFormatError, CheckpointError, ModelError
from .hardware.flops import ModelFlops, count_flops
from .hub.blockprune_backends import LayerArguments, choose_backend
from .hub.blockprune_cost import linear_flops
from .hub.blockprune_layout import PackedWeight, block_mask, check_indices, check_shapes, grid_shape
from .hub.blockprune_quantizer import QUANT_METHOD, TENSOR_NAMES, BlockPruneQuantizationConfig, find_linear

# Bytes of an element by safetensors' name of its dtype; any other counts as one byte.
ELEMENT_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
LAYER_COUNTS = ("num_hidden_layers", "depths")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredLayer:
    """A block-sparse layer of a checkpoint.

    Attributes:
        name: as stored.
        module: in the model.
        values: what `inspect_checkpoint` says of it.
        mask: bool [block_rows, block_cols] of what is stored, cut rows and columns left out.
    """

    name: str
    module: str
    values: dict[str, Any]
    mask: Tensor


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint whose indices were checked.

    Attributes:
        architecture: the dense model, without weights.
        flops: of the dense model.
        layers: the block-sparse ones in forward order.
        size_bytes: of all weight files.
    """

    architecture: Any
    flops: ModelFlops
    layers: list[StoredLayer]
    size_bytes: int


def inspect_checkpoint(directory: str | Path) -> dict[str, Any]:
    """What a saved block-sparse checkpoint holds, checked against the format's rules; no weight is loaded.

    Args:
        directory: a folder written by `BlockPruner.save_pretrained`, or downloaded from the Hub.

    Returns:
        JSON-ready values: `flops_ratio` (whole model), `linear_flops_ratio` (pruned layers alone), `density`,
        `size_bytes` and `dense_size_bytes` (weights on disk, and what they would be dense), and `layers`, a list of
        {name, module, shape, block_shape, kept_blocks, blocks, density, size_bytes, dense_size_bytes, cpu_backend}, the
        last being what would multiply with it on this machine's CPU ("dense" where kernels would not pay).

    Raises:
        CheckpointError: the folder is no block-sparse checkpoint, or is damaged.
        BlockSparseFormatError: config and tensors disagree.
    """
    return describe_checkpoint(open_checkpoint(directory))


def describe_checkpoint(stored: StoredModel) -> dict[str, Any]:
    """What `inspect_checkpoint` says of a checkpoint that was opened."""
    removed_flops, target_flops = 0.0, 0.0
    for layer in stored.layers:
        linear = stored.architecture.get_submodule(layer.module)
        shape, block_shape = _pair(layer.values["stored_shape"]), _pair(layer.values["block_shape"])
        kept = float(block_sizes(shape, block_shape)[layer.mask].sum())
        tokens, weights = stored.flops.linear_tokens[layer.module], linear.out_features * linear.in_features
        removed_flops += linear_flops(tokens, weights - kept)
        target_flops += linear_flops(tokens, weights)
    return {
        "flops_ratio": 1 - removed_flops / stored.flops.total,
        "linear_flops_ratio": 1 - removed_flops / target_flops if target_flops else 1.0,
        "dense_flops": stored.flops.total,
        **_totals(stored),
        "layers": [{"name": layer.name, "module": layer.module, **layer.values} for layer in stored.layers],
    }


def open_checkpoint(directory: str | Path) -> StoredModel:
    """Read and check a checkpoint's config and indices.

    Args:
        directory: a folder written by `BlockPruner.save_pretrained`, or downloaded from the Hub.

    Raises:
        CheckpointError: the folder is no block-sparse checkpoint, or is damaged.
        BlockSparseFormatError: config and tensors disagree.
        ModelError: its config describes no image classifier.
    """
    folder = Path(directory).expanduser()
    native = read_json(folder / CONFIG_FILE)
    values = native.get("quantization_config")
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{directory}: is no block-sparse checkpoint (its config.json names no {QUANT_METHOD} format)"
        )
    config = BlockPruneQuantizationConfig(**values)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: holds no safetensors file")
    tensors = _read_headers(files, config)
    _check_sizes(folder, native, tensors)
    architecture, flops = _dense_architecture(folder)
    layers = []
    for module, name in _in_forward_order(architecture, config):
        linear = architecture.get_submodule(module)
        layers.append(StoredLayer(name, module, *_inspect_layer(name, linear, config.layers[name], config, tensors)))
    return StoredModel(architecture, flops, layers, sum(file.stat().st_size for file in files))


def _in_forward_order(architecture: Any, config: BlockPruneQuantizationConfig) -> list[tuple[str, str]]:
    """(module name, stored name) of each block-sparse layer."""
    stored = {find_linear(architecture, name)[0]: name for name in config.layers}
    if len(stored) != len(config.layers):
        raise BlockSparseFormatError("quantization_config.layers: two entries name the same layer")
    return [(module, stored[module]) for module, _ in architecture.named_modules() if module in stored]


def _pair(block_shape: list[int]) -> tuple[int, int]:
    return block_shape[0], block_shape[1]


class _Tensors:
    """Shapes and element sizes of all tensors in a checkpoint, and the index tensors themselves."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.size_bytes: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.indices: dict[str, Tensor] = {}


def _read_headers(files: list[Path], config: BlockPruneQuantizationConfig) -> _Tensors:
    found = _Tensors()
    wanted = {f"{layer}.{name}" for layer in config.layers for name in TENSOR_NAMES if name != "weight"}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (a file handle, not a dict)
                    entry = file.get_slice(key)
                    found.shapes[key] = tuple(entry.get_shape())
                    found.size_bytes[key] = math.prod(found.shapes[key]) * ELEMENT_BYTES.get(entry.get_dtype(), 1)
                    found.dtypes[key] = DTYPES.get(entry.get_dtype(), torch.float32)
                    if key in wanted:
                        found.indices[key] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); copy or download it again"
            ) from error
    return found


def _dense_architecture(folder: Path) -> tuple[Any, ModelFlops]:
    """The dense model on the meta device and its FLOPs, from the native config alone (the folder's code is not run)."""
    file = folder / PROCESSOR_FILE
    processing = read_json(file) if file.is_file() else None
    try:
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
        return model, count_flops(type(model), config, processing)
    except Exception as error:  # of whatever transformers makes of values that nobody checked
        raise ModelError(f"{folder}: its config.json describes no image classifier ({error})") from error


def _check_sizes(folder: Path, native: dict[str, Any], tensors: "_Tensors") -> None:
    """Refuse a config whose model would be larger than the files, before anything of that size is built.

    Raises:
        ModelError: naming the key.
    """
    most = max(sum(math.prod(shape) for shape in tensors.shapes.values()), 1)
    for key, value in native.items():
        bound = len(tensors.shapes) if key in LAYER_COUNTS else most
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > bound:
                raise ModelError(f"{folder}: config.json declares {key} {number}, more than its files hold")


def _inspect_layer(
    name: str, linear: nn.Linear, nnz_blocks: int, config: BlockPruneQuantizationConfig, tensors: _Tensors
) -> tuple[dict[str, Any], Tensor]:
    block_shape = _pair(config.block_shape)
    dense = (linear.out_features, linear.in_features)
    shape = config.shape_of(name, dense)
    keys = {tensor: f"{name}.{tensor}" for tensor in TENSOR_NAMES}
    shapes = {tensor: tensors.shapes[key] for tensor, key in keys.items() if key in tensors.shapes}
    check_shapes(
        name, shapes, nnz_blocks=nnz_blocks, out_features=shape[0], in_features=shape[1], block_shape=block_shape
    )
    crow, col = tensors.indices[keys["crow_indices"]], tensors.indices[keys["col_indices"]]
    block_cols = grid_shape(*shape, block_shape)[1]
    check_indices(name, crow, col, block_cols)
    blocks = math.prod(grid_shape(*dense, block_shape))
    layer = {
        "shape": list(dense),
        "stored_shape": list(shape),
        "block_shape": list(block_shape),
        "kept_blocks": nnz_blocks,
        "blocks": blocks,
        "density": nnz_blocks / blocks,
        "size_bytes": sum(tensors.size_bytes[key] for key in keys.values()),
        "dense_size_bytes": dense[0] * dense[1] * _element_bytes(tensors, keys["weight"], config),
        "cpu_backend": _cpu_backend(tensors.dtypes[keys["weight"]], shape, block_shape, crow, col),
    }
    empty = linear.weight.new_empty(nnz_blocks, 0, 0, device="cpu")
    return layer, block_mask(PackedWeight(empty, crow, col), block_cols)


def _cpu_backend(
    dtype: torch.dtype, shape: tuple[int, int], block_shape: tuple[int, int], crow: Tensor, col: Tensor
) -> str:
    """Name of the backend that would multiply with a layer on this machine's CPU."""
    zero = torch.zeros((), dtype=dtype)  # which blocks there are decides, not what is in them
    layer = LayerArguments(zero.expand(len(col), *block_shape), crow, col, None, shape[0])
    return choose_backend(zero.expand(1, shape[1]), layer)


def _element_bytes(tensors: _Tensors, key: str, config: BlockPruneQuantizationConfig) -> int:
    stored = tensors.shapes[key][0] * config.block_shape[0] * config.block_shape[1]
    return tensors.size_bytes[key] // stored if stored else 4


def _totals(stored: StoredModel) -> dict[str, Any]:
    layers = [layer.values for layer in stored.layers]
    saved = sum(layer["dense_size_bytes"] - layer["size_bytes"] for layer in layers)
    blocks = sum(layer["blocks"] for layer in layers)
    return {
        "density": sum(layer["kept_blocks"] for layer in layers) / blocks if blocks else 1.0,
        "size_bytes": stored.size_bytes,
        "dense_size_bytes": stored.size_bytes + saved,
    }
