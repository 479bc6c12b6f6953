"""Small models and images that the tests make for themselves, and the way to the real ones."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As it is in what a script's shell runs in the background; processes that tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch

if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    # Threads of several workers on the same cores would wait for each other; processes that tests start inherit it.
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when GPU kernels are imported

# Models of the tests are so small that torch's own products would be faster; what is tested is the block-sparse ones.
os.environ.setdefault("BLOCKPRUNE_STORAGE", "packed")

# xdist sets these, through readline; but tables of tests go to no terminal.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)

from accelerate import Accelerator
from PIL import Image
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_blockprune.data.batches import load_images
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.score.blocks import grid_shape
from tests.fake_hub import Client, FakeHub
from tests.forking import plain_forks

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/prune.py"
# Beginning of a script that is to run as where the package is not installed.
WITHOUT_THE_PACKAGE = """
import sys

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "hf_blockprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
try:
    import hf_blockprune
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("hf_blockprune can be imported; this process was to be without it")
"""
NUM_LABELS = 7


@pytest.fixture(autouse=True)
def warnings_are_logged():
    """A command that a test before ran in this process with --quiet has silenced the package for good."""
    logging.getLogger("hf_blockprune").setLevel(logging.NOTSET)


# First, longest first, so that none of them is left to run alone in the end.
LONGEST = (
    "test_docs_code.py",
    "test_demo.py",
    "test_interruption.py",
    "test_benchmarks.py",
    "test_families.py",
    "test_layerwise.py",
    "test_training.py",
    "test_forms.py",
    "test_moves.py",
    "test_unwrapping.py",
    "test_encoders.py",
    "test_stages.py",
)


def pytest_collection_modifyitems(items):
    """Long files before those with slow tests, before all others; order within a file is left as it is."""
    files = {item.path for item in items}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    rank = {path: LONGEST.index(path.name) if path.name in LONGEST else len(LONGEST) for path in files}
    items.sort(key=lambda item: (rank[item.path], item.path not in slow))


def tiny_settings(**changes):
    """Config values of a transformer with 48-wide tokens, 96-wide MLPs and 17 tokens; blocks of 32 do not divide it."""
    settings = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "id2label": {i: f"class {i}" for i in range(NUM_LABELS)},
    }
    return {**settings, **changes}


TINY_MODELS = {
    "vit": (ViTForImageClassification, ViTConfig),
    "deit": (DeiTForImageClassification, DeiTConfig),
    "deit-distilled": (DeiTForImageClassificationWithTeacher, DeiTConfig),
}


# Families that differ from a plain ViT, with the config values that show it.
OTHER_MODELS = {
    "beit": (BeitForImageClassification, BeitConfig, {"use_relative_position_bias": True, "use_mean_pooling": True}),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, {"mlp_ratio": 2}),
    "swin": (
        SwinForImageClassification,
        SwinConfig,
        {"patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4, "mlp_ratio": 2.0},
    ),
}
ALL_FAMILIES = (*TINY_MODELS, *OTHER_MODELS)
# Parameters that a fresh model has at one value; random here, so that what is wrong with them shows.
LEARNT = ("bias", "bias_table", "lambda1", "lambda_1", "lambda_2", "_token", "position_embeddings")


def tiny_config(family, **changes):
    """Config of a tiny model of any family."""
    if family in TINY_MODELS:
        return TINY_MODELS[family][1](**tiny_settings(**changes))
    _, config_class, own = OTHER_MODELS[family]
    settings = {**tiny_settings(), **own, **changes}
    # Where widths follow from others, configs say so, and take the name for something else.
    derived = {"dinov2": ("intermediate_size",), "swin": ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return config_class(**{k: v for k, v in settings.items() if k not in derived.get(family, ())})


def tiny_model(family="vit", seed=0, **changes):
    """A random model of a family; its biases are random too, so that dropping one shows."""
    model_class = (TINY_MODELS.get(family) or OTHER_MODELS[family])[0]
    torch.manual_seed(seed)
    model = model_class(tiny_config(family, **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias" if family in TINY_MODELS else LEARNT) or parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return AutoImageProcessor.from_pretrained(folder)


@pytest.fixture(scope="session", params=list(TINY_MODELS))
def family(request):
    return request.param


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory, processor):
    """A dense ViT classifier saved with its processor; wide enough for a fine choice among 16x16 blocks."""
    folder = tmp_path_factory.mktemp("dense") / "tiny-vit"
    tiny_model("vit", hidden_size=96, intermediate_size=384).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory, processor):
    """A dense ViT classifier saved with its processor, as small as may be; blocks of 8x8 are fine there."""
    folder = tmp_path_factory.mktemp("dense") / "small-vit"
    tiny_model("vit").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_images(folder, count, *, labels=True, size=40, seed=0):
    """An imagefolder of random pictures, with a metadata.csv where labels are wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = ["file_name,label"]
    for i in range(count):
        name = f"picture_{i:03d}.png"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / name)
        rows.append(f"{name},{i % NUM_LABELS}")
    if labels:
        (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """24 labelled pictures."""
    return write_images(tmp_path_factory.mktemp("images") / "labelled", 24)


@pytest.fixture(scope="session")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def found(images):
    """The labelled pictures, opened."""
    return load_images(images)


@pytest.fixture(scope="session", autouse=True)
def _forks_end():
    yield
    if plain_forks.cache_info().currsize:
        plain_forks().close()


@pytest.fixture(scope="session")
def forks():
    """Starts processes in which libraries are imported already."""
    return plain_forks()


@pytest.fixture(scope="session")
def online(tmp_path_factory):
    """(a Hub, a client of it) for all tests, each of which takes repositories of other names."""
    folder = tmp_path_factory.mktemp("online")
    with FakeHub({}, uploads=folder / "hub") as hub, Client(folder, hub.endpoint) as client:
        yield hub, client


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ended(ranks):
    """What processes that work together ended with; where one fails, the others have some seconds, as with torchrun."""
    deadline = time.monotonic() + 300
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.poll() for rank in ranks):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.005)
    for rank in ranks:
        rank.kill()
    done = [rank.completed() for rank in ranks]
    streams = ("".join(getattr(rank, name) for rank in done) for name in ("stdout", "stderr"))
    status = next((rank.returncode for rank in done if rank.returncode), 0)
    return subprocess.CompletedProcess(ranks[0].arguments, status, *streams)


@pytest.fixture
def launch(forks):
    """Run a script with its arguments in so many processes on the CPU, as `accelerate launch` does."""

    def run(arguments, *, processes, succeeds=True):
        environment = {**forks.env, "ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = [
            forks.start(*arguments, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            if processes > 1
            else forks.start(*arguments, env=environment)
            for rank in range(processes)
        ]
        done = ended(ranks)
        assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
        return done

    return run


def accelerate_launch(arguments, *, processes):
    """Run a script with its arguments under `accelerate launch` itself, on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    command += ["--num_processes", str(processes), "--main_process_port", free_port(), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def shared_path():
    """The folder with the real model and images, or None."""
    path = Path(os.environ.get("BLOCKPRUNE_SHARED", ROOT.parent / "shared"))
    return path if (path / "models").is_dir() else None


@pytest.fixture(scope="session")
def shared():
    path = shared_path()
    if path is None:
        pytest.skip("the real model and images are not here; name their folder in BLOCKPRUNE_SHARED")
    return path


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory):
    """Nothing the tests do may depend on, or end in, the user's caches."""
    import datasets.config

    saved = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets-cache")
    yield
    datasets.config.HF_DATASETS_CACHE = saved


def whole_masks(model, dense):
    """Block masks of a pruned model in the dense one's shapes; its biases, left as they were, tell what was cut."""
    masks = {}
    for name, module in block_sparse_layers(model):
        mask = torch.zeros(grid_shape(tuple(dense.get_submodule(name).weight.shape), module.block_shape)).bool()
        stays = [torch.ones(size, dtype=torch.bool) for size in mask.shape]
        for axis, side in enumerate(("fc1", "fc2")):
            if name.endswith(side):
                fc1 = name.replace("fc2", "fc1")
                units = torch.isin(dense.get_submodule(fc1).bias, model.get_submodule(fc1).bias)
                stays[axis] = units[:: module.block_shape[axis]]
        mask[torch.outer(*stays)] = module.mask().flatten()
        masks[name] = mask
    return masks
