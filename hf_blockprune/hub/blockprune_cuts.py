"""Whether the sizes that a checkpoint declares for smaller layers fit each other and the architecture."""

from itertools import zip_longest

from torch import nn

from .blockprune_config import BlockPruneQuantizationConfig
from .blockprune_heads import PARTS, CutHeads, check_heads, dense_heads_of, is_attention
from .blockprune_layout import BlockSparseFormatError


def described_heads(model: nn.Module, config: BlockPruneQuantizationConfig, modules: dict[str, str]) -> list[CutHeads]:
    """The attentions that a checkpoint lacks a part of, under the model's names.

    Args:
        model: the dense architecture.
        config: what it was saved with.
        modules: module name by stored name of each block-sparse layer.

    Raises:
        BlockSparseFormatError: the architecture has none that can be cut so.
    """
    found = []
    for entry in getattr(config, "heads", []):
        query, key, value, out = (modules[str(entry[part])] for part in PARTS)
        cut = CutHeads(query, key, value, out, entry["heads"], entry["head_size"], *dense_heads_of(model, query))
        check_heads(model, cut)
        found.append(cut)
    return found


def check_cuts(model: nn.Module, config: BlockPruneQuantizationConfig, modules: dict[str, str]) -> None:
    """Refuse smaller layers where what reads features does not lack those that what writes them lacks.

    Args:
        model: the dense architecture.
        config: what it was saved with.
        modules: module name by stored name of each block-sparse layer.

    Raises:
        BlockSparseFormatError: naming the layer.
    """
    stored_names = {module: stored_name for stored_name, module in modules.items()}
    cut: dict[str, _Size] = {}  # by module name, in the model's order
    for name, linear in model.named_modules():
        stored_name = stored_names.get(name, "")
        if stored_name in getattr(config, "cut", {}) and isinstance(linear, nn.Linear):
            dense = (linear.out_features, linear.in_features)
            cut[name] = stored_name, dense, config.shape_of(stored_name, dense)
    for heads in described_heads(model, config, modules):
        _check_attention(heads, [cut.pop(name) for name in heads.names()])
    _check_pairs(model, cut)


_Size = tuple[str, tuple[int, int], tuple[int, int]]  # stored name, dense shape, shape


def _check_attention(heads: CutHeads, sizes: list[_Size]) -> None:
    """Refuse an attention whose layers are not as large as its heads, here or in the architecture."""
    for number, (name, dense, shape) in enumerate(sizes):
        inner = int(number == 3)  # heads are the outputs of query, key and value, and the inputs of out
        if (dense[inner], shape[inner]) != (heads.dense_features, heads.features) or dense[1 - inner] != shape[
            1 - inner
        ]:
            raise BlockSparseFormatError(
                f"quantization_config.cut: {name} of {shape[0]}x{shape[1]}, in the architecture {dense[0]}x{dense[1]}, "
                f"is not of {heads.heads} heads of {heads.head_size} out of {heads.dense_heads} of "
                f"{heads.dense_head_size}"
            )


def _check_pairs(model: nn.Module, cut: dict[str, _Size]) -> None:
    """Refuse layers that are not fc1, fc2, fc1, ... of MLPs, of which both lack as many hidden units."""
    names = list(cut)
    for fc1, fc2 in zip_longest(names[::2], names[1::2]):
        name, dense, shape = cut[fc1]
        if is_attention(model.get_submodule(fc1.rpartition(".")[0])):
            raise BlockSparseFormatError(
                f"quantization_config.cut: {name} is a layer of an attention, but quantization_config.heads says "
                "nothing of it"
            )
        after = cut.get(fc2)
        if after is None or shape[1] != dense[1] or after[2] != (after[1][0], shape[0]) or after[1][1] != dense[0]:
            raise BlockSparseFormatError(
                f"quantization_config.cut: {name} of {shape[0]}x{shape[1]} has no layer after it that is cut likewise"
            )
