"""Write the checkpoint that every later version must read: tests/fixtures/format-3, after format-1 and format-2.

    python scripts/make_fixture.py OUTPUT

Run once for each format, by the version that brought it; what is committed is never made anew.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_blockprune import sparsify
from hf_blockprune.hub.blockprune_config import FORMAT_VERSION
from hf_blockprune.model.structure import find_transformer_layers
from hf_blockprune.reorder.cutting import cut_hidden_units
from hf_blockprune.score.blocks import grid_shape

BLOCK_SHAPE = (8, 8)


def main() -> None:
    """Write the newest format, with the logits of one fixed picture."""
    model = sparse_model()
    folder = Path(sys.argv[1], f"format-{FORMAT_VERSION}")
    model.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()  # of no use to the reader that is tested
    with torch.no_grad():
        logits = model(picture()).logits
    (folder / "logits.json").write_text(json.dumps(logits.double().tolist()) + "\n")


def picture() -> torch.Tensor:
    """[1, 3, 16, 16], a gradient that no generator of random numbers decides."""
    return torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


def sparse_model() -> ViTForImageClassification:
    """A ViT of one layer, with blocks on a chequerboard and hidden units without any, which are cut out."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = ViTForImageClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in n}
    masks = {}
    for name, linear in linears.items():
        rows, cols = grid_shape((linear.out_features, linear.in_features), BLOCK_SHAPE)
        masks[name] = (torch.arange(rows)[:, None] + torch.arange(cols)) % 2 == 0
    layers = find_transformer_layers(model, linears)
    masks[layers[0].fc1][-2:] = False
    masks[layers[0].fc2][:, -2:] = False
    sparsify(model, masks, BLOCK_SHAPE)
    cut_hidden_units(model, layers)
    return model


if __name__ == "__main__":
    main()
