"""What a saved block-sparse checkpoint holds, read without running its code and without its weights."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..cost.flops import ModelFlops
from ..errors import BlockSparseFormatError, CheckpointError, ModelError
from ..hub.blockprune_backends import LayerArguments, choose_backend
from ..hub.blockprune_config import INT8, StoredHeads
from ..hub.blockprune_cuts import described_heads
from ..hub.blockprune_headers import (
    ELEMENT_BYTES,
    FLOATING,
    INDEX_NAMES,
    SCALE_NAME,
    TENSOR_NAMES,
    DamagedFileError,
    StoredTensor,
    read_headers,
)
from ..hub.blockprune_heads import CutHeads
from ..hub.blockprune_int8 import int8_backend_of
from ..hub.blockprune_layout import PackedWeight, block_mask, check_indices, grid_shape
from ..hub.blockprune_quantizer import (
    QUANT_METHOD,
    BlockPruneQuantizationConfig,
    match_layers,
    stored_schedule,
    tokens_of_layers,
)
from ..hub.blockprune_storage import is_best_packed
from ..hub.blockprune_tokens import TokenSchedule, set_schedule
from ..report.shares import KeptLayer, Shares, kept_shares
from ..score.blocks import block_sizes
from ..types import JsonDict
from .architecture import dense_architecture, dense_flops
from .fetching import checkpoint_folder
from .folder import CONFIG_FILE, REPORT_FILE, read_json, read_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER_COUNTS = ("num_hidden_layers", "depths")
WEIGHTS_FILE = "model.safetensors"
SHARDS_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


class LayerSizes(TypedDict):
    """What a block-sparse layer holds.

    Attributes:
        shape: [outputs, inputs] in the dense model.
        stored_shape: the same without what was cut out.
        block_shape: [rows, cols].
        kept_blocks: that are stored.
        blocks: of the dense matrix.
        density: the one over the other.
        size_bytes: of the kept blocks and their indices on disk.
        dense_size_bytes: of the dense matrix.
        cpu_backend: what would multiply with it on this machine's CPU, "unpacked" where torch's own product with the
            whole matrix is expected to be faster.
    """

    shape: list[int]
    stored_shape: list[int]
    block_shape: list[int]
    kept_blocks: int
    blocks: int
    density: float
    size_bytes: int
    dense_size_bytes: int
    cpu_backend: str


class InspectedLayer(LayerSizes):
    """A block-sparse layer under its name in the files, and that of its module in the model."""

    name: str
    module: str


class InspectedHeads(StoredHeads):
    """An attention that lacks heads, or features of each, as the files name it; beside the architecture's sizes."""

    dense_heads: int
    dense_head_size: int


class Sizes(TypedDict):
    """Bytes of all weights on disk, and what they would be dense."""

    size_bytes: int
    dense_size_bytes: int


class Description(Shares, Sizes):
    """What a checkpoint keeps, in all, by attentions that were cut, and by layers in forward order."""

    heads: list[InspectedHeads]
    layers: list[InspectedLayer]


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
    values: LayerSizes
    mask: Tensor


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint whose indices were checked.

    Attributes:
        architecture: the dense model, without weights.
        flops: of the dense model, as its tokens merge.
        layers: the block-sparse ones in forward order.
        size_bytes: of all weight files.
        heads: the attentions that lack heads, or features of heads.
        schedule: by which tokens merge, None where they do not.
        dtype: "int8" where the weights of `layers` are, None where they have the model's.
    """

    architecture: "PreTrainedModel"
    flops: ModelFlops
    layers: list[StoredLayer]
    size_bytes: int
    heads: tuple[CutHeads, ...] = ()
    schedule: TokenSchedule | None = None
    dtype: str | None = None


def inspect_checkpoint(source: str | Path, *, revision: str | None = None) -> JsonDict:
    """What a saved block-sparse checkpoint holds, checked against the format's rules; no weight is loaded.

    Args:
        source: a folder written by `BlockPruner.save_pretrained`, or a name on the Hub.
        revision: branch, tag or commit on the Hub.

    Returns:
        JSON-ready values: `flops_ratio` (whole model), `linear_flops_ratio` (pruned layers alone), `params_ratio`
        (weights of the whole model), `density`, `size_bytes` and `dense_size_bytes` (weights on disk, and what they
        would be dense), `stream_reordered` (whether features of hidden states, and so of embeddings, come in another
        order than the dense model's, None where no sound report lies beside the weights), `heads`, a list of {query,
        key, value, out, heads, head_size, dense_heads, dense_head_size} of attentions that were cut, `tokens` (None, or
        {leave, patches}: how many of so many patches leave at each layer), `dtype` ("int8" where the weights of these
        layers are, else None), and `layers`, a list of {name, module, **LayerSizes}.

    Raises:
        CheckpointError: there is no block-sparse checkpoint, or it is damaged.
        BlockSparseFormatError: config and tensors disagree.
        ConfigError: a revision of a folder.
    """
    folder = checkpoint_folder(source, revision)
    stored = open_checkpoint(folder)
    return {
        **_shares(stored),
        **_sizes(stored),
        "stream_reordered": _stream_reordered(folder),
        "heads": _inspected_heads(stored),
        "tokens": None if stored.schedule is None else asdict(stored.schedule),
        "dtype": stored.dtype,
        "layers": _inspected_layers(stored),
    }


def _stream_reordered(folder: Path) -> bool | None:
    try:
        report = read_report(folder / REPORT_FILE)
    except CheckpointError:  # the weights are what they are without it
        report = None
    return None if report is None else bool(report.residual_order)


def describe_checkpoint(stored: StoredModel) -> Description:
    """What `inspect_checkpoint` says of a checkpoint that was opened."""
    heads, layers = _inspected_heads(stored), _inspected_layers(stored)
    return {**_shares(stored), **_sizes(stored), "heads": heads, "layers": layers}


def _shares(stored: StoredModel) -> Shares:
    kept = []
    for layer in stored.layers:
        values, tokens = layer.values, stored.flops.linear_tokens[layer.module]
        dense_tokens = stored.flops.dense.linear_tokens[layer.module]
        sizes = block_sizes(_pair(values["stored_shape"]), _pair(values["block_shape"]))
        weights, kept_weights = math.prod(values["shape"]), int(sizes[layer.mask].sum())
        kept.append(KeptLayer(tokens, dense_tokens, weights, kept_weights, values["blocks"], values["kept_blocks"]))
    return kept_shares(kept, stored.flops, stored.heads)


def _sizes(stored: StoredModel) -> Sizes:
    saved = sum(layer.values["dense_size_bytes"] - layer.values["size_bytes"] for layer in stored.layers)
    return {"size_bytes": stored.size_bytes, "dense_size_bytes": stored.size_bytes + saved}


def _inspected_layers(stored: StoredModel) -> list[InspectedLayer]:
    return [{"name": layer.name, "module": layer.module, **layer.values} for layer in stored.layers]


def _inspected_heads(stored: StoredModel) -> list[InspectedHeads]:
    names = {layer.module: layer.name for layer in stored.layers}
    return [
        {
            "query": names[cut.query],
            "key": names[cut.key],
            "value": names[cut.value],
            "out": names[cut.out],
            "heads": cut.heads,
            "head_size": cut.head_size,
            "dense_heads": cut.dense_heads,
            "dense_head_size": cut.dense_head_size,
        }
        for cut in stored.heads
    ]


def open_checkpoint(directory: str | Path, architecture: "PreTrainedModel | None" = None) -> StoredModel:
    """Read and check a checkpoint's config and indices.

    Args:
        directory: a folder written by `BlockPruner.save_pretrained`, or downloaded from the Hub.
        architecture: the dense model on the meta device, where it is at hand; by default what config.json describes.

    Raises:
        CheckpointError: the folder is no block-sparse checkpoint, or is damaged.
        BlockSparseFormatError: config and tensors disagree.
        ModelError: its config describes no classifier or encoder of images.
    """
    folder = Path(directory).expanduser()
    values = read_json(folder / CONFIG_FILE)
    stored = values.get("quantization_config")
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{directory}: is no block-sparse checkpoint (its config.json names no {QUANT_METHOD} format)"
        )
    config = BlockPruneQuantizationConfig(**stored)
    files = weight_files(folder)
    headers = _read_headers(files)
    _check_sizes(folder, values, headers)
    architecture = dense_architecture(folder, headers) if architecture is None else architecture
    modules, found = match_layers(architecture, config, headers)
    _check_dense(architecture, found, set(modules.values()))
    if (schedule := stored_schedule(config)) is not None:
        set_schedule(architecture, schedule, modules.values())
    flops = dense_flops(folder, architecture)
    stored_names = {module: name for name, module in modules.items()}
    layers, indices = [], _read_indices(config, headers)
    tokens = tokens_of_layers(architecture, stored_names)
    for module, linear in architecture.named_modules():
        if module in stored_names:
            assert isinstance(linear, nn.Linear)  # match_layers saw to it
            name = stored_names[module]
            values, mask = _inspect_layer(name, linear, config, headers, indices, tokens[module])
            layers.append(StoredLayer(name, module, values, mask))
    heads = tuple(described_heads(architecture, config, modules))
    size_bytes = sum(file.stat().st_size for file in files)
    return StoredModel(architecture, flops, layers, size_bytes, heads, schedule, INT8 if config.is_int8 else None)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load: one, or the shards that the index names.

    Raises:
        CheckpointError: there are none, or the index names files that are not the folder's own.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / SHARDS_FILE).is_file():
        raise CheckpointError(f"{folder}: holds no safetensors file")
    shards = read_json(folder / SHARDS_FILE).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{folder / SHARDS_FILE}: its weight_map must give each tensor's file")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / SHARDS_FILE}: {name!r} is no file of this folder; download it again")
    return [folder / name for name in names]


def _read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    try:
        return read_headers(files)
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from error


def _check_sizes(folder: Path, native: JsonDict, headers: dict[str, StoredTensor]) -> None:
    """Refuse a config whose model would be larger than the files, before anything of that size is built.

    Raises:
        ModelError: naming the key.
    """
    most = max(sum(math.prod(entry.shape) for entry in headers.values()), 1)
    for key, value in native.items():
        bound = len(headers) if key in LAYER_COUNTS else most
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > bound:
                raise ModelError(f"{folder}: config.json declares {key} {number}, more than its files hold")


def _check_dense(architecture: nn.Module, found: dict[str, StoredTensor], sparse: set[str]) -> None:
    """Refuse dense tensors of another shape than the architecture's.

    Raises:
        BlockSparseFormatError: naming the first.
    """
    for name, tensor in architecture.state_dict().items():
        entry = found.get(name)
        if entry is not None and name.rpartition(".")[0] not in sparse and entry.shape != tuple(tensor.shape):
            raise BlockSparseFormatError(
                f"{name}: shape {entry.shape} in the checkpoint, but config.json declares {tuple(tensor.shape)}"
            )


def _inspect_layer(
    name: str,
    linear: nn.Linear,
    config: BlockPruneQuantizationConfig,
    headers: dict[str, StoredTensor],
    indices: dict[str, Tensor],
    tokens: int,
) -> tuple[LayerSizes, Tensor]:
    """What a layer holds, and its mask, see `StoredLayer`; its indices are checked."""
    nnz_blocks, block_shape = config.layers[name], _pair(config.block_shape)
    dense = (linear.out_features, linear.in_features)
    shape = config.shape_of(name, dense)
    keys = {tensor: f"{name}.{tensor}" for tensor in TENSOR_NAMES}
    crow, col = (indices[keys[index]] for index in INDEX_NAMES)
    block_cols = grid_shape(*shape, block_shape)[1]
    check_indices(name, crow, col, block_cols)
    blocks = math.prod(grid_shape(*dense, block_shape))
    dtype = headers[keys["weight"]].dtype
    tensors = [*keys.values(), *([f"{name}.{SCALE_NAME}"] if config.is_int8 else [])]
    layer: LayerSizes = {
        "shape": list(dense),
        "stored_shape": list(shape),
        "block_shape": list(block_shape),
        "kept_blocks": nnz_blocks,
        "blocks": blocks,
        "density": nnz_blocks / blocks,
        "size_bytes": sum(headers[key].size_bytes for key in tensors),
        "dense_size_bytes": dense[0] * dense[1] * ELEMENT_BYTES[_float_dtype(name, config, headers)],
        "cpu_backend": int8_backend_of("cpu")
        if config.is_int8
        else _cpu_backend(DTYPES[dtype], shape, block_shape, crow, col, tokens),
    }
    empty = torch.empty(nnz_blocks, 0, 0)
    return layer, block_mask(PackedWeight(empty, crow, col), block_cols)


def _float_dtype(name: str, config: BlockPruneQuantizationConfig, headers: dict[str, StoredTensor]) -> str:
    """Of a layer's weight where it is dense: of one in int8 that of its bias, or of what else has one."""
    if not config.is_int8:
        return headers[f"{name}.weight"].dtype
    found = {key: entry.dtype for key, entry in headers.items() if entry.dtype in FLOATING}
    others = (dtype for key, dtype in found.items() if not key.endswith(f".{SCALE_NAME}"))
    return found.get(f"{name}.bias") or next(others, "F32")


def _pair(numbers: list[int]) -> tuple[int, int]:
    return numbers[0], numbers[1]


def _read_indices(config: BlockPruneQuantizationConfig, headers: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """Index tensors of all layers by name; each file is opened once."""
    keys = [f"{layer}.{index}" for layer in config.layers for index in INDEX_NAMES]
    found: dict[str, Tensor] = {}
    for path in {headers[key].file for key in keys}:
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in keys if headers[key].file == path}
    return found


def _cpu_backend(
    dtype: torch.dtype, shape: tuple[int, int], block_shape: tuple[int, int], crow: Tensor, col: Tensor, tokens: int
) -> str:
    """Name of the backend that would multiply with a layer on this machine's CPU, or "unpacked"."""
    zero = torch.zeros((), dtype=dtype)  # which blocks there are decides, not what is in them
    layer = LayerArguments(zero.expand(len(col), *block_shape), crow, col, None, shape[0])
    if not is_best_packed(layer, shape[1], tokens):
        return "unpacked"
    return choose_backend(zero.expand(1, shape[1]), layer)
