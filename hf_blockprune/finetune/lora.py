"""LoRA on block-sparse layers, with peft: y = block-sparse(x) + B A x, the kept blocks frozen.

peft takes other layers than its own through `LoraConfig._register_custom_module`. Three of its functions are wrapped so
that nobody has to call that: which layer a target becomes, what "all-linear" means, and whether adapters may be merged.
"""

import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any

from peft.tuners import lora, tuners_utils
from torch import nn

from ..errors import ModelError
from ..hub.blockprune_linear import BlockSparseLinear

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

SHORTHAND, ALL_LINEAR = "all-linear", "_maybe_include_all_linear_layers"
MARK = "knows_block_sparse_layers"
# Kinds of LoRA that take the base layer's weight apart, and initial values that do not.
WHOLE_WEIGHT = {"use_dora": "DoRA", "use_qalora": "QALoRA", "kasa_config": "KaSA", "mica": "MiCA"}
INITIAL_VALUES = ("gaussian", "eva", "orthogonal")


class LoraBlockSparseLinear(lora.Linear):
    """LoRA beside a block-sparse layer, from which it takes the arguments of `peft.tuners.lora.Linear`.

    Raises:
        ModelError: a kind of LoRA, or initial values, that need the whole weight; or on merging.
    """

    # Arguments are passed on as they come: which there are differs between versions of peft.
    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # older peft warns of every layer that is not its own
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            super().__init__(base_layer, adapter_name, *args, **kwargs)

    def _get_in_out_features(self, module: BlockSparseLinear | nn.Linear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ModelError: of a kind, or with initial values, that need the whole weight of a block-sparse layer.
        """
        settings = vars(kwargs["config"]) if "config" in kwargs else kwargs
        found = [name for key, name in WHOLE_WEIGHT.items() if settings.get(key)]
        initial = settings.get("init_lora_weights", True)
        if isinstance(initial, str) and initial.lower() not in INITIAL_VALUES:
            found.append(f"init_lora_weights={initial!r}")
        if found and _is_block_sparse(self.get_base_layer()):
            raise ModelError(
                f"{found[0]}: needs a layer's whole weight, of which a block-sparse layer has some blocks only; use "
                "plain LoRA, or make the layers dense first with model.dequantize()"
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused, but where the layer was made dense.

        Raises:
            ModelError: it is block-sparse.
        """
        _check_mergeable(self)
        super().merge(safe_merge, adapter_names)


def _is_block_sparse(module: object) -> bool:
    """Also for a layer made by the code beside a checkpoint."""
    return type(module).__name__ == BlockSparseLinear.__name__


def _check_mergeable(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LoraBlockSparseLinear) and _is_block_sparse(module.get_base_layer()):
            raise ModelError(
                "merging LoRA into block-sparse layers would bring removed blocks back; keep the adapter beside the "
                "model, or make the layers dense first with dequantize() of the base model"
            )


def teach() -> None:
    """Wrap what peft asks; done once in a process."""
    if getattr(lora.LoraModel._create_new_module, MARK, False):
        return
    create, may_merge = lora.LoraModel._create_new_module, lora.LoraModel._check_merge_allowed
    all_linear = getattr(tuners_utils, ALL_LINEAR)

    @functools.wraps(create)
    def create_new_module(
        lora_config: "LoraConfig", adapter_name: str, target: nn.Module, **kwargs: object
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if _is_block_sparse(base) and kwargs.get("parameter_name") is None:
            lora_config._register_custom_module({type(base): LoraBlockSparseLinear})
        return create(lora_config, adapter_name, target, **kwargs)

    @functools.wraps(all_linear)
    def include_all_linear_layers(peft_config: "PeftConfig", model: nn.Module) -> "PeftConfig":
        asked = getattr(peft_config, "target_modules", None)
        found = all_linear(peft_config, model)
        if isinstance(asked, str) and asked.lower() == SHORTHAND:
            layers = {name for name, module in model.named_modules() if _is_block_sparse(module)}
            # The layer inside an adapter's is named by the adapter's.
            inside = {name for name in layers if name.endswith(".base_layer")}
            found.target_modules = {*found.target_modules, *(layers - inside)}
        return found

    @functools.wraps(may_merge)
    def check_merge_allowed(self: lora.LoraModel) -> None:
        _check_mergeable(self.model)
        may_merge(self)

    setattr(create_new_module, MARK, True)
    lora.LoraModel._create_new_module = staticmethod(create_new_module)
    lora.LoraModel._check_merge_allowed = check_merge_allowed
    for name, module in list(sys.modules.items()):  # several of its files have imported the function by name
        if name.startswith("peft.") and vars(module).get(ALL_LINEAR) is all_linear:
            setattr(module, ALL_LINEAR, include_all_linear_layers)
