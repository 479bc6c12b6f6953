"""Block-structured pruning of vision transformers, with checkpoints that load with `from_pretrained`.

Importing the package registers the "blockprune" format with transformers.
"""

from .config import BlockPruneConfig, Budget, CalibrationConfig, RecoveryConfig
from .errors import (
    BlockPruneError,
    BlockSparseFormatError,
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
)
from .evaluation import Evaluation
from .hub.blockprune_linear import BlockSparseLinear
from .hub.blockprune_quantizer import BlockPruneQuantizationConfig, sparsify
from .pruner import BlockPruner
from .version import __version__

__all__ = [
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
    "Evaluation",
    "ModelError",
    "RecoveryConfig",
    "__version__",
    "sparsify",
]
