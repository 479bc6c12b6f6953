"""The transformers model inside what others put around it, and what is refused before any work."""

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import ModelError
from ..hub.blockprune_config import QUANT_METHOD

logger = logging.get_logger(__name__)


def plain_model(model: object) -> PreTrainedModel:
    """A model without what `torch.compile`, `DataParallel`, DDP or accelerate's `prepare` put around it.

    What is inside is the same object, so that whoever holds the wrapper sees it pruned; a compiled one compiles anew.

    Raises:
        ModelError: what is inside is no transformers model.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model: expected a transformers model, got {type(model).__name__}; BlockPruner.from_pretrained takes names"
        )
    from accelerate.utils import extract_model_from_parallel

    inner, outer = model, None
    while inner is not outer:  # each may lie in the other: compiled in DDP, and DDP in compiled
        outer, inner = inner, extract_model_from_parallel(inner, keep_fp32_wrapper=False, keep_torch_compile=False)
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(_no_model(inner))
    if inner is not model:
        logger.warning(f"{type(model).__name__} is taken off: the {type(inner).__name__} in it is pruned and saved.")
    if _uncompile(inner):
        logger.warning(f"{type(inner).__name__}: its parts are no longer compiled; compile them when all is done.")
    return inner


def _uncompile(model: nn.Module) -> bool:
    """Undo `Module.compile`, and `torch.compile` of parts, in place; whether there were any."""
    parts = dict(model.named_modules())
    optimized = [name for name, part in parts.items() if "_orig_mod" in part._modules]
    inside = [part for part in parts.values() if getattr(part, "_compiled_call_impl", None) is not None]
    for part in inside:
        part._compiled_call_impl = None
    for name in optimized:
        part: Any = parts[name]
        owner, _, attribute = name.rpartition(".")
        setattr(parts[owner], attribute, part._orig_mod)
    return bool(inside or optimized)


def _no_model(module: nn.Module) -> str:
    if hasattr(module, "peft_config"):
        return f"{type(module).__name__}: adapters are no part of a pruned model; call merge_and_unload() first"
    parts = [f"{name} ({type(part).__name__})" for name, part in module.named_children()]
    found = [text for text, part in zip(parts, module.children(), strict=True) if isinstance(part, PreTrainedModel)]
    hint = f"; pass its part {found[0]}" if found else "; only these are saved as checkpoints that load again"
    return f"{type(module).__name__}: expected a transformers model (a PreTrainedModel){hint}"


def check_prunable(model: PreTrainedModel) -> None:
    """Refuse models whose weights are not there, are not their own, or are no plain numbers.

    Raises:
        ModelError: saying what to do.
    """
    name = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"{name}: has parameters on the meta device, that is, without values; load its weights first "
            "(from_pretrained without device_map='meta', and without offloading to disk)"
        )
    if any(_is_adapter(module) for module in model.modules()):
        raise ModelError(f"{name}: has adapters beside its weights; merge them first (merge_and_unload() of peft)")
    quantizer = getattr(model, "hf_quantizer", None)
    method = QUANT_METHOD if quantizer is None else quantizer.quantization_config.quant_method
    if method != QUANT_METHOD:
        raise ModelError(
            f"{name}: is quantized ({getattr(method, 'value', method)}); prune the one that it was made of"
        )


def _is_adapter(module: nn.Module) -> bool:
    """Whether it is a layer of peft, which need not be installed."""
    return any(base.__module__.startswith("peft.tuners.") for base in type(module).__mro__)


def check_unshared(model: nn.Module, targets: Collection[str]) -> None:
    """Refuse Linears that share their weights with another part of the model: pruned, they would part.

    Raises:
        ModelError: naming them.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        modules = [name.rpartition(".")[0] for name in names]
        if len(names) > 1 and any(module in targets for module in modules):
            raise ModelError(
                f"{type(model).__name__}: {' and '.join(modules[:2])} share one {names[0].rpartition('.')[2]}, and a "
                "pruned one could not; leave them out with ignore"
            )
