"""Prune a vision transformer and save it block-sparse: `python examples/prune.py MODEL IMAGES OUTPUT`."""

import sys

from hf_blockprune import BlockPruneConfig, BlockPruner, Budget

model_name, images, output = sys.argv[1:4]

config = BlockPruneConfig(
    block_shape=(16, 16),
    method="taylor",
    budget=Budget("flops", 0.75),  # keep 75 % of the whole model's FLOPs
)
pruner = BlockPruner.from_pretrained(model_name, config)
pruner.prune(images)
pruner.save_pretrained(output)

report = pruner.report()
print(f"kept {report['flops_ratio']:.1%} of the FLOPs, {report['density']:.1%} of the blocks")
print(f"{report['size_bytes']:,} bytes on disk instead of {report['dense_size_bytes']:,}")
