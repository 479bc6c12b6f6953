"""Block-structured pruning of vision transformers, with checkpoints that load with `from_pretrained`.

Importing the package teaches torch the block-sparse op, transformers the "blockprune" format and peft LoRA on
block-sparse layers: at once where they have been imported, else as soon as they are. Nothing heavy is imported here.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .after_import import after_import
from .version import __version__

if TYPE_CHECKING:
    from .budget import Budget
    from .config import BlockPruneConfig, CalibrationConfig, RecoveryConfig
    from .errors import (
        BlockPruneError,
        BlockSparseFormatError,
        BudgetError,
        CheckpointError,
        ConfigError,
        DataError,
        HubError,
        ModelError,
    )
    from .evaluate.accuracy import Evaluation
    from .finetune.config import AugmentConfig, DistillationConfig, FinetuneConfig, GradualConfig
    from .hub.blockprune_linear import BlockSparseLinear
    from .hub.blockprune_quantizer import BlockPruneQuantizationConfig, sparsify
    from .measure.microbatch import micro_batch
    from .pages.page import write_report
    from .pages.tokens import draw_tokens
    from .pruner.pruner import BlockPruner
    from .sources.named import DataSource

# The names that are imported when they are asked for, by module.
_LAZY = {
    "budget": ["Budget"],
    "config": ["BlockPruneConfig", "CalibrationConfig", "RecoveryConfig"],
    "errors": [
        "BlockPruneError",
        "BlockSparseFormatError",
        "BudgetError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "HubError",
        "ModelError",
    ],
    "evaluate.accuracy": ["Evaluation"],
    "finetune.config": ["AugmentConfig", "DistillationConfig", "FinetuneConfig", "GradualConfig"],
    "pages.page": ["write_report"],
    "pages.tokens": ["draw_tokens"],
    "hub.blockprune_linear": ["BlockSparseLinear"],
    "hub.blockprune_quantizer": ["BlockPruneQuantizationConfig", "sparsify"],
    "measure.microbatch": ["micro_batch"],
    "pruner.pruner": ["BlockPruner"],
    "sources.named": ["DataSource"],
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _extend_torch() -> None:
    from ._cpu import backend, halves, int8, merging
    from .hub import blockprune_ops  # noqa: F401  (defines the op)

    backend.register()
    halves.register()
    int8.register()
    merging.register()


def _extend_transformers() -> None:
    from .hub import blockprune_quantizer  # noqa: F401  (registers the format)


def _extend_peft() -> None:
    from .finetune import lora

    lora.teach()


after_import("torch", _extend_torch)
after_import("transformers.modeling_utils", _extend_transformers)
after_import("peft", _extend_peft)

__all__ = [
    "AugmentConfig",
    "BlockPruneConfig",
    "BlockPruneError",
    "BlockPruneQuantizationConfig",
    "BlockPruner",
    "BlockSparseFormatError",
    "BlockSparseLinear",
    "Budget",
    "BudgetError",
    "CalibrationConfig",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DataSource",
    "DistillationConfig",
    "Evaluation",
    "FinetuneConfig",
    "GradualConfig",
    "HubError",
    "ModelError",
    "RecoveryConfig",
    "__version__",
    "draw_tokens",
    "micro_batch",
    "sparsify",
    "write_report",
]
