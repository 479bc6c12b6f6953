"""How a block-sparse checkpoint becomes modules: the load-time hook of `from_pretrained`.

transformers replaces layers while loading through its `HfQuantizer` interface. Importing this file registers the
method "blockprune" there; a Linear named in the checkpoint's `quantization_config` becomes a `BlockSparseLinear`
before its tensors are read. Nothing is quantized: the interface only carries the name.
"""

import reprlib
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .blockprune_fusion import fuse, unfuse
from .blockprune_headers import (
    INDEX_NAMES,
    MAX_REPEATED_LAYERS,
    StoredTensor,
    check_allocation,
    check_layer,
    check_location,
    read_headers,
)
from .blockprune_layout import BlockSparseFormatError
from .blockprune_linear import BlockSparseLinear
from .blockprune_names import by_module, find_linears, stored_layer_name

QUANT_METHOD = "blockprune"
FORMAT_VERSION = 2  # the newest that this code reads; files that need no more than 1 say 1


class BlockPruneQuantizationConfig(QuantizationConfigMixin):
    """What a checkpoint stores: the block shape, and for each block-sparse layer its number of kept blocks.

    Args:
        block_shape: (rows, cols), in (out_features, in_features) order.
        layers: kept blocks by layer, under the layer's name in the checkpoint's safetensors file.
        format_version: version of the stored format; by default the oldest that can store this.
        cut: (out_features, in_features) of each layer that is smaller than the architecture's; from format 2.

    Raises:
        BlockSparseFormatError: a value is impossible, a key unknown, or the format newer than this code.
    """

    def __init__(
        self,
        /,  # a key named "self" is an unknown one too
        block_shape: tuple[int, ...] | list[int] = (),
        layers: dict[str, int] | None = None,
        format_version: int | None = None,
        quant_method: str = QUANT_METHOD,
        cut: dict[str, list[int]] | None = None,
        **unknown: Any,
    ) -> None:
        if format_version is None:
            format_version = 2 if cut else 1
        if quant_method != QUANT_METHOD:
            raise BlockSparseFormatError(
                f"quantization_config.quant_method: {QUANT_METHOD!r}, not {reprlib.repr(quant_method)}"
            )
        if not _is_count(format_version) or not 1 <= format_version <= FORMAT_VERSION:
            raise BlockSparseFormatError(
                f"quantization_config.format_version: this code reads 1 to {FORMAT_VERSION}, "
                f"got {reprlib.repr(format_version)}; a newer hf_blockprune may read it"
            )
        if cut is not None and format_version < 2:
            unknown["cut"] = cut
        if unknown:
            raise BlockSparseFormatError(
                f"quantization_config: unknown keys {reprlib.repr(sorted(unknown))} in format {format_version}"
            )
        if not _is_pair(block_shape):
            raise BlockSparseFormatError(
                f"quantization_config.block_shape: two whole numbers from 1, got {reprlib.repr(block_shape)}"
            )
        if not isinstance(layers, dict) or not all(isinstance(k, str) and _is_count(v) for k, v in layers.items()):
            raise BlockSparseFormatError("quantization_config.layers: must map layer names to numbers of kept blocks")
        if cut is not None and not (
            isinstance(cut, dict) and all(map(_is_pair, cut.values())) and set(cut) <= set(layers)
        ):
            raise BlockSparseFormatError(
                "quantization_config.cut: must map names of layers to their [out_features, in_features]"
            )
        self.quant_method: Any = QUANT_METHOD  # transformers declares its own enum, and takes names too
        self.format_version = format_version
        self.block_shape = [int(size) for size in block_shape]
        self.layers = dict(layers)
        if cut:
            self.cut = {name: [int(size) for size in shape] for name, shape in cut.items()}

    def shape_of(self, stored_name: str, dense_shape: tuple[int, int]) -> tuple[int, int]:
        """(out_features, in_features) of a layer as it is stored.

        Raises:
            BlockSparseFormatError: larger than in the dense architecture.
        """
        shape = getattr(self, "cut", {}).get(stored_name, dense_shape)
        if shape[0] > dense_shape[0] or shape[1] > dense_shape[1]:
            raise BlockSparseFormatError(
                f"quantization_config.cut: {stored_name} of {shape[0]}x{shape[1]} is larger than the architecture's "
                f"{dense_shape[0]}x{dense_shape[1]}"
            )
        return shape[0], shape[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    return _is_count(value) and value >= 1


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_size, value))


class BlockPruneHfQuantizer(HfQuantizer):
    """Replaces Linears by `BlockSparseLinear` while a checkpoint loads, and back on `model.dequantize()`."""

    quantization_config: BlockPruneQuantizationConfig
    requires_calibration = True
    _expected: dict[str, tuple[torch.Size, torch.dtype]]  # of the parameters of the model that is loading

    def update_attn_implementation(self, config):
        """Called before the model is built, which takes time and memory for every layer that the config declares."""
        check_repeated_layers(vars(config))
        return config

    update_tp_plan = update_attn_implementation  # what older transformers calls at that point

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        headers = None
        if checkpoint_files:
            check_location(checkpoint_files, model.config.name_or_path)
            headers = read_headers(checkpoint_files)
        modules, _ = match_layers(model, config, headers)
        linears = {name: model.get_submodule(name) for name in modules.values()}
        for stored_name, name in modules.items():
            model.set_submodule(name, _empty_layer(config, stored_name, linears[name], headers))
        self._expected = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model, **kwargs):
        self._hold_to_expected(model)
        for name, module in block_sparse_layers(model):
            module.check(name)
        fuse(model)
        return model

    def _hold_to_expected(self, model):
        """Where a quantizer is at work, transformers as late as 5.20 takes whatever shape and dtype a file has."""
        for name, parameter in model.named_parameters():
            shape, dtype = self._expected.get(name, (parameter.shape, parameter.dtype))
            if parameter.shape != shape:
                raise RuntimeError(
                    f"{name}: size mismatch, expected {list(shape)}, the file has {list(parameter.shape)}: its config "
                    "and tensors do not belong together (ignore_mismatched_sizes needs a newer transformers here)"
                )
            if parameter.dtype != dtype and not parameter.is_meta:
                parameter.data = _converted(parameter.data, dtype)

    def get_state_dict_and_metadata(self, model):
        """Called by `save_pretrained` before the config is written: it must describe the model as it is now."""
        update_config(model)
        return None, {}

    def _dequantize(self, model, dtype=None):
        unfuse(model)
        # Of a model that was saved before, transformers gives the config's dtype by its name.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in list(block_sparse_layers(model)):
            # Cut features come back as zeros: the config says how wide the architecture is.
            model.set_submodule(name, module.to_dense(module.dense_shape).to(dtype))
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True

    @property
    def is_qat_trainable(self):
        return True

    @property
    def is_compileable(self):
        return True


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of another dtype, made in pieces too small for torch to start threads: the process may fork next."""
    converted = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    for to, piece in zip(converted.view(-1).split(16384), tensor.reshape(-1).split(16384), strict=True):
        to.copy_(piece)
    return converted


# Whoever registers first wins: the installed package, or the copy of this file that came with a checkpoint.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(BlockPruneQuantizationConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(BlockPruneHfQuantizer)


def block_sparse_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every block-sparse layer, also of one made by another copy of this code."""
    for name, module in model.named_modules():
        if type(module).__name__ == BlockSparseLinear.__name__:
            yield name, module


def sparsify(model: Any, masks: dict[str, Tensor], block_shape: tuple[int, int]) -> Any:
    """Turn masked Linears of a transformers model into `BlockSparseLinear`, in place.

    Args:
        model: a `PreTrainedModel`.
        masks: bool [block_rows, block_cols] by module name.
        block_shape: (rows, cols).

    Returns:
        The model, ready for inference, training and `save_pretrained`.
    """
    for name, mask in masks.items():
        model.set_submodule(name, BlockSparseLinear.from_dense(model.get_submodule(name), mask, block_shape))
    fuse(model)
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING[QUANT_METHOD](stored_config(model), pre_quantized=True)
    update_config(model)
    model.config._is_quantized = True
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    return model


def update_config(model: Any) -> None:
    """Make a model's config describe its block-sparse layers as they are now."""
    model.hf_quantizer.quantization_config = model.config.quantization_config = stored_config(model)


def stored_config(model: Any) -> BlockPruneQuantizationConfig:
    """The config that describes a model's block-sparse layers as they will be stored.

    Raises:
        BlockSparseFormatError: the layers differ in block shape, which cannot be stored.
    """
    layers = {stored_layer_name(model, name): module for name, module in block_sparse_layers(model)}
    shapes = {module.block_shape for module in layers.values()}
    if len(shapes) != 1:
        raise BlockSparseFormatError(
            f"block_shape: the format stores one for all layers, the model has {sorted(shapes)}"
        )
    return BlockPruneQuantizationConfig(
        block_shape=shapes.pop(),
        layers={name: module.nnz_blocks for name, module in layers.items()},
        cut={n: [m.out_features, m.in_features] for n, m in layers.items() if m.dense_shape is not None} or None,
    )


def check_repeated_layers(values: dict[str, Any]) -> None:
    """Refuse a config that declares more layers than any model has.

    Raises:
        BlockSparseFormatError: naming the key.
    """
    for key in ("num_hidden_layers", "num_layers", "depth", "depths"):
        value = values.get(key)
        counts: Any = value if isinstance(value, (list, tuple)) else [value]
        if sum(count for count in counts if _is_count(count)) > MAX_REPEATED_LAYERS:
            raise BlockSparseFormatError(f"{key}: at most {MAX_REPEATED_LAYERS} layers, got {reprlib.repr(value)}")


def match_layers(
    model: Any, config: BlockPruneQuantizationConfig, headers: dict[str, StoredTensor] | None
) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Find the block-sparse layers, and compare all that is stored with the config and the architecture.

    Args:
        model: the dense architecture on the meta device.
        config: what it was saved with.
        headers: what the files hold, where there are any.

    Returns:
        (module name by stored name of each block-sparse layer, what the files hold by the model's names of it).

    Raises:
        BlockSparseFormatError: they disagree.
    """
    if headers is not None and len(config.layers) > len(headers):
        raise BlockSparseFormatError(
            f"quantization_config.layers: {len(config.layers):,} named, but the files hold {len(headers):,} tensors"
        )
    modules = find_linears(model, config.layers)
    _check_cuts(model, config, modules)
    return modules, {} if headers is None else _check_stored(model, config, modules, headers)


def _check_cuts(model: Any, config: BlockPruneQuantizationConfig, modules: dict[str, str]) -> None:
    """Refuse cuts that do not take as many units from what reads an MLP's hidden features as from what writes them.

    Raises:
        BlockSparseFormatError: naming the layer.
    """
    stored_names = {module: stored_name for stored_name, module in modules.items()}
    cut = []  # fc1, fc2, fc1, ... with their sizes
    for name, linear in model.named_modules():
        stored_name = stored_names.get(name, "")
        if stored_name in getattr(config, "cut", {}):
            dense = (linear.out_features, linear.in_features)
            cut.append((stored_name, dense, config.shape_of(stored_name, dense)))
    for fc1, fc2 in zip_longest(cut[::2], cut[1::2]):
        name, dense, shape = fc1
        fits = fc2 is not None and shape[1] == dense[1] and fc2[2] == (fc2[1][0], shape[0]) and fc2[1][1] == dense[0]
        if not fits:
            raise BlockSparseFormatError(
                f"quantization_config.cut: {name} of {shape[0]}x{shape[1]} has no layer after it that is cut likewise"
            )


def _check_stored(
    model: Any, config: BlockPruneQuantizationConfig, modules: dict[str, str], headers: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Compare what the files hold with the config and the architecture, before anything is allocated."""
    linears = {name: model.get_submodule(name) for name in modules.values()}
    for stored_name, name in modules.items():
        linear = linears[name]
        check_layer(
            stored_name,
            headers,
            nnz_blocks=config.layers[stored_name],
            shape=config.shape_of(stored_name, (linear.out_features, linear.in_features)),
            block_shape=(config.block_shape[0], config.block_shape[1]),
            bias=linear.bias is not None,
        )
    found = by_module(model, headers, [f"{name}.{index}" for name in linears for index in INDEX_NAMES])
    check_allocation(model, found, headers, linears)
    return found


def _empty_layer(
    config: BlockPruneQuantizationConfig,
    stored_name: str,
    linear: nn.Linear,
    headers: dict[str, StoredTensor] | None,
) -> BlockSparseLinear:
    """The module that a layer is loaded into."""
    dense_shape = (linear.out_features, linear.in_features)
    out_features, in_features = config.shape_of(stored_name, dense_shape)
    sparse = BlockSparseLinear(
        in_features,
        out_features,
        (config.block_shape[0], config.block_shape[1]),
        config.layers[stored_name],
        # Refitting gives a bias to a Linear that had none; only the file tells.
        bias=linear.bias is not None or (headers is not None and f"{stored_name}.bias" in headers),
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    if (out_features, in_features) != dense_shape:
        sparse.dense_shape = dense_shape
    return sparse
