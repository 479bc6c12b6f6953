"""Small block-sparse models, and processes of their own that load what was saved of them."""

import json
from pathlib import Path

import torch
from torch import nn

from hf_blockprune import BlockPruneConfig, BlockPruner, sparsify
from hf_blockprune.hub import modeling_blockprune
from tests.conftest import WITHOUT_THE_PACKAGE
from tests.forking import plain_forks

HUB_FILES = {path.name for path in Path(modeling_blockprune.__file__).parent.glob("*.py")} - {"__init__.py"}
OWN_KEYS = {"quantization_config", "auto_map", "transformers_weights"}
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# Loads each folder that it is given, and keeps what the models answer.
LOAD_ALL = """
import json, sys
import torch, transformers

folders, work, kwargs = json.loads(sys.argv[1])
answers = {}
for name, (auto, folder) in folders.items():
    model = getattr(transformers, auto).from_pretrained(folder, **kwargs)
    with torch.no_grad():
        output = model(pixel_values=torch.load(f"{work}/pixels.pt"))
    sparse = sum(type(module).__name__ == "BlockSparseLinear" for module in model.modules())
    answers[name] = (sparse, output["logits"] if "logits" in output else output["last_hidden_state"])
torch.save(answers, f"{work}/answers.pt")
"""


def run(script, work, *arguments, package, **environment):
    """Run a script in a process of its own that has, or has not, the package."""
    first = "import hf_blockprune\n" if package else WITHOUT_THE_PACKAGE
    # As HF_HOME says to a process that has yet to import it: no code of other tests' models is at hand.
    first += f"import transformers.dynamic_module_utils as code; code.HF_MODULES_CACHE = {str(work / 'home')!r}\n"
    forks = plain_forks()
    return forks.run("-c", first + script, *arguments, cwd=work, env={**forks.env, **environment})


def answers_of(folders, work, *, package, **kwargs):
    """(block-sparse layers, answers) by name, from a process of its own; folders are (Auto class, folder) by name."""
    torch.save(PIXELS, work / "pixels.pt")
    done = run(LOAD_ALL, work, json.dumps([folders, str(work), kwargs]), package=package)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(work / "answers.pt")


def sparse_model(model, *, shape=(8, 8), chosen=lambda name: True):
    """A model with half of the blocks of those Linears of its repeated layers that are chosen."""
    generator = torch.Generator().manual_seed(0)
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(lists) and chosen(name):
            grid = -(-module.out_features // shape[0]), -(-module.in_features // shape[1])
            masks[name] = torch.rand(grid, generator=generator) < 0.5
    return sparsify(model.eval(), masks, shape)


@torch.no_grad()
def answer(model):
    output = model(pixel_values=PIXELS)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def assert_same(answers, expected):
    torch.testing.assert_close(answers, expected, rtol=1e-5, atol=1e-5)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def pruned(model, processor):
    config = BlockPruneConfig(method="magnitude", block_shape=(8, 8), budget={"metric": "density", "ratio": 0.5})
    pruner = BlockPruner(model, processor, config.replace(refit=False), name="tiny")
    pruner.prune()
    return pruner
