"""Where features go as parts of an unfinished run: orders that took long to choose are kept, and made again from it."""

from collections.abc import Callable

from torch import Tensor

from ..runs.resume import KeptParts
from .hidden import Move
from .rotation import Rotation

MOVES, ORDER, ROTATION = "moves", "order", "rotation"


class ReorderingState(KeptParts):
    """Keeps the orders that were chosen, and gives back those of an interrupted run."""

    def moves(self, which: str, choose: Callable[[], list[Move]]) -> list[Move]:
        """Those that were chosen before, or are now."""
        stored = self.read(f"{MOVES}-{which}")
        if stored is not None:
            orders, ends = stored[0], stored[1]["ends"]
            return [Move(tuple(p), consumer, orders[str(i)]) for i, (p, consumer) in enumerate(ends)]
        moves = choose()
        orders = {str(i): move.order for i, move in enumerate(moves)}
        ends = [[list(move.producers), move.consumer] for move in moves]
        self.write(f"{MOVES}-{which}", orders, {"ends": ends}, "permutation")
        return moves

    def order(self, which: str, choose: Callable[[], Tensor]) -> Tensor:
        """The one that was chosen before, or is now."""
        stored = self.read(f"{ORDER}-{which}")
        if stored is not None:
            return stored[0]["order"]
        order = choose()
        self.write(f"{ORDER}-{which}", {"order": order}, {}, "permutation")
        return order

    def rotation(self, layer: int, choose: Callable[[], Rotation]) -> Rotation:
        """The one that was chosen before for a layer, or is now."""
        stored = self.read(f"{ROTATION}-{layer}")
        if stored is not None:
            return Rotation(stored[0]["products"], stored[0]["values"])
        rotation = choose()
        tensors = {"products": rotation.products, "values": rotation.values}
        self.write(f"{ROTATION}-{layer}", tensors, {}, "rotation of heads")
        return rotation
