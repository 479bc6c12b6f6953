"""Block-sparse classifiers for `trust_remote_code=True`, where hf_blockprune is not installed.

The classes add nothing to the native ones. Importing this file is what matters: it registers the "blockprune" method,
and `from_pretrained` then builds `BlockSparseLinear` modules where the checkpoint's config names them.
"""

from transformers import (
    BeitForImageClassification,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2ForImageClassification,
    SwinForImageClassification,
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


class BlockPruneBeitForImageClassification(BeitForImageClassification):
    """`BeitForImageClassification` with block-sparse layers."""

    quantization_method = QUANT_METHOD


class BlockPruneDinov2ForImageClassification(Dinov2ForImageClassification):
    """`Dinov2ForImageClassification` with block-sparse layers."""

    quantization_method = QUANT_METHOD


class BlockPruneSwinForImageClassification(SwinForImageClassification):
    """`SwinForImageClassification` with block-sparse layers."""

    quantization_method = QUANT_METHOD
