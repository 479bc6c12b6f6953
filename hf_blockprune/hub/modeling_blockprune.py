"""Block-sparse models for `trust_remote_code=True`, where hf_blockprune is not installed.

For each model class of transformers there is one here with "BlockPrune" before its name, made when it is asked for. It
adds nothing to the native one. Importing this file is what matters: it registers the "blockprune" method, and
`from_pretrained` then builds `BlockSparseLinear` modules where the checkpoint's config names them.
"""

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import PreTrainedModel

from .blockprune_quantizer import register
from .blockprune_saving import CLASS_PREFIX

register()


class _Native:
    """What makes transformers treat a class that came with a checkpoint as the native one that it is."""

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoModel") -> None:
        """Nothing: the code beside a checkpoint is written by `blockprune_saving`."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: names in its files are those of the native class."""
        return False


def __getattr__(name: str) -> type:
    native = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if name.startswith(CLASS_PREFIX) else None
    if not (isinstance(native, type) and issubclass(native, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    documentation = f"`{native.__name__}` with block-sparse layers."
    made = type(name, (_Native, native), {"__module__": __name__, "__doc__": documentation})
    renamings = get_checkpoint_conversion_mapping(native.__name__)
    if renamings is not None:  # they are looked up by the class's name
        register_checkpoint_conversion_mapping(name, renamings, overwrite=True)
    globals()[name] = made
    return made
