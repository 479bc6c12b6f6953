"""Which Linears of a model are pruned."""

from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

from .blocks import check_block_fits
from .config import BlockPruneConfig
from .errors import ConfigError, ModelError
from .hub.blockprune_names import unstorable


def find_targets(model: nn.Module, config: BlockPruneConfig) -> dict[str, nn.Linear]:
    """The Linears that a config selects, by module name, in forward order.

    Candidates are the Linears of the repeated layers (those inside a ModuleList): patch embedding, pooler and heads
    stay dense. Of these, `targets` selects and `ignore` takes out.

    Raises:
        ModelError: the model has no Linear in repeated layers.
        ConfigError: a pattern matches nothing, nothing is left, or a block is larger than a matrix.
    """
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
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


def check_storable(model: nn.Module, names: Collection[str]) -> None:
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
