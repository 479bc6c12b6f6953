"""Block-sparse ViT and DeiT classifiers for `trust_remote_code=True`, where hf_blockprune is not installed.

The classes add nothing to the native ones. Importing this file is what matters: it registers the "blockprune" method,
and `from_pretrained` then builds `BlockSparseLinear` modules where the checkpoint's config names them.
"""

from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTForImageClassification,
)

from .blockprune_quantizer import QUANT_METHOD


class BlockPruneViTForImageClassification(ViTForImageClassification):
    """`ViTForImageClassification` with block-sparse layers."""

    quantization_method = QUANT_METHOD


class BlockPruneDeiTForImageClassification(DeiTForImageClassification):
    """`DeiTForImageClassification` with block-sparse layers."""

    quantization_method = QUANT_METHOD


class BlockPruneDeiTForImageClassificationWithTeacher(DeiTForImageClassificationWithTeacher):
    """`DeiTForImageClassificationWithTeacher` with block-sparse layers."""

    quantization_method = QUANT_METHOD
