"""Block-structured pruning of vision transformers, with checkpoints that load with `from_pretrained`.

Importing the package registers the "blockprune" format with transformers, its kernels with the op, and LoRA with peft.
"""

from ._cpu.backend import register as _register_cpu_kernels
from .adapters import register as _register_adapters
from .config import BlockPruneConfig, Budget, CalibrationConfig, RecoveryConfig
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
from .evaluation import Evaluation
from .finetune_config import AugmentConfig, DistillationConfig, FinetuneConfig, GradualConfig
from .html_report import write_report
from .hub.blockprune_linear import BlockSparseLinear
from .hub.blockprune_quantizer import BlockPruneQuantizationConfig, sparsify
from .microbatch import micro_batch
from .pruner import BlockPruner
from .sources import DataSource
from .version import __version__

_register_cpu_kernels()
_register_adapters()

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
    "micro_batch",
    "sparsify",
    "write_report",
]
