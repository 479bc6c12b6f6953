"""Merging of tokens with the compiled kernels: one call for what are some forty small ones in torch."""

import torch
from torch import Tensor

from ..hub.blockprune_merging import Merged, use_merger
from .backend import DTYPES
from .library import CpuLibrary, find_library


class CpuMerger:
    """Merges the tokens of images, see `hub.blockprune_merging.merge`.

    Args:
        library: the kernels.
    """

    def __init__(self, library: CpuLibrary) -> None:
        self.library = library

    def __call__(
        self, states: Tensor, alike: Tensor, sizes: Tensor, places: Tensor, leave: int, prefix: int, step: int
    ) -> Merged | None:
        """See `hub.blockprune_merging.Merger`.

        Raises:
            IndexError: places that no token has.
            MemoryError: no room for working copies of the features.
        """
        code = DTYPES.get(states.dtype)
        if code is None or alike.dtype != states.dtype or not (sizes.dtype == torch.float32 and sizes.is_cpu):
            return None
        if places.dtype != torch.int64 or not places.is_cpu:
            return None
        images, tokens, width = states.shape
        features, all_tokens = alike.shape[-1], places.shape[1]
        if alike.shape[:2] != states.shape[:2] or sizes.shape != states.shape[:2] or places.shape[0] != images:
            return None
        read = [tensor.contiguous() for tensor in (states, alike, sizes, places)]
        merged = Merged(
            states.new_empty(images, tokens - leave, width),
            sizes.new_empty(images, tokens - leave),
            places.new_empty(images, all_tokens),
        )
        fields = [tensor.data_ptr() for tensor in (*read, *merged)]
        fields += [images, tokens, width, features, all_tokens, prefix, leave, step, code]
        if not self.library.merge(fields, torch.get_num_threads()):
            raise IndexError(f"places: of {tokens} tokens, one is said to be where none is")
        return merged


def register() -> None:
    """Let tokens on CPUs merge with the compiled kernels, where they are."""
    library, _ = find_library()
    if library is not None:
        use_merger("cpu", CpuMerger(library))
