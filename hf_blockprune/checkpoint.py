"""Saved checkpoints as folders: written whole or not at all, and read without running their code."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.utils.hub import cached_file

from .blocks import block_sizes
from .errors import BlockSparseFormatError, CheckpointError, ModelError
from .hardware.flops import count_flops
from .hub import modeling_blockprune
from .hub.blockprune_backends import LayerArguments, choose_backend
from .hub.blockprune_cost import linear_flops
from .hub.blockprune_layout import PackedWeight, block_mask, check_indices, check_shapes, grid_shape
from .hub.blockprune_quantizer import QUANT_METHOD, TENSOR_NAMES, BlockPruneQuantizationConfig, find_linear
from .loading import HUB_OPTIONS

CONFIG_FILE = "config.json"
RECIPE_FILE = "blockprune_config.json"
REPORT_FILE = "blockprune_report.json"
# Bytes of an element by safetensors' name of its dtype; any other counts as one byte.
ELEMENT_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HUB_CODE = Path(modeling_blockprune.__file__).parent


@contextmanager
def staged_directory(directory: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that takes the place of `directory` when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: the folder exists and may not be replaced, or writing failed (a full disk, say).
    """
    target = Path(directory).expanduser().resolve()
    check_output(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be created ({error.strerror or error})") from error
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        _move_into_place(staging, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory}: could not be written ({error}); nothing was changed, free some space or name another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output(directory: str | Path, *, overwrite: bool) -> None:
    """Refuse an output folder that exists, before any long work is begun.

    Raises:
        CheckpointError: it is a file, holds files and `overwrite` is off, or is no checkpoint and so never replaced.
    """
    target = Path(directory).expanduser()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise CheckpointError(f"{directory}: is a file; name a folder")
    if not overwrite:
        raise CheckpointError(f"{directory}: exists already; pass --overwrite (overwrite=True) or name another folder")
    if not (target / CONFIG_FILE).is_file():
        raise CheckpointError(f"{directory}: is no saved model (it has no config.json), so it is not overwritten")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move_into_place(staging: Path, target: Path) -> None:
    backup = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        if target.exists():
            os.rename(target, backup / target.name)
        try:
            os.rename(staging, target)
        except BaseException:
            if (backup / target.name).exists():
                os.rename(backup / target.name, target)
            raise
    finally:
        shutil.rmtree(backup, ignore_errors=True)


def add_hub_code(folder: Path, model: nn.Module) -> None:
    """Copy the code that loads the checkpoint without this package, and name it in `config.json`."""
    for source in sorted(HUB_CODE.glob("*.py")):
        if source.name != "__init__.py":
            shutil.copyfile(source, folder / source.name)
    class_name = f"BlockPrune{type(model).__name__.removeprefix('BlockPrune')}"
    if hasattr(modeling_blockprune, class_name):
        config = read_json(folder / CONFIG_FILE)
        config["auto_map"] = {
            "AutoModelForImageClassification": f"{Path(modeling_blockprune.__file__).stem}.{class_name}"
        }
        write_json(folder / CONFIG_FILE, config)


def stored_report(name: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The report beside a pruned model in a folder or on the Hub; None where something else saved it.

    Args:
        name: Hub name or folder.
        kwargs: what its model was loaded with (revision, token, cache_dir, ...).

    Raises:
        CheckpointError: the file holds no JSON object.
    """
    path = cached_file(
        name,
        REPORT_FILE,
        **{key: value for key, value in kwargs.items() if key in HUB_OPTIONS},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else read_json(Path(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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
    folder = Path(directory).expanduser()
    values = read_json(folder / CONFIG_FILE).get("quantization_config")
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{directory}: is no block-sparse checkpoint (its config.json names no {QUANT_METHOD} format)"
        )
    config = BlockPruneQuantizationConfig(**values)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: holds no safetensors file")
    tensors = _read_headers(files, config)
    architecture, flops = _dense_architecture(folder)
    layers, removed_flops, target_flops = [], 0.0, 0.0
    for module, name in _in_forward_order(architecture, config):
        linear = architecture.get_submodule(module)
        layer, mask = _inspect_layer(name, linear, config.layers[name], config, tensors)
        layers.append({"name": name, "module": module, **layer})
        kept = block_sizes(_pair(layer["stored_shape"]), _pair(config.block_shape))[mask].sum()
        tokens, weights = flops.linear_tokens[module], linear.out_features * linear.in_features
        removed_flops += linear_flops(tokens, weights - float(kept))
        target_flops += linear_flops(tokens, weights)
    return {
        "flops_ratio": 1 - removed_flops / flops.total,
        "linear_flops_ratio": 1 - removed_flops / target_flops if target_flops else 1.0,
        "dense_flops": flops.total,
        **_totals(layers, tensors, files),
        "layers": layers,
    }


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


def _dense_architecture(folder: Path) -> tuple[Any, Any]:
    """The dense model on the meta device and its FLOPs, from the native config alone (the folder's code is not run)."""
    try:
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
        return model, count_flops(type(model), config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{folder}: its config.json describes no image classifier ({error})") from error


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


def _totals(layers: list[dict[str, Any]], tensors: _Tensors, files: list[Path]) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in files)
    saved = sum(layer["dense_size_bytes"] - layer["size_bytes"] for layer in layers)
    blocks = sum(layer["blocks"] for layer in layers)
    return {
        "density": sum(layer["kept_blocks"] for layer in layers) / blocks if blocks else 1.0,
        "size_bytes": size,
        "dense_size_bytes": size + saved,
    }
