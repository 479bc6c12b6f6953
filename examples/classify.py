"""Classify a picture with a pruned model in a pipeline: `python examples/classify.py CHECKPOINT PICTURE`."""

import sys

from transformers import pipeline

import hf_blockprune  # noqa: F401  (registers the block-sparse format)

checkpoint, picture = sys.argv[1:3]

classify = pipeline("image-classification", model=checkpoint)
for answer in classify(picture, top_k=3):
    print(f"{answer['score']:.3f}  {answer['label']}")
