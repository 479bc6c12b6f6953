"""Write the checkpoint that every later version must read: tests/fixtures/format-6, after those of formats 1 to 5.

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
from hf_blockprune.hub.blockprune_heads import CutHeads
from hf_blockprune.hub.blockprune_rounding import quantize
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, set_schedule
from hf_blockprune.model.layers import linear_in
from hf_blockprune.model.structure import TransformerLayer, find_transformer_layers
from hf_blockprune.reorder.cutting import cut_hidden_units
from hf_blockprune.score.blocks import grid_shape

BLOCK_SHAPE = (8, 8)
SCHEDULE = TokenSchedule((5, 4, 0), 16)


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
    """A ViT in int8 in which tokens merge, with blocks on a chequerboard.

    Its first layer has one small head, and hidden units without blocks are cut out.
    """
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    model = ViTForImageClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        # No two pairs of patches are as alike as rounding might make them.
        model.vit.embeddings.position_embeddings.mul_(10)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in n}
    masks = {}
    layers = find_transformer_layers(model, linears)
    cut = _cut_heads(model, layers[0])
    linears = {name: model.get_submodule(name) for name in linears}
    for name, linear in linears.items():
        rows, cols = grid_shape((linear.out_features, linear.in_features), BLOCK_SHAPE)
        masks[name] = (torch.arange(rows)[:, None] + torch.arange(cols)) % 2 == 0
    masks[layers[0].fc1][-2:] = False
    masks[layers[0].fc2][:, -2:] = False
    sparsify(model, masks, BLOCK_SHAPE, cut=dict.fromkeys(cut.names(), (16, 16)), heads=[cut])
    cut_hidden_units(model, layers)
    set_schedule(model, SCHEDULE, masks)
    return quantize(model)


@torch.no_grad()
def _cut_heads(model: ViTForImageClassification, layer: TransformerLayer) -> CutHeads:
    """Replace an attention's Linears by those that its first head keeps of the first 6 features of 8."""
    cut = CutHeads(layer.query, layer.key, layer.value, layer.out, 1, 6, 2, 8)
    for name in cut.names():
        dense = linear_in(model, name)
        weight = dense.weight[:, cut.places()] if name == cut.out else dense.weight[cut.places()]
        small = torch.nn.Linear(weight.shape[1], weight.shape[0])
        small.weight.copy_(weight)
        small.bias.copy_(dense.bias if name == cut.out else dense.bias[cut.places()])
        model.set_submodule(name, small)
    return cut


if __name__ == "__main__":
    main()
