"""What a block-sparse checkpoint's config.json says of it."""

import copy
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias, TypedDict, TypeGuard

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .blockprune_heads import PARTS
from .blockprune_layout import BlockSparseFormatError

QUANT_METHOD = "blockprune"
FORMAT_VERSION = 6  # the newest that this code reads, and the one that it writes
INT8 = "int8"  # of weights; where a config says nothing they have the model's dtype
MAX_PATCHES = 2**31 - 1  # of an image: products of two such numbers, which readers form, fit 64 bits

JsonDict: TypeAlias = dict[str, Any]
"""An object as `json` reads and writes it; who reads one checks what is in it."""


class StoredHeads(TypedDict):
    """What is left of an attention: the stored names of its layers, and its heads and the features of each."""

    query: str
    key: str
    value: str
    out: str
    heads: int
    head_size: int


class StoredTokens(TypedDict):
    """How tokens merge: patches that leave at each layer, of an image of so many."""

    leave: list[int]
    patches: int


class BlockPruneQuantizationConfig(QuantizationConfigMixin):
    """What a checkpoint stores: the block shape, and for each block-sparse layer its number of kept blocks.

    Args:
        block_shape: (rows, cols), in (out_features, in_features) order.
        layers: kept blocks by layer, under the layer's name in the checkpoint's safetensors file.
        format_version: version of the stored format; by default the one that this code writes.
        cut: (out_features, in_features) of each layer that is smaller than the architecture's; from format 2.
        heads: {"query", "key", "value", "out", "heads", "head_size"} of each attention that lacks heads or features of
            them; its four layers are named as in `layers`, and are in `cut`; from format 4.
        tokens: {"leave", "patches"}: how many patches leave at each of the layers that hold those of `layers`, of an
            image of so many patches; from format 5.
        dtype: "int8" where the weights of all `layers` are, each with a `weight_scale` beside it; from format 6.

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
        heads: list[StoredHeads] | None = None,
        tokens: StoredTokens | None = None,
        dtype: str | None = None,
        **unknown: object,
    ) -> None:
        if format_version is None:
            format_version = FORMAT_VERSION
        if quant_method != QUANT_METHOD:
            raise BlockSparseFormatError(
                f"quantization_config.quant_method: {QUANT_METHOD!r}, not {reprlib.repr(quant_method)}"
            )
        if not is_count(format_version) or not 1 <= format_version <= FORMAT_VERSION:
            raise BlockSparseFormatError(
                f"quantization_config.format_version: this code reads 1 to {FORMAT_VERSION}, "
                f"got {reprlib.repr(format_version)}; a newer hf_blockprune may read it"
            )
        for key, value, since in (("cut", cut, 2), ("heads", heads, 4), ("tokens", tokens, 5), ("dtype", dtype, 6)):
            if value is not None and format_version < since:
                unknown[key] = value
        if unknown:
            raise BlockSparseFormatError(
                f"quantization_config: unknown keys {reprlib.repr(sorted(unknown))} in format {format_version}"
            )
        _check_values(block_shape, layers, cut, heads, tokens, dtype)
        assert layers is not None  # _check_values saw to it
        # transformers declares its own enum, and takes names too
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.block_shape = [int(size) for size in block_shape]
        self.layers = dict(layers)
        if cut:
            self.cut = {name: [int(size) for size in shape] for name, shape in cut.items()}
        if heads:
            self.heads = copy.deepcopy(heads)
        if tokens:
            self.tokens = copy.deepcopy(tokens)
        if dtype:
            self.dtype = dtype
        # Refitting gives a bias to a Linear that had none. A file tells by itself; tensors in memory do not.
        self._biased: frozenset[str] = frozenset()

    @property
    def is_int8(self) -> bool:
        """Whether weights are stored in int8."""
        return hasattr(self, "dtype")

    @property
    def biased(self) -> frozenset[str]:
        """Stored names of layers that are known to have a bias; no part of what is stored."""
        return self._biased

    def with_biases(self, names: Iterable[str]) -> "BlockPruneQuantizationConfig":
        """This config, which knows from now on which layers have a bias."""
        self._biased = frozenset(names)
        return self

    def to_dict(self) -> JsonDict:
        """What is stored."""
        return {key: copy.deepcopy(value) for key, value in vars(self).items() if not key.startswith("_")}

    def __iter__(self) -> Iterator[tuple[str, object]]:
        yield from self.to_dict().items()

    def get(self, key: str, default: object = None) -> object:
        """A stored value; transformers asks for them as if this was the dict that a file holds."""
        return self.to_dict().get(key, default)

    def __eq__(self, other: object) -> bool:
        stored = other.to_dict() if isinstance(other, QuantizationConfigMixin) else other
        return self.to_dict() == stored

    __hash__ = None  # type: ignore[assignment]  # its values change

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


def _check_values(
    block_shape: object, layers: object, cut: object, heads: object, tokens: object, dtype: object
) -> None:
    """Refuse impossible values of keys that the format knows.

    Raises:
        BlockSparseFormatError: naming the key.
    """
    if not _is_pair(block_shape):
        raise BlockSparseFormatError(
            f"quantization_config.block_shape: two whole numbers from 1, got {reprlib.repr(block_shape)}"
        )
    if not isinstance(layers, dict) or not all(isinstance(k, str) and is_count(v) for k, v in layers.items()):
        raise BlockSparseFormatError("quantization_config.layers: must map layer names to numbers of kept blocks")
    if cut is not None and not (isinstance(cut, dict) and all(map(_is_pair, cut.values())) and set(cut) <= set(layers)):
        raise BlockSparseFormatError(
            "quantization_config.cut: must map names of layers to their [out_features, in_features]"
        )
    if heads is not None:
        _check_heads(heads, cut or {})
    if tokens is not None:
        _check_tokens(tokens)
    if dtype is not None and dtype != INT8:
        raise BlockSparseFormatError(f"quantization_config.dtype: {INT8!r}, or left out, got {reprlib.repr(dtype)}")


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: object) -> bool:
    return is_count(value) and value >= 1


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_size, value))


def _check_heads(heads: object, cut: dict[str, list[int]]) -> None:
    """Refuse descriptions of attentions that do not fit the sizes of their layers, or of which two name one layer.

    Raises:
        BlockSparseFormatError: naming the entry.
    """
    place = "quantization_config.heads"
    if not isinstance(heads, list):
        raise BlockSparseFormatError(f"{place}: must be a list, one object for each cut attention")
    seen: set[str] = set()
    for number, entry in enumerate(heads):
        if not isinstance(entry, dict) or set(entry) != set(StoredHeads.__annotations__):
            raise BlockSparseFormatError(
                f"{place}[{number}]: must give {', '.join(StoredHeads.__annotations__)} and nothing else"
            )
        names = [entry[part] for part in PARTS]
        for name in names:
            if not isinstance(name, str) or name not in cut:
                raise BlockSparseFormatError(f"{place}[{number}]: {reprlib.repr(name)} is no layer of cut")
            if name in seen:
                raise BlockSparseFormatError(f"{place}[{number}]: {name} is named twice")
            seen.add(name)
        for key in ("heads", "head_size"):
            if not _is_size(entry[key]):
                raise BlockSparseFormatError(
                    f"{place}[{number}].{key}: a whole number from 1, got {reprlib.repr(entry[key])}"
                )
        features = entry["heads"] * entry["head_size"]
        if any(cut[name][name == entry["out"]] != features for name in names):
            raise BlockSparseFormatError(f"{place}[{number}]: {names[0]} and its partners are not cut to such heads")


def _check_tokens(tokens: object) -> None:
    """Refuse what is no schedule; whether it is one of this model is seen with the model.

    Raises:
        BlockSparseFormatError: naming the key.
    """
    place = "quantization_config.tokens"
    if not isinstance(tokens, dict) or set(tokens) != set(StoredTokens.__annotations__):
        raise BlockSparseFormatError(f"{place}: must give leave and patches, and nothing else")
    leave, patches = tokens["leave"], tokens["patches"]
    if not isinstance(leave, list) or not all(map(is_count, leave)):
        raise BlockSparseFormatError(f"{place}.leave: a list of whole numbers from 0, got {reprlib.repr(leave)}")
    if not _is_size(patches) or not sum(leave) < patches <= MAX_PATCHES:
        raise BlockSparseFormatError(
            f"{place}.patches: a whole number up to {MAX_PATCHES}, larger than those of leave together, got "
            f"{reprlib.repr(patches)}"
        )


def describes(config: PreTrainedConfig) -> bool:
    """Whether a model's config says that layers of it are block-sparse."""
    stored = vars(config).get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return method == QUANT_METHOD
