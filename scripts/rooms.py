"""The rooms of the package: folders, and modules that stand alone, in import order; `python scripts/rooms.py`.

A room may import from rooms above it only. Ends with 1 where rooms import each other in a circle, a folder has more
than 12 modules (hub/, whose files travel together, may), a module more than 400 lines, or a function more than 60 (GPU
kernels may).
"""

import ast
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "hf_blockprune"
NAME, FREE = "hf_blockprune", "hub"
MOST_MODULES, MOST_LINES, MOST_OF_A_FUNCTION = 12, 400, 60


def main() -> None:
    """Print rooms by level, then what is wrong."""
    files = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
    rooms = defaultdict(list)
    for path in files:
        rooms[room_of(path)].append(path)
    arrows = {
        room: {to for path in paths for to in imported_rooms(path) if to != room} for room, paths in rooms.items()
    }
    faults = [*large(rooms), *circle(arrows)]
    for level, names in enumerate(levels(arrows)):
        for name in names:
            lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in rooms[name])
            above = ", ".join(sorted(arrows[name])) or "nothing"
            print(f"{level:2} {name:24} {len(rooms[name]):3} modules {lines:6} lines   imports {above}")
    print("\n".join(faults) or "no circle, no arrow upwards; folders, modules and functions keep to their sizes")
    sys.exit(bool(faults))


def room_of(path: Path) -> str:
    """A folder of the package, or a module beside them."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports from, at any depth of it; type checkers' imports are left out."""
    here = path.relative_to(ROOT.parent).parts[:-1]
    found = set()
    for node in _run(ast.parse(path.read_text(encoding="utf-8")).body):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            names = [stem] if len(stem) > 1 else [[*stem, alias.name] for alias in node.names]
        found |= {name[1] for name in names if name[0] == NAME and len(name) > 1}
    return {name for name in found if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}


def _run(body):
    """Every node but those under `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _run(ast.iter_child_nodes(node))


def levels(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by the longest way down to one that imports nothing; those in a circle come last."""
    level = {}
    while found := [n for n, to in arrows.items() if n not in level and all(t in level for t in to)]:
        level |= {name: 1 + max((level[to] for to in arrows[name]), default=-1) for name in found}
    found = defaultdict(list)
    for name in sorted(arrows):
        found[level.get(name, len(arrows))].append(name)
    return [found[each] for each in sorted(found)]


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A line for a circle, where there is one."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return [f"rooms import each other: {' -> '.join(reversed(error.args[1]))}"]
    return []


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A GPU kernel: dozens of arguments, one a line, and in parts it would compile to other code."""
    return any(ast.unparse(arg.annotation) == "tl.constexpr" for arg in node.args.args if arg.annotation is not None)


def large(rooms: dict[str, list[Path]]) -> list[str]:
    """A line for each folder, module and function that is too large."""
    faults = []
    for folder in sorted({path.parent for paths in rooms.values() for path in paths}):
        count = sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        if count > MOST_MODULES and folder.name != FREE:
            faults.append(f"{folder.relative_to(ROOT.parent)}: {count} modules, at most {MOST_MODULES}")
    for path in sorted(path for paths in rooms.values() for path in paths):
        text, where = path.read_text(encoding="utf-8"), path.relative_to(ROOT.parent)
        if (count := len(text.splitlines())) > MOST_LINES:
            faults.append(f"{where}: {count} lines, at most {MOST_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_kernel(node):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > MOST_OF_A_FUNCTION:
                    faults.append(f"{where}: {node.name} has {size} lines, at most {MOST_OF_A_FUNCTION}")
    return faults


if __name__ == "__main__":
    main()
