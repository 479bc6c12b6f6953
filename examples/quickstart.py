"""From a dense model to a pruned one that is measured, saved and loaded, in cells for an editor or Jupyter (`# %%`).

python examples/quickstart.py MODEL IMAGES LABELLED OUTPUT
"""

# %% What to prune, images to calibrate on (no labels needed), labelled images to measure on, and where to save.
import sys

import rich
from transformers import pipeline

from hf_blockprune import BlockPruneConfig, BlockPruner, Budget, write_report

model_name, images, labelled, output = sys.argv[1:5]

# %% Keep 80 % of the whole model's FLOPs, in blocks of 16x16 weights.
config = BlockPruneConfig(block_shape=(16, 16), budget=Budget("flops", 0.8))
pruner = BlockPruner.from_pretrained(model_name, config)
pruner.prune(images)

# %% What went from which layer.
rich.print(pruner.report())

# %% Accuracy, image by image beside the dense model; a small set leaves a wide interval.
result = pruner.evaluate(labelled, against=model_name)
print(f"top-1 {result.top1:.1%} (dense {result.baseline_top1:.1%}) on {result.num_images} images")

# %% Let it learn from the dense model on the same images, and measure again.
pruner.recover(images)
print(f"recovered: {pruner.evaluate(labelled, against=model_name).top1:.1%}")

# %% Time both models by turns on this machine.
row = pruner.benchmark(seconds=2)["rows"][0]
print(f"{row['dense_latency_ms']:.1f} ms dense, {row['latency_ms']:.1f} ms pruned: {row['speedup']:.2f} times as fast")

# %% Save it, and load it like any transformers model.
pruner.save_pretrained(output)
classify = pipeline("image-classification", model=output)
print(classify.model.config.quantization_config.block_shape)

# %% A page about it.
write_report(output, f"{output}.html")
