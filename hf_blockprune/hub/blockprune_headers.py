"""What a checkpoint's safetensors files hold, read from their headers alone, and what that lets a loader allocate.

A config may declare any size. The sizes of tensors that are really there bound what is allocated, before it is.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import nn

from .blockprune_layout import BlockSparseFormatError, check_shapes

TENSOR_NAMES = ("weight", "crow_indices", "col_indices")
INDEX_NAMES = TENSOR_NAMES[1:]
INDEX_SUFFIXES = tuple(f".{name}" for name in INDEX_NAMES)
SCALE_NAME = "weight_scale"  # beside a weight in int8
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I8": 1}
FLOATING = ("F64", "F32", "F16", "BF16")
MAX_REPEATED_LAYERS = 512  # a model is built, without weights, before its files can be looked at
FREE_ELEMENTS = 1 << 26  # of weights that no file holds: a new classifier's, say
MAX_REMOVED = 256  # weights of block-sparse layers, turned dense, for each stored one


class DamagedFileError(BlockSparseFormatError):
    """A file is missing, cut off, or no safetensors file."""


class StoredTensor(NamedTuple):
    """A tensor as a file's header describes it; dtype under safetensors' name."""

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def size_bytes(self) -> int:
        """Bytes in the file; of dtypes that no block-sparse tensor has, one for each element."""
        return math.prod(self.shape) * ELEMENT_BYTES.get(self.dtype, 1)


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name.

    Raises:
        DamagedFileError: naming the file.
        BlockSparseFormatError: a tensor lies in two files, or an index tensor is not int32.
    """
    found: dict[str, StoredTensor] = {}
    for path in map(str, files):
        try:
            with safe_open(path, framework="pt") as file:
                slices = [(key, file.get_slice(key)) for key in file.keys()]  # noqa: SIM118 (a handle, not a dict)
                entries = {key: StoredTensor(tuple(e.get_shape()), e.get_dtype(), path) for key, e in slices}
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); download it again") from error
        for key, entry in entries.items():
            if key in found:
                raise BlockSparseFormatError(f"{key}: lies in {found[key].file} and in {path}; only one may hold it")
            if key.endswith(INDEX_SUFFIXES) and entry.dtype != "I32":
                raise BlockSparseFormatError(f"{key}: must be int32, got {entry.dtype}")
            found[key] = entry
    return found


def check_location(files: Iterable[str], name_or_path: str) -> None:
    """Refuse weight files outside the checkpoint's own folder: the list of shards is a stranger's text.

    Args:
        files: paths as transformers resolved them; links are not followed, since the Hub's cache is made of them.
        name_or_path: the folder, or the name on the Hub.

    Raises:
        BlockSparseFormatError: naming the file.
    """
    for file in files:
        path = os.path.abspath(file)
        if os.path.isdir(name_or_path):
            inside = Path(os.path.abspath(name_or_path)) in Path(path).parents
        elif os.path.exists(name_or_path):
            inside = True
        else:
            inside = repo_folder_name(repo_id=name_or_path, repo_type="model") in Path(path).parts
        if not inside:
            raise BlockSparseFormatError(
                f"{file}: lies outside {name_or_path}; a checkpoint may name its own files only"
            )


def check_layer(
    name: str,
    headers: dict[str, StoredTensor],
    *,
    nnz_blocks: int,
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    bias: bool,
    int8: bool = False,
) -> None:
    """Refuse a block-sparse layer whose stored tensors do not follow from its declared sizes.

    Args:
        name: the layer's, as stored.
        headers: from `read_headers`.
        nnz_blocks: kept blocks declared.
        shape: (out_features, in_features) as stored.
        block_shape: (rows, cols).
        bias: whether there must be one.
        int8: whether its weight is to be in int8, with a scale beside it.

    Raises:
        BlockSparseFormatError: naming the first tensor that is missing or has another shape or dtype.
    """
    tensors = (*TENSOR_NAMES, SCALE_NAME, "bias")
    found = {tensor: headers[f"{name}.{tensor}"] for tensor in tensors if f"{name}.{tensor}" in headers}
    check_shapes(
        name,
        {tensor: entry.shape for tensor, entry in found.items()},
        nnz_blocks=nnz_blocks,
        out_features=shape[0],
        in_features=shape[1],
        block_shape=block_shape,
    )
    if bias and "bias" not in found:
        raise BlockSparseFormatError(f"{name}.bias: missing from the checkpoint, expected shape {(shape[0],)}")
    if "bias" in found and found["bias"].shape != (shape[0],):
        raise BlockSparseFormatError(f"{name}.bias: shape {found['bias'].shape}, expected {(shape[0],)}")
    for tensor in ("bias",) if int8 else ("weight", "bias"):
        if tensor in found and found[tensor].dtype not in FLOATING:
            raise BlockSparseFormatError(f"{name}.{tensor}: must be floating, got {found[tensor].dtype}")
    _check_scale(name, found, shape[0], int8=int8)


def _check_scale(name: str, found: dict[str, StoredTensor], out_features: int, *, int8: bool) -> None:
    """Refuse a weight in int8 without a scale, and a scale without such a weight; errors as for `check_layer`."""
    scale = found.get(SCALE_NAME)
    if not int8:
        if scale is not None:
            raise BlockSparseFormatError(f"{name}.{SCALE_NAME}: is stored, but config.json says nothing of int8")
        return
    if found["weight"].dtype != "I8":
        raise BlockSparseFormatError(f"{name}.weight: must be int8, got {found['weight'].dtype}")
    if scale is None:
        raise BlockSparseFormatError(f"{name}.{SCALE_NAME}: missing from the checkpoint, expected {(out_features,)}")
    if scale.dtype != "F32" or scale.shape != (out_features,):
        raise BlockSparseFormatError(
            f"{name}.{SCALE_NAME}: must be float32 {(out_features,)}, got {scale.dtype} {scale.shape}"
        )


def check_allocation(
    model: nn.Module,
    found: dict[str, StoredTensor],
    headers: dict[str, StoredTensor],
    sparse: dict[str, nn.Linear],
) -> None:
    """Refuse a model that is much larger than its files, before memory is taken for what they do not hold.

    Args:
        model: the dense architecture on the meta device.
        found: stored tensors by the name of the model's tensor that each is loaded into.
        headers: from `read_headers`.
        sparse: those of its Linears that are stored block-sparse, by module name.

    Raises:
        BlockSparseFormatError: saying what the config declares and what the files hold.
    """
    held = sum(math.prod(entry.shape) for entry in headers.values())
    removed = sum(linear.out_features * linear.in_features for linear in sparse.values())
    if removed > max(FREE_ELEMENTS, MAX_REMOVED * held):
        raise BlockSparseFormatError(
            f"config.json declares block-sparse layers of {removed:,} weights, but the files hold {held:,} in all"
        )
    apart = {f"{name}.{parameter}" for name in sparse for parameter in ("weight", "bias")}
    missing = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        entry = found.get(name)
        if name in apart:
            continue
        if entry is None or entry.shape != tuple(tensor.shape):
            missing += tensor.numel()
        elif tensor.is_floating_point() and entry.dtype not in FLOATING:
            raise BlockSparseFormatError(f"{name}: must be floating, got {entry.dtype}")
    if missing > max(FREE_ELEMENTS, held):
        raise BlockSparseFormatError(
            f"config.json declares {missing:,} weights that the files do not hold; they hold {held:,} in all"
        )
