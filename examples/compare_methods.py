"""Compare pruning methods image by image: `python examples/compare_methods.py MODEL CALIBRATION LABELLED`."""

import sys

from hf_blockprune import BlockPruneConfig, BlockPruner, Budget

model_name, calibration, labelled = sys.argv[1:4]

dense = BlockPruner.from_pretrained(model_name)
answers = dense.predictions(labelled)  # once, for all comparisons
# Best first. At 90 % of the FLOPs each of them leaves something to compare; further down only "obs" does.
for method in ("obs", "taylor", "magnitude"):
    config = BlockPruneConfig(method=method, budget=Budget("flops", 0.9))
    pruner = BlockPruner.from_pretrained(model_name, config)
    pruner.prune(calibration)
    result = pruner.evaluate(labelled, against=answers)
    assert result.interval is not None  # there was a model to compare with
    low, high = result.interval
    print(
        f"{method:10s} top-1 {result.top1:.1%} on {result.num_images} images, dense {result.baseline_top1:.1%}, "
        f"change {result.delta:+.1%} (95 % interval {low:+.1%} to {high:+.1%})",
        flush=True,  # the next one takes minutes
    )
