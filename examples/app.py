"""A page where a picture is classified by the dense and by a pruned model, with what each takes, side by side.

    python examples/app.py PRUNED DENSE [--port 7860]

Needs the extra `demo`: pip install 'hf_blockprune[demo]'. Nothing is sent anywhere.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from PIL import Image

from hf_blockprune import BlockPruner
from hf_blockprune.hardware.flops import image_size
from hf_blockprune.latency import measure_latency
from hf_blockprune.model_input import channels_of
from hf_blockprune.pictures import Decoding, decode_image

SHOWN = 5
TIMING_SECONDS = 2.0


def main() -> None:
    """Load both models and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="pruned model: a folder or a Hub name")
    parser.add_argument("dense", help="the dense model that it was pruned from")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    models = {name: BlockPruner.from_pretrained(getattr(options, name)) for name in ("dense", "pruned")}
    page(models, options).launch(server_port=options.port)


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
    """The likeliest classes with their probabilities."""
    config: Any = pruner.model.config
    image = decode_image(picture, Decoding(channels_of(config)))
    inputs = pruner.processor(image, return_tensors="pt").to(pruner.model.device)
    top = pruner.model(**inputs).logits[0].softmax(-1).topk(min(SHOWN, config.num_labels))
    return {config.id2label[int(index)]: float(share) for share, index in zip(*top, strict=True)}


def timings(models: dict[str, BlockPruner]) -> str:
    """Both models by turns on one image of the size that they take, as a table."""
    pruned = models["pruned"]
    found = measure_latency(
        pruned.model,
        models["dense"].model,
        image_size=image_size(pruned.model.config, pruned.processor.to_dict()),
        seconds=TIMING_SECONDS,
    )
    (row,) = found["rows"]
    return (
        f"| one image on {found['device']} | median |\n|---|---|\n| dense | {row['dense_latency_ms']:.1f} ms |\n"
        f"| pruned | {row['latency_ms']:.1f} ms |\n| speed-up | {row['speedup']:.2f}x |\n"
    )


if __name__ == "__main__":
    main()
