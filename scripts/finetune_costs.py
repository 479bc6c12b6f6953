"""What recipes/finetune-*.yaml ask of the hardware, computed and not measured: the table of recipes/README.md.

FLOPs of a step follow from the architecture: the teacher's forward pass, the student's with the kept share, and a
backward pass of twice the dense forward, as GPUs multiply with unpacked weights there. Memory is that of weights,
gradients, AdamW's two moments, the average and the copy that is evaluated, with the teacher, and of what autograd saves
for the images that a process takes at once, which is counted on one image of the dense model.
"""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import DeiTConfig, DeiTForImageClassification, SwinConfig, SwinForImageClassification

from hf_blockprune import FinetuneConfig
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.settings_file import read_settings

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SWIN: dict[str, Any] = {"image_size": 224, "patch_size": 4, "window_size": 7, "num_labels": 1000}
DEIT: dict[str, Any] = {"num_labels": 1000}
CONFIGS = {
    "deit-small": DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, **DEIT),
    "deit-base": DeiTConfig(**DEIT),
    "swin-tiny": SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], **SWIN),
    "swin-base": SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], **SWIN),
}
JOB_KEYS = ("model", "teacher", "dataset", "split", "evaluation", "output")
KEPT = {"small-16x16": 0.5, "flops45": 0.45, "swin-tiny": 0.72, "swin-base": 0.77}
IMAGENET = 1_281_167
# Weights, gradients, two moments, average and evaluated copy; as large as the dense model's, which none exceeds.
COPIES = 6
SUSTAINED = 100e12  # FLOP/s that the time is given for


def class_of(config: DeiTConfig | SwinConfig) -> type:
    return DeiTForImageClassification if isinstance(config, DeiTConfig) else SwinForImageClassification


def saved_bytes(config: DeiTConfig | SwinConfig) -> int:
    """What autograd keeps of one image in single precision, weights left out."""
    with torch.device("meta"):
        model = class_of(config)(config)
        pixels = torch.empty(1, 3, 224, 224)
    weights = {id(p) for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if id(whole) not in weights:
            seen[id(whole)] = whole
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(pixel_values=pixels)
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def main() -> None:
    saved = {name: saved_bytes(config) for name, config in CONFIGS.items()}
    for recipe in sorted(RECIPES.glob("finetune-*.yaml")):
        values = {key: value for key, value in read_settings(recipe).items() if key not in JOB_KEYS}
        settings, name = FinetuneConfig.from_dict(values), recipe.stem.removeprefix("finetune-")
        family = next(key for key in CONFIGS if name.startswith(key))
        kept = next((share for key, share in KEPT.items() if key in name), 0.5)
        config = CONFIGS[family]
        with torch.device("meta"):
            flops = count_flops(class_of(config)(config))
        teacher = settings.distillation.needs_teacher
        image = flops.total * (teacher + kept + 2)
        steps = math.ceil(IMAGENET / settings.batch_size) * settings.epochs
        weights = 4 * flops.parameters * (COPIES + teacher) / 1e9
        half = 2 if settings.precision != "no" else 1
        views = settings.micro_batch * saved[family] / half / 1e9
        hours = image * IMAGENET * settings.epochs / SUSTAINED / 3600
        print(
            f"| `{recipe.stem}` | {settings.batch_size} | {image * settings.batch_size / 1e12:.0f} T | {steps} | "
            f"{image * IMAGENET * settings.epochs / 1e18:.1f} E | {hours:.0f} h | {weights:.1f} GB | "
            f"{views:.1f} GB ({settings.micro_batch}) |"
        )


if __name__ == "__main__":
    main()
