"""Which Linears of a model are pruned."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import BlockPruneConfig
from ..errors import ConfigError, ModelError
from ..hub.blockprune_names import unstorable
from ..score.blocks import check_block_fits
from .layers import layer_lists

logger = logging.get_logger(__name__)


def find_targets(
    model: nn.Module, config: BlockPruneConfig, tokens: Mapping[str, float] | None = None
) -> dict[str, nn.Linear]:
    """The Linears that a config selects, by module name, in forward order.

    Candidates are the Linears of the repeated layers (see `layer_lists`): patch embedding, pooler and heads
    stay dense. Of these, `targets` selects and `ignore` takes out.

    Args:
        model: a transformers model.
        config: with `targets`, `ignore` and the block shape.
        tokens: rows that each Linear multiplies for one image, by module name; those that see none are left out, such
            as the layers of a text tower. None for no such knowledge.

    Raises:
        ModelError: the model has no Linear in repeated layers.
        ConfigError: a pattern matches nothing, nothing is left, or a block is larger than a matrix.
    """
    lists = tuple(f"{name}." for name, _ in layer_lists(model))
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and lists and name.startswith(lists)
    }
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no target Linears: none lies in a repeated layer. "
            "Vision transformers such as ViT and DeiT can be pruned"
        )
    idle = [name for name in candidates if tokens is not None and not tokens.get(name)]
    if len(idle) == len(candidates):
        raise ModelError(f"{type(model).__name__}: none of its {len(idle)} Linears in repeated layers sees an image")
    if idle:
        logger.warning(f"{len(idle)} Linears see nothing of an image and stay as they are (first: {idle[0]}).")
        candidates = {name: linear for name, linear in candidates.items() if name not in idle}
    for key in ("targets", "ignore"):
        for pattern in getattr(config, key):
            if not any(fnmatchcase(name, pattern) for name in candidates):
                raise ConfigError(f"{key}: {pattern!r} matches no Linear; names look like {next(iter(candidates))}")
    targets = {
        name: module
        for name, module in candidates.items()
        if _matches(name, config.targets) and not _matches(name, config.ignore)
    }
    if not targets:
        raise ConfigError("targets and ignore leave no layer to prune; shorten ignore")
    for name, module in targets.items():
        check_block_fits(name, (module.out_features, module.in_features), config.block_shape)
    return targets


def check_storable(model: PreTrainedModel, names: Collection[str]) -> None:
    """Refuse layers that could be pruned but not saved, before any long work is begun.

    Raises:
        ModelError: naming them.
    """
    if refused := unstorable(model, names):
        raise ModelError(
            f"{type(model).__name__}: {len(refused)} of its layers cannot be stored block-sparse, as transformers "
            f"changes them or their names while it loads ({', '.join(refused[:3])}); leave them out with ignore"
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
