"""Lets peft put LoRA on block-sparse layers, once it gets imported: this package does not need it."""

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterImport(MetaPathFinder):
    """Finds peft where it is found without this, and completes its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        others = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _teach()

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Teach peft block-sparse layers, now or once it gets imported."""
    if sys.modules.get("peft") is not None:  # None keeps it from being imported
        _teach()
    elif not any(type(finder).__name__ == _AfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _teach() -> None:
    try:
        from . import lora

        lora.teach()
    except (ImportError, AttributeError) as error:
        warnings.warn(f"this version of peft cannot adapt block-sparse layers: {error}", stacklevel=2)
