"""A page where a picture is classified by the dense and by a pruned model, with what each takes, side by side.

    python examples/app.py PRUNED DENSE [--port 7860]

Needs the extra `demo`: pip install 'hf_blockprune[demo]'. Nothing is sent anywhere. Ctrl-C ends it.
"""

import argparse
import os
import sys
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from PIL import Image

from hf_blockprune import BlockPruneError, BlockPruner, BlockSparseFormatError, ModelError
from hf_blockprune.data.model_input import channels_of, shared_picture_size
from hf_blockprune.hub.blockprune_layers import is_pruned
from hf_blockprune.model.outputs import classifies
from hf_blockprune.model.tasks import SINGLE, task_of
from hf_blockprune.sources.pictures import Decoding, decode_image

SHOWN = 5
TIMING_SECONDS = 2.0


def main() -> None:
    """Load both models and serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="pruned model: a folder or a Hub name")
    parser.add_argument("dense", help="the dense model that it was pruned from")
    parser.add_argument("--port", type=int, help="by default 7860, or the next one that is free")
    options = parser.parse_args()
    try:
        models = load(options.pruned, options.dense)
        served = page(models, options)
        # Its own message waits in a buffer where standard output is no terminal.
        _, address, _ = served.launch(server_port=options.port, prevent_thread_lock=True, quiet=True, show_error=True)
    except (BlockPruneError, BlockSparseFormatError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{address} shows {options.dense} and {options.pruned}; Ctrl-C ends it", flush=True)
    served.block_thread()


def load(pruned: str, dense: str) -> dict[str, BlockPruner]:
    """Both models by what they are.

    Raises:
        ModelError: one is not what it was named as, or they cannot be compared.
    """
    models = {"dense": BlockPruner.from_pretrained(dense), "pruned": BlockPruner.from_pretrained(pruned)}
    if not is_pruned(models["pruned"].model):
        raise ModelError(f"{pruned} is not pruned; name the pruned model first, and then the dense one")
    if is_pruned(models["dense"].model):
        raise ModelError(f"{dense} is pruned too; name the dense model that {pruned} was pruned from")
    for name, model in zip((dense, pruned), models.values(), strict=True):
        if not classifies(model.model, model.processor.to_dict()) or task_of(model.model.config).problem != SINGLE:
            raise ModelError(f"{name} does not tell the one class of a picture, which is what this page shows")
    labels = [model.model.config.id2label or {} for model in models.values()]
    if labels[0] != labels[1]:
        raise ModelError(
            f"{dense} and {pruned} know other classes ({len(labels[0])} and {len(labels[1])}); name the dense model "
            "that it was pruned from"
        )
    shared_picture_size(models["pruned"], models["dense"])
    return models


def page(models: dict[str, BlockPruner], options: argparse.Namespace) -> gr.Blocks:
    """The page: a picture in, predictions of both models and their times out."""
    with gr.Blocks(title="Dense and pruned, side by side") as blocks:
        gr.Markdown(f"# Dense and pruned, side by side\n\n{options.dense} and {options.pruned}")
        picture = gr.Image(type="pil", label="Picture")
        with gr.Row():
            answers = [gr.Label(num_top_classes=SHOWN, label=name) for name in models]
        times = gr.Markdown()
        picture.change(lambda image: compare(models, image), picture, [*answers, times], api_name="compare")
    return blocks


def compare(models: dict[str, BlockPruner], picture: Image.Image | None) -> list[Any]:
    """Predictions of each model as {class: probability}, and a table of what they took."""
    if picture is None:
        return [None] * len(models) + [""]
    return [*(classify(model, picture) for model in models.values()), timings(models)]


@torch.inference_mode()
def classify(pruner: BlockPruner, picture: Image.Image) -> dict[str, float]:
    """The likeliest classes with their probabilities, by the model's own image processor."""
    config: Any = pruner.model.config
    image = decode_image(picture, Decoding(channels_of(config)))
    pixels = pruner.processor(image, return_tensors="pt")["pixel_values"].to(pruner.model.device)
    top = pruner.model(pixel_values=pixels).logits[0].softmax(-1).topk(min(SHOWN, config.num_labels))
    return {config.id2label[int(index)]: float(share) for share, index in zip(*top, strict=True)}


def timings(models: dict[str, BlockPruner]) -> str:
    """Both models by turns on one image of the size that pictures reach them in, as a table."""
    found = models["pruned"].benchmark(against=models["dense"], seconds=TIMING_SECONDS)
    (row,) = found["rows"]
    return (
        f"| one image on {found['device']} | median |\n|---|---|\n| dense | {row['dense_latency_ms']:.1f} ms |\n"
        f"| pruned | {row['latency_ms']:.1f} ms |\n| speed-up | {row['speedup']:.2f}x |\n"
    )


if __name__ == "__main__":
    main()
