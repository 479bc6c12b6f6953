"""Block-structured pruning of vision transformers, with checkpoints that load with `from_pretrained`.

Importing the package registers the "blockprune" format with transformers, and its kernels with the op.
"""

from ._cpu.backend import register as _register_cpu_kernels
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
