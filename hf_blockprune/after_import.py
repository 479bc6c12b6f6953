"""Runs a function once another package has been imported, so that importing this one need not import that."""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterImport(MetaPathFinder):
    """Finds a module where it is found without this, and completes its import with a function.

    Args:
        name: dotted name of the module.
        complete: called once the module has run.
    """

    def __init__(self, name: str, complete: Callable[[], None]) -> None:
        self.name = name
        self.complete = complete

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        others = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _complete(self.name, self.complete)

        spec.loader.exec_module = exec_module
        return spec


def after_import(name: str, complete: Callable[[], None]) -> None:
    """Call a function now where a module has been imported, else as soon as it gets imported.

    What the function lacks in this version of the module (ImportError, AttributeError) becomes a warning, because it
    is another's import that would fail.
    """
    if sys.modules.get(name) is not None:  # None keeps it from being imported
        _complete(name, complete)
    elif not any(_same(finder, name, complete) for finder in sys.meta_path):  # as where this package is imported anew
        sys.meta_path.insert(0, AfterImport(name, complete))


def _same(finder: object, name: str, complete: Callable[[], None]) -> bool:
    if type(finder).__name__ != AfterImport.__name__ or getattr(finder, "name", None) != name:
        return False
    return getattr(finder, "complete").__qualname__ == complete.__qualname__  # noqa: B009  (another copy's class)


def _complete(name: str, complete: Callable[[], None]) -> None:
    try:
        complete()
    except (ImportError, AttributeError) as error:
        warnings.warn(f"hf_blockprune cannot extend this version of {name}: {error}", stacklevel=2)
