"""Which module may import which, and what `import hf_blockprune` may cost."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import hf_blockprune
from hf_blockprune.after_import import after_import
from hf_blockprune.hub.blockprune_backends import available_backends

PACKAGE = Path(hf_blockprune.__file__).parent
NAME = "hf_blockprune"
# Rooms, folders and modules that stand alone: each may import from those above it only.
ORDER = (
    "hub",
    "version types errors checks files stored_values settings_file after_import",
    "_cpu",
    "runs",
    "display",
    "score",
    "budget",
    "config",
    "cost",
    "model",
    "measure",
    "sources",
    "data",
    "evaluate",
    "calibration",
    "reorder",
    "refit",
    "choose",
    "report",
    "recover",
    "checkpoint",
    "export",
    "pages",
    "finetune",
    "pruner",
    "jobs",
    "cli",
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
PURE = (
    "score/blocks",
    "score/magnitude",
    "score/obs",
    "score/statistics",
    "score/taylor",
    "score/trace",
    "choose/allocation",
    "refit/solve",
    "reorder/hidden",
    "reorder/order",
    "reorder/stream",
)
NOT_IN_PURE = ("transformers", "datasets", "accelerate", f"{NAME}.calibration", f"{NAME}.pruner", f"{NAME}.hub")
MAY_USE_TYPER = "cli"
MAY_LISTEN = {"calibration", "refit", "recover", "measure"}


def module_of(path):
    """Dotted name of a package file, and the package that its relative imports start from."""
    parts = (NAME, *path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__":
        return ".".join(parts[:-1]), parts[:-1]
    return ".".join(parts), parts[:-1]


def imported(source, package):
    """Absolute names of everything that a source imports, at any depth of it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return names


def within(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def wrong_arrows_of_pure(source, package=(NAME,)):
    return {name for name in imported(source, package) if within(name, NOT_IN_PURE)}


def wrong_arrows_of_hub(source):
    """Files of hub/ travel alone: beside installed packages they may name their neighbours only."""
    wrong = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wrong |= {alias.name for alias in node.names if within(alias.name, (NAME,))}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            neighbour = node.level == 1 and module and "." not in module
            elsewhere = node.level == 0 and not within(module, (NAME,))
            if not neighbour and not elsewhere:
                wrong.add("." * node.level + module)
    return wrong


FILES = sorted(PACKAGE.rglob("*.py"))
PURE_FILES = [path for path in FILES if str(path.relative_to(PACKAGE).with_suffix("")) in PURE]
HUB_FILES = [path for path in FILES if path.parent == PACKAGE / "hub"]


def room_of(module):
    """The room of a name such as hf_blockprune.score.blocks; None for names of the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == NAME and len(parts) > 1 and parts[1] in LEVEL else None


def file_id(path):
    return str(path.relative_to(PACKAGE))


def test_the_walk_finds_the_package():
    assert {path.stem for path in PURE_FILES} == {name.rpartition("/")[2] for name in PURE}
    assert {path.stem for path in HUB_FILES} >= {"blockprune_layout", "blockprune_linear", "blockprune_quantizer"}


def test_every_room_has_its_place_in_the_order():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert rooms == {*LEVEL}


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=file_id)
def test_a_room_imports_from_rooms_above_it_only(path):
    module, package = module_of(path)
    here = room_of(module)
    rooms = {room_of(name) for name in imported(path.read_text(encoding="utf-8"), package)} - {here, None}
    assert {room for room in rooms if LEVEL[room] > LEVEL[here]} == set()


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_forward_hooks_live_in_few_rooms(path):
    if "register_forward" in path.read_text(encoding="utf-8"):
        assert room_of(module_of(path)[0]) in MAY_LISTEN


@pytest.mark.parametrize("path", PURE_FILES, ids=file_id)
def test_deciding_what_to_remove_needs_tensors_alone(path):
    assert wrong_arrows_of_pure(path.read_text(encoding="utf-8")) == set()


def test_errors_take_no_more_from_the_hub_files_than_the_layout():
    """Every pure module imports errors, so what errors imports, they do."""
    names = imported((PACKAGE / "errors.py").read_text(encoding="utf-8"), (NAME,))
    assert {n for n in names if within(n, NOT_IN_PURE) and not within(n, (f"{NAME}.hub.blockprune_layout",))} == set()


@pytest.mark.parametrize("path", HUB_FILES, ids=file_id)
def test_hub_files_import_their_neighbours_only(path):
    assert wrong_arrows_of_hub(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("path", HUB_FILES, ids=file_id)
def test_neighbours_that_hub_files_import_exist(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            assert (PACKAGE / "hub" / f"{node.module}.py").is_file()


@pytest.mark.parametrize("path", HUB_FILES, ids=file_id)
def test_hub_files_demand_nothing_that_transformers_does_without(path):
    """Loading a checkpoint's own code fails where a package that transformers finds in it is missing."""
    demanded = set(get_imports(path)) - sys.stdlib_module_names
    assert demanded <= {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != MAY_USE_TYPER], ids=file_id)
def test_nothing_imports_the_command_line(path):
    _, package = module_of(path)
    names = imported(path.read_text(encoding="utf-8"), package)
    assert {name for name in names if within(name, (f"{NAME}.cli", "typer"))} == set()


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from .errors import ConfigError\nimport torch.nn.functional as F", set()),
        ("import transformers", {"transformers"}),
        ("def f():\n    from datasets import Image", {"datasets", "datasets.Image"}),
        ("from . import calibration", {f"{NAME}.calibration"}),
        ("from .hub import blockprune_cost", {f"{NAME}.hub", f"{NAME}.hub.blockprune_cost"}),
        ("import hf_blockprune.pruner.pruner as p", {f"{NAME}.pruner.pruner"}),
        ("import accelerated", set()),
    ],
)
def test_wrong_arrows_of_pure_modules_are_seen(source, wrong):
    assert wrong_arrows_of_pure(source) == wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from .blockprune_layout import pack\nfrom transformers import AutoConfig\nimport torch", set()),
        ("from ..blocks import block_sums", {"..blocks"}),
        ("from . import blockprune_layout", {"."}),
        ("import hf_blockprune.score.blocks", {f"{NAME}.score.blocks"}),
        ("def f():\n    from hf_blockprune.hub.blockprune_layout import pack", {f"{NAME}.hub.blockprune_layout"}),
    ],
)
def test_wrong_arrows_of_hub_files_are_seen(source, wrong):
    assert wrong_arrows_of_hub(source) == wrong


def modules_after(statement):
    """Top-level modules that a fresh process has loaded after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_leaves_heavy_and_optional_dependencies_alone():
    loaded = modules_after("import hf_blockprune")
    heavy = {"torch", "transformers", "accelerate", "datasets", "huggingface_hub", "numpy", "PIL"}
    optional = {"evaluate", "optimum", "typer", "sklearn", "matplotlib", "onnx", "pynvml"}
    assert NAME in loaded
    assert loaded & (heavy | optional | {"peft"}) == set()
    loaded = modules_after("from hf_blockprune import BlockPruner")
    assert {"torch", "transformers"} <= loaded
    assert loaded & {"datasets", *optional} == set()
    assert f"{NAME}.hub.blockprune_triton" not in loaded  # torch may import triton itself, wherever it is installed


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["finetune", "--help"]])
def test_help_imports_none_of_what_commands_need(arguments):
    code = f"from {NAME}.cli import app\napp({arguments}, standalone_mode=False)"
    assert modules_after(code) & {"torch", "transformers", "accelerate", "datasets", "numpy"} == set()


def test_completion_imports_none_of_what_commands_need(monkeypatch):
    monkeypatch.setenv("_BLOCKPRUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "blockprune simulate --device cpu")
    monkeypatch.setenv("COMP_CWORD", "3")
    code = f"from {NAME}.cli import app\ntry:\n    app(prog_name='blockprune')\nexcept SystemExit:\n    print()"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('torch' in sys.modules)".replace("from", "import sys\nfrom", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"cpu-avx2", "cpu-avx512"} <= set(done.stdout.split())
    assert done.stdout.split()[-1] == "False"


def test_public_names_are_those_of_the_modules_they_are_said_to_come_from():
    assert set(hf_blockprune.__all__) == {*hf_blockprune._MODULE_OF, "__version__"}
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == hf_blockprune._MODULE_OF
    assert all(getattr(hf_blockprune, name) is not None for name in hf_blockprune.__all__)


@pytest.mark.parametrize(
    "order",
    [
        "import hf_blockprune, torch, transformers",
        "import torch, transformers.modeling_utils, hf_blockprune",
    ],
)
def test_torch_and_transformers_are_extended_in_any_order_of_imports(order):
    code = f"""
{order}
assert torch.ops.blockprune.block_sparse_linear
from transformers import AutoModelForImageClassification, ViTModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "blockprune" in AUTO_QUANTIZER_MAPPING
import sys
assert not any(type(finder).__name__ == "AfterImport" and finder.name != "peft" for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "first",
    ["errors.BlockSparseFormatError", "_cpu.backend", "hub.modeling_blockprune"],
)
def test_whatever_is_imported_first_the_op_is_defined(first):
    module, _, name = f"{NAME}.{first}".rpartition(".")
    code = f"from {module} import {name}\nimport torch\nassert torch.ops.blockprune.block_sparse_linear\n"
    code += f"from {NAME}.hub.blockprune_backends import available_backends\nprint(available_backends())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(available_backends())


def test_a_version_that_cannot_be_extended_is_warned_of(monkeypatch):
    def lacks():
        raise ImportError("no such name")

    with pytest.warns(UserWarning, match="cannot extend this version of json: no such name"):
        after_import("json", lacks)


def test_deciding_what_to_remove_loads_no_training_libraries():
    """Read from its files alone, without the package's __init__, which imports everything else."""
    stub = f"import types; p = types.ModuleType('{NAME}'); p.__path__ = [{str(PACKAGE)!r}]; sys.modules['{NAME}'] = p"
    loaded = modules_after(f"{stub}\nimport {NAME}.score.obs, {NAME}.choose.allocation, {NAME}.refit.solve")
    assert loaded & {"transformers", "datasets", "accelerate", "huggingface_hub"} == set()
