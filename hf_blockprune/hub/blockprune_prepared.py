"""What is learned from a layer's indices once, where asking again would make the host wait for a GPU."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


class PreparedCache(Generic[T]):
    """Values made from tensors, kept while the tensors' memory lives.

    A change through an operation that torch records (`copy_`, `load_state_dict`) is noticed by the tensor's version.
    One through `tensor.data` is not: results may not depend on what is kept here, and no copy of a tensor belongs here.

    Example:
        >>> import torch
        >>> cache, x = PreparedCache(), torch.ones(2)
        >>> cache.get((x,), (), lambda: x.sum().item()), cache.get((x,), (), lambda: 0.0)
        (2.0, 2.0)
        >>> _ = x.add_(1)
        >>> cache.get((x,), (), lambda: x.sum().item())
        4.0
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[list[int], list[StorageWeakRef], T]] = {}

    def get(self, tensors: tuple[Tensor, ...], key: Hashable, make: Callable[[], T]) -> T:
        """The value for these tensors.

        Args:
            tensors: what it is made from.
            key: their shapes, strides and dtypes, as far as they may differ, and whatever else the value depends on.
            make: makes it.
        """
        try:
            versions = [t._version for t in tensors]
        except RuntimeError:  # a tensor from inference mode has no version: nothing tells when it changes
            return make()
        place = (key, *[t.data_ptr() for t in tensors])
        found = self._entries.get(place)
        # An address alone says little: other tensors may have come to stand where freed ones stood.
        if found is not None and found[0] == versions and not any(owner.expired() for owner in found[1]):
            return found[2]
        self._drop_dead()
        value = make()
        self._entries[place] = (versions, [StorageWeakRef(t.untyped_storage()) for t in tensors], value)
        return value

    def _drop_dead(self) -> None:
        for place, (_, owners, _) in list(self._entries.items()):
            if any(owner.expired() for owner in owners):
                self._entries.pop(place, None)

    def __len__(self) -> int:
        return len(self._entries)
