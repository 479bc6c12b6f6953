"""Lay the block-sparse kernels out as a repository for `kernels.get_kernel`, which needs no hf_blockprune.

    python scripts/kernel_repo.py OUTPUT

Files of `hf_blockprune/hub` are copied; only the op's namespace is another, as one process may load several versions of
a kernel repository. Builds without machine code are for any CPU and any GPU; where the C++ kernels are compiled here, a
build for processors of this kind has them.
"""

import argparse
import ast
import base64
import hashlib
import json
import platform
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HUB, CPU, PACKAGE = ROOT / "hf_blockprune/hub", ROOT / "hf_blockprune/_cpu", ROOT / "scripts/kernel_package"
NAME = "hf-blockprune-kernels"
MODULE = NAME.replace("-", "_")
LIBRARY = "libblockprune_cpu.so"
OLDEST_TORCH = (2, 6)  # pyproject.toml's; the C++ kernels link to no torch and so know no newest
ENTRY = "blockprune_ops"

Files = dict[str, bytes]


def main() -> None:
    """Write the repository."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder that does not exist yet")
    parser.add_argument("--version", type=int, default=1, help="of the kernels' interface")
    parser.add_argument(
        "--library", type=Path, default=CPU / LIBRARY, help="C++ kernels, compiled for this kind of machine"
    )
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output}: exists; name another folder, or remove it")
    if options.library != CPU / LIBRARY and not options.library.is_file():
        parser.error(f"--library: no file {options.library}")
    for variant, (backend, files) in builds(options.library).items():
        write_build(options.output / "build" / variant, files, backend, options.version)
        print(options.output / "build" / variant)
    card = (PACKAGE / "README.md").read_text(encoding="utf-8").replace("VERSION", str(options.version))
    (options.output / "README.md").write_text(card, encoding="utf-8")


def builds(library: Path) -> dict[str, tuple[str, Files]]:
    """(backend, files) by the build's name, as `kernels` spells it."""
    portable = hub_files(ENTRY) | {path.name: path.read_bytes() for path in PACKAGE.glob("*.py")}
    found = {f"torch-{backend}": (backend, portable) for backend in ("cpu", "cuda")}
    if library.is_file():
        torch = "".join(map(str, OLDEST_TORCH))
        found[f"torch-stable-abi{torch}-cpu-{platform.machine()}-linux"] = ("cpu", portable | cpu_files(library))
    return found


def hub_files(name: str) -> Files:
    """A module of `hub` and every neighbour that it imports, at any depth of it."""
    files: Files = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if f"{name}.py" not in files:
            files[f"{name}.py"] = (HUB / f"{name}.py").read_bytes()
            waiting += neighbours(files[f"{name}.py"])
    return files


def neighbours(source: bytes) -> list[str]:
    """Modules that a file imports by a relative name."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [node.module for node in found if node.module]


def cpu_files(library: Path) -> Files:
    """The compiled kernels with their backend, in one folder with the files of `hub`."""
    backend = (CPU / "backend.py").read_text(encoding="utf-8")
    backend = backend.replace("from ..hub.", "from .").replace("from .library ", "from .blockprune_cpu_library ")
    package = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    package = package.replace(
        "from .blockprune_layout", "from .blockprune_cpu import register\nfrom .blockprune_layout"
    )
    return {
        "__init__.py": f"{package}\nregister()\n".encode(),
        "blockprune_cpu.py": backend.encode(),
        "blockprune_cpu_library.py": (CPU / "library.py").read_bytes(),
        LIBRARY: library.read_bytes(),
    }


def write_build(folder: Path, files: Files, backend: str, version: int) -> None:
    """One build: its files, the op under the build's own name, and what `kernels` wants to know of them."""
    identity = f"_{MODULE}_{backend}_{fingerprint(files)}"
    files = {
        name: in_namespace(content, identity) if name.endswith(".py") else content for name, content in files.items()
    }
    metadata = {
        "id": identity,
        "name": NAME,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {name: digest(files[name]) for name in sorted(files)}},
    }
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def in_namespace(source: bytes, namespace: str) -> bytes:
    """A source whose ops are `torch.ops.<namespace>`."""
    text = source.decode().replace("torch.ops.blockprune", f"torch.ops.{namespace}")
    return text.replace('"blockprune::', f'"{namespace}::').encode()


def fingerprint(files: Files) -> str:
    """Eight digits, the same for the same files."""
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(f"{name} {digest(files[name])} ".encode())
    return whole.hexdigest()[:8]


def digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


if __name__ == "__main__":
    main()
