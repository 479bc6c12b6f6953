"""How a block-sparse checkpoint becomes modules: the load-time hook of `from_pretrained`.

transformers replaces layers while loading through its `HfQuantizer` interface. Importing this file registers the
method "blockprune" there; a Linear named in the checkpoint's `quantization_config` becomes a `BlockSparseLinear`
before its tensors are read. Without int8 nothing is quantized: the interface only carries the name.
"""

import reprlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from .blockprune_config import QUANT_METHOD, BlockPruneQuantizationConfig, is_count
from .blockprune_cuts import check_cuts, described_heads
from .blockprune_headers import (
    INDEX_NAMES,
    MAX_REPEATED_LAYERS,
    SCALE_NAME,
    StoredTensor,
    check_allocation,
    check_layer,
    check_location,
    read_headers,
)
from .blockprune_heads import CutHeads, check_heads, cut_heads, restore_heads, set_heads
from .blockprune_int8_linear import Int8BlockSparseLinear
from .blockprune_layers import block_sparse_layers, is_pruned
from .blockprune_layout import BlockSparseFormatError
from .blockprune_linear import BlockSparseLinear
from .blockprune_names import by_module, find_linears
from .blockprune_saving import forget, install, native_class, stored_config
from .blockprune_storage import DEFAULT_TOKENS, PIECE, least_tokens
from .blockprune_together import fuse, unfuse
from .blockprune_tokens import TokenSchedule, forget_schedule, set_schedule, tokens_read

Model = TypeVar("Model", bound=PreTrainedModel)


class BlockPruneHfQuantizer(HfQuantizer):
    """Replaces Linears by `BlockSparseLinear` while a checkpoint loads, and back on `model.dequantize()`."""

    quantization_config: BlockPruneQuantizationConfig
    requires_calibration = True
    _expected: dict[str, tuple[torch.Size, torch.dtype]]  # of the parameters of the model that is loading

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before files are looked for and the model is built, with what was read of its config."""
        check_repeated_layers(config)  # building takes time and memory for every layer that the config declares
        forget(config)  # `quantization_config` comes back with the layers; the name of no file was not for this reader
        return config

    update_tp_plan = update_attn_implementation  # what older transformers calls at that point

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: object
    ) -> None:
        config = self.quantization_config
        headers = None
        if checkpoint_files:
            check_location(checkpoint_files, model.config.name_or_path or "")
            headers = read_headers(checkpoint_files)
        modules, _ = match_layers(model, config, headers)
        cuts = described_heads(model, config, modules)
        linears = {name: _linear(model, name) for name in modules.values()}
        for stored_name, name in modules.items():
            model.set_submodule(name, _empty_layer(config, stored_name, linears[name], headers))
        for cut in cuts:
            set_heads(model, cut)
        if (schedule := stored_schedule(config)) is not None:
            set_schedule(model, schedule, modules.values())
        self._expected = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        self._hold_to_expected(model)
        for name, module in block_sparse_layers(model):
            module.check(name)
        choose_storage(model)
        fuse(model)
        vars(model)["is_quantized"] = False  # no weight is: with it, transformers refuses half() and float()
        if is_pruned(model):
            self.quantization_config = model.config.quantization_config = stored_config(model)
        return model

    def _hold_to_expected(self, model: PreTrainedModel) -> None:
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

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make every layer a Linear again, in its own dtype unless one is named, and the model a native one.

        Tokens merge no more: no native model can be saved with that.
        """
        unfuse(model)
        cuts = cut_heads(model)
        rows = {name: {"rows": cut.places()} for cut in cuts for name in (cut.query, cut.key, cut.value)}
        places = rows | {cut.out: {"cols": cut.places()} for cut in cuts}
        for name, module in list(block_sparse_layers(model)):
            # Cut features come back as zeros: the config says how wide the architecture is.
            linear = module.to_dense(module.dense_shape, **places.get(name, {}))
            model.set_submodule(name, linear.to(dtype or module.dtype))
        restore_heads(model)
        forget_schedule(model)
        self.remove_quantization_config(model)
        forget(model.config)
        model.__class__ = native_class(model)
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return not self.quantization_config.is_int8

    @property
    def is_qat_trainable(self):
        return self.is_trainable

    @property
    def is_compileable(self):
        return True


def stored_schedule(config: BlockPruneQuantizationConfig) -> TokenSchedule | None:
    """By which tokens merge in a model that was saved with a config, None where they do not."""
    stored = getattr(config, "tokens", None)
    return None if stored is None else TokenSchedule(tuple(stored["leave"]), stored["patches"])


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of another dtype, made in pieces too small for torch to start threads: the process may fork next."""
    converted = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    for to, piece in zip(converted.view(-1).split(PIECE), tensor.reshape(-1).split(PIECE), strict=True):
        to.copy_(piece)
    return converted


def register() -> None:
    """Teach transformers the method. Who is first wins: the package, or the copy of this file beside a checkpoint."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BlockPruneQuantizationConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(BlockPruneHfQuantizer)
    install()


register()


def sparsify(
    model: Model,
    masks: dict[str, Tensor],
    block_shape: tuple[int, int],
    cut: Mapping[str, tuple[int, int]] | None = None,
    heads: Iterable[CutHeads] = (),
) -> Model:
    """Turn masked Linears of a transformers model into `BlockSparseLinear`, in place.

    Args:
        model: a `PreTrainedModel`.
        masks: bool [block_rows, block_cols] by module name.
        block_shape: (rows, cols).
        cut: (out_features, in_features) of the architecture, by module name, for those Linears that are smaller.
        heads: what is left of each attention whose Linears are smaller.

    Returns:
        The model, ready for inference, training and `save_pretrained`.

    Raises:
        BlockSparseFormatError: what is said of smaller Linears does not fit them; nothing was changed.
    """
    heads, cut = tuple(heads), _checked_cut(model, masks, cut or {})
    for attention in heads:
        if lacking := [name for name in attention.names() if name not in cut]:
            raise BlockSparseFormatError(f"{lacking[0]}: is of an attention in heads, but not in cut")
        check_heads(model, attention, sizes=True)
    for name, mask in masks.items():
        layer = BlockSparseLinear.from_dense(_linear(model, name), mask, block_shape)
        layer.dense_shape = cut.get(name)
        model.set_submodule(name, layer)
    for attention in heads:
        set_heads(model, attention)
    choose_storage(model)
    fuse(model)
    quantizer = AUTO_QUANTIZER_MAPPING[QUANT_METHOD](stored_config(model), pre_quantized=True)
    vars(model).update(hf_quantizer=quantizer, is_quantized=False, quantization_method=QUANT_METHOD)
    update_config(model)
    model.config._is_quantized = True  # attention kernels then ask the config for the dtype, not a Linear
    return model


def _checked_cut(
    model: nn.Module, masks: dict[str, Tensor], cut: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """The architecture's sizes of those Linears that are smaller.

    Raises:
        BlockSparseFormatError: one has no mask, or is larger.
    """
    smaller = {}
    for name, (rows, cols) in cut.items():
        if name not in masks:
            raise BlockSparseFormatError(f"{name}: is in cut, but not in masks")
        linear = _linear(model, name)
        if linear.out_features > rows or linear.in_features > cols:
            raise BlockSparseFormatError(
                f"{name}: of {linear.out_features}x{linear.in_features} is larger than the {rows}x{cols} in cut"
            )
        if (linear.out_features, linear.in_features) != (rows, cols):
            smaller[name] = rows, cols
    return smaller


def choose_storage(model: nn.Module) -> None:
    """Let each block-sparse layer of a model hold its weight as its calls are expected to be faster, in place.

    Raises:
        BackendError: as for `blockprune_storage.is_best_packed`.
    """
    layers = dict(block_sparse_layers(model))
    for name, tokens in tokens_of_layers(model, layers).items():
        if isinstance(layers[name], BlockSparseLinear):  # those of older code know one form
            layers[name].tokens = tokens
            layers[name].choose_storage()


def tokens_of_layers(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The smallest input that each layer of a transformers model expects, by name, from the config of its part."""
    parts = {f"{name}." if name else "": part for name, part in model.named_modules()}
    tokens = {start: least_tokens(part.config) for start, part in parts.items() if isinstance(part, PreTrainedModel)}
    innermost_first = sorted(tokens, key=len, reverse=True)
    found = {}
    for name in names:
        of_image = next((tokens[start] for start in innermost_first if tokens[start] and name.startswith(start)), None)
        found[name] = DEFAULT_TOKENS if of_image is None else max(1, round(tokens_read(model, name, of_image)))
    return found


def pack_weights(model: nn.Module) -> None:
    """Let each block-sparse layer of a model hold its kept blocks alone, in place, also once it is moved.

    Raises:
        BlockSparseFormatError: a weight has values where there is no block.
    """
    for _, layer in block_sparse_layers(model):
        if isinstance(layer, BlockSparseLinear):
            layer.tokens = None
            layer.pack_weight()


def update_config(model: PreTrainedModel) -> None:
    """Make a model's config describe its block-sparse layers as they are now."""
    vars(model)["hf_quantizer"].quantization_config = model.config.quantization_config = stored_config(model)


def check_repeated_layers(config: PreTrainedConfig) -> None:
    """Refuse a config that declares more layers than any model has, or has such a part.

    Raises:
        BlockSparseFormatError: naming the key.
    """
    for key in ("num_hidden_layers", "num_layers", "depth", "depths"):
        value = vars(config).get(key)
        counts = value if isinstance(value, (list, tuple)) else [value]
        if sum(count for count in counts if is_count(count)) > MAX_REPEATED_LAYERS:
            raise BlockSparseFormatError(f"{key}: at most {MAX_REPEATED_LAYERS} layers, got {reprlib.repr(value)}")
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            check_repeated_layers(part)


def match_layers(
    model: PreTrainedModel, config: BlockPruneQuantizationConfig, headers: dict[str, StoredTensor] | None
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
    check_cuts(model, config, modules)
    return modules, {} if headers is None else _check_stored(model, config, modules, headers)


def _check_stored(
    model: PreTrainedModel,
    config: BlockPruneQuantizationConfig,
    modules: dict[str, str],
    headers: dict[str, StoredTensor],
) -> dict[str, StoredTensor]:
    """Compare what the files hold with the config and the architecture, before anything is allocated."""
    linears = {name: _linear(model, name) for name in modules.values()}
    for stored_name, name in modules.items():
        linear = linears[name]
        check_layer(
            stored_name,
            headers,
            nnz_blocks=config.layers[stored_name],
            shape=config.shape_of(stored_name, (linear.out_features, linear.in_features)),
            block_shape=(config.block_shape[0], config.block_shape[1]),
            bias=linear.bias is not None,
            int8=config.is_int8,
        )
    more = (*INDEX_NAMES, SCALE_NAME) if config.is_int8 else INDEX_NAMES
    found = by_module(model, headers, [f"{name}.{tensor}" for name in linears for tensor in more])
    check_allocation(model, found, headers, linears)
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    """The Linear of that name.

    Raises:
        ValueError: it is none.
    """
    linear = model.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name}: expected a Linear, got {type(linear).__name__}")
    return linear


def _empty_layer(
    config: BlockPruneQuantizationConfig,
    stored_name: str,
    linear: nn.Linear,
    headers: dict[str, StoredTensor] | None,
) -> BlockSparseLinear:
    """The module that a layer is loaded into."""
    dense_shape = (linear.out_features, linear.in_features)
    out_features, in_features = config.shape_of(stored_name, dense_shape)
    sparse = (Int8BlockSparseLinear if config.is_int8 else BlockSparseLinear)(
        in_features,
        out_features,
        (config.block_shape[0], config.block_shape[1]),
        config.layers[stored_name],
        # Refitting gives a bias to a Linear that had none.
        bias=linear.bias is not None or f"{stored_name}.bias" in (headers or ()) or stored_name in config.biased,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    if (out_features, in_features) != dense_shape:
        sparse.dense_shape = dense_shape
    return sparse
