"""Every `python` and `sh` block of the README and of docs/ runs, in the order of its page; `yaml` and `json` is valid.

Names in them stand for what is made here: facebook/deit-base-patch16-224 is a folder with a tiny model, IMAGES one with
pictures. `console` marks what a user types elsewhere, such as installing the package.
"""

import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from hf_blockprune.jobs.finetune import FinetuneJob
from hf_blockprune.jobs.prune import PruneJob
from tests.conftest import NUM_LABELS, ROOT, tiny_model, write_images
from tests.fake_hub import FakeHub
from tests.forking import Forks

pytestmark = pytest.mark.slow

MODEL = "facebook/deit-base-patch16-224"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def blocks_of(name, *kinds):
    """(kind, text) of a page's blocks of these kinds."""
    return [(kind, text) for kind, text in BLOCK.findall(PAGES[name].read_text(encoding="utf-8")) if kind in kinds]


CODE = [name for name in PAGES if blocks_of(name, "python", "sh")]
DATA = [name for name in PAGES if blocks_of(name, "yaml", "json")]
PRUNE = f"prune {MODEL} --dataset IMAGES --method magnitude --block-shape 8x8 --budget flops=0.8 --quiet --output"
PRUNER = f"""
from hf_blockprune import BlockPruneConfig, BlockPruner, Budget
config = BlockPruneConfig(method="magnitude", block_shape=(8, 8), budget=Budget("flops", 0.8))
pruner = BlockPruner.from_pretrained("{MODEL}", config)
"""
# What a page takes for granted, by page.
BEFORE = {
    "docs/export.md": f"""
blockprune('{PRUNE} OUT')
blockprune('export OUT --torch-export -o model.pt2')
pixel_values = torch.zeros(2, 3, 32, 32)
""",
    "docs/faq.md": f"blockprune('{PRUNE} OUT')",
    "docs/hardware.md": f"blockprune('{PRUNE} OUT')",
    "docs/kernels.md": f"""
blockprune('{PRUNE} PRUNED')
pipeline_on_cpu()
x, weight, mask = torch.randn(4, 64), torch.randn(64, 64), torch.eye(2) > 0
""",
    "docs/finetune.md": f"""
blockprune('{PRUNE} pruned')
import os; os.symlink("{MODEL}", "dense")
""",
    "docs/report.md": f"""
blockprune('{PRUNE} OUT')
{PRUNER}pruner.prune("IMAGES")
import pathlib, yaml
from hf_blockprune.hub.blockprune_devices import DEVICES
pathlib.Path("my-device.yaml").write_text(yaml.safe_dump(DEVICES["cpu-avx512"]))
""",
    "docs/share.md": f"blockprune('{PRUNE.replace('magnitude', 'obs')} OUT')",
    "docs/data.md": PRUNER,
}
DRIVER = """
import json, re, shlex, shutil, subprocess, sys
import torch
from accelerate.commands import accelerate_cli

def blockprune(line):
    from hf_blockprune.cli import app
    words = shlex.split(line)
    if words[0] == "benchmark" and "--seconds" not in words:
        words += ["--seconds", "0.2"]
    if code := app(words, standalone_mode=False):
        raise SystemExit(code)

def pipeline_on_cpu():
    import functools, transformers
    whole = transformers.pipeline
    transformers.pipeline = lambda *args, device, **kwargs: whole(*args, device="cpu", **kwargs)

def shell(text):
    for line in text.splitlines():
        for folder in re.findall("prune.* --output ([A-Z]+)", line):
            shutil.rmtree(folder, ignore_errors=True)  # examples write to the same ones
        if line.startswith("blockprune "):
            blockprune(line.partition("#")[0].removeprefix("blockprune "))
        elif line.startswith("accelerate "):  # whose imports are there already; what it starts is a process of its own
            sys.argv = shlex.split(line)
            accelerate_cli.main()
        elif line:
            subprocess.run(["bash", "-ec", line], check=True)

names = {"__name__": "__main__", "torch": torch, "blockprune": blockprune, "pipeline_on_cpu": pipeline_on_cpu}
for kind, text in json.load(open(sys.argv[1])):
    print(text, flush=True)
    exec(text, names) if kind == "python" else shell(text)
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """(starts processes that take a server here for the Hub, that server)."""
    folder = tmp_path_factory.mktemp("hub")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with FakeHub({}, folder / "uploads") as hub:
        hub_settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_test"}
        local = {"PATH": path, "ACCELERATE_USE_CPU": "true", "NO_PROXY": "127.0.0.1"}
        with Forks(env={**kept, **local, **hub_settings}) as forks:
            yield forks, hub


@pytest.fixture
def world(tmp_path, processor):
    """A folder in which the names that pages use are there."""
    model = tiny_model("deit", hidden_size=128, intermediate_size=384, num_attention_heads=4)
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / MODEL)
    write_images(tmp_path / "IMAGES", 12)
    for split in ("train", "validation"):  # in folders proper, since `datasets` sees one split in two links
        for folder in ("photos", "images"):
            shutil.copytree(tmp_path / "IMAGES", tmp_path / folder / split)
    for name in ("LABELLED_IMAGES", "path/to/calibration/images", "path/to/labelled/images"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "IMAGES")
    (tmp_path / "MODEL").symlink_to(tmp_path / MODEL)
    for name in ("recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    pictures = sorted((tmp_path / "IMAGES").glob("*.png"))
    (tmp_path / "tables").mkdir()
    table = Dataset.from_dict(
        {
            "photo": [{"bytes": picture.read_bytes(), "path": None} for picture in pictures],
            "species": [i % NUM_LABELS for i in range(len(pictures))],
        }
    )
    for name in ("tables/train-0.parquet", "table.parquet", "owner/name/train.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(tmp_path / name)
    (tmp_path / "shards").mkdir()
    for number in range(147):
        with tarfile.open(tmp_path / f"shards/{number:03d}.tar", "w") as shard:
            shard.add(pictures[number % len(pictures)], f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("name", CODE)
def test_code_runs(name, world, runner):
    forks, hub = runner
    hub.repos.clear()  # no page may need what another one uploads
    shutil.rmtree(forks.env["HF_HOME"], ignore_errors=True)
    blocks = [("python", BEFORE.get(name, "")), *blocks_of(name, "python", "sh")]
    (world / "blocks.json").write_text(json.dumps(blocks))
    done = forks.run("-c", DRIVER, world / "blocks.json", cwd=world)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


@pytest.mark.parametrize("name", DATA)
def test_settings_are_valid(name, tmp_path):
    for kind, text in blocks_of(name, "yaml", "json"):
        if kind == "json":
            json.loads(text if text.startswith("{") else f"{{{text}}}")
        else:
            job = {"model": "MODEL", "dataset": "IMAGES", "output": "OUT", **yaml.safe_load(text)}
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(job))
            (FinetuneJob if "finetune" in name else PruneJob).read(tmp_path / "recipe.yaml")
