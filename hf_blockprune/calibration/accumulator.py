"""Running sums over calibration images of what one Linear sees, and of its gradients."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..score.blocks import block_sums, grid_shape
from ..score.statistics import LayerStatistics, about_zero, at_least_float32

if TYPE_CHECKING:
    from accelerate import Accelerator

FISHER_ROWS = 512  # per-image gradients kept apart; further images are folded in with random signs
GRADIENT_BYTES_AT_ONCE = 64 << 20


class NotFiniteError(Exception):
    """A value is infinite or no number: for which image, by position, and where."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(what)
        self.index, self.what = index, what


class Accumulator:
    """Running sums of one Linear."""

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        *,
        moments: bool,
        fisher: bool,
        block_shape: tuple[int, int] | None,
        gradient_moment: bool = False,
    ) -> None:
        self.name = name
        self.linear, self.block_shape, self.fisher = linear, block_shape, fisher
        self.index: Tensor  # positions of the images of the batch in flight
        self.num_tokens = self.num_images = 0
        self.origin: Tensor | None = None  # what moments are taken about until the end
        out, into = linear.weight.shape
        double = {"dtype": torch.float64, "device": linear.weight.device}
        self.sums: dict[str, Tensor] = {}
        if moments:
            self.sums |= {"mean": torch.zeros(into, **double), "second_moment": torch.zeros(into, into, **double)}
        if fisher or block_shape is not None:
            self.sums |= {"output_weight": torch.zeros(out, **double), "token_weight": torch.zeros(1, **double)}
        if gradient_moment:
            self.sums["gradient_moment"] = torch.zeros(out, out, **double)
        if block_shape is not None:
            rows, cols = grid_shape((out, into), block_shape)
            self.sums["gradient"] = torch.zeros(out, into, **double)
            self.sums["block_gradients"] = torch.zeros(FISHER_ROWS, rows, cols, device=linear.weight.device)

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = at_least_float32(inputs[0].detach())
        x = x.reshape(len(self.index), -1, x.shape[-1])  # [images, tokens, in]
        self._check_finite(x)
        self.num_images += x.shape[0]
        self.num_tokens += x.shape[0] * x.shape[1]
        if "mean" in self.sums and not self.fisher:
            self._add_moments(x, torch.ones_like(x[..., :1]))
        if output.requires_grad:
            index = self.index
            output.register_hook(
                lambda grad: self._add_gradients(x, at_least_float32(grad).reshape(*x.shape[:2], -1), index)
            )

    def _check_finite(self, x: Tensor) -> None:
        finite = x.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = int(self.index[~finite][0])
            raise NotFiniteError(bad, f"{self.name}: its inputs")

    def _add_moments(self, x: Tensor, token_weight: Tensor) -> None:
        """x [images, tokens, in], token_weight [images, tokens, 1]."""
        tokens, weight = x.flatten(0, 1), token_weight.flatten(0, 1)
        if self.origin is None:
            # Near the mean: what single precision rounds off a large mean can be more than a small variance.
            self.origin = (tokens * weight).sum(0) / weight.sum().clamp(min=1e-30)
        tokens = tokens - self.origin
        weighted = tokens * weight
        self.sums["mean"] += weighted.sum(0, dtype=torch.float64)
        self.sums["second_moment"] += (weighted.t() @ tokens).double()

    def _add_gradients(self, x: Tensor, grad: Tensor, index: Tensor) -> None:
        """x [images, tokens, in] and dLoss/dy [images, tokens, out], a few images at a time to bound memory."""
        self.sums["output_weight"] += grad.double().square().sum(dim=(0, 1))
        if "gradient_moment" in self.sums:
            flat = grad.flatten(0, 1)
            self.sums["gradient_moment"] += (flat.t() @ flat).double()
        token_weight = grad.square().sum(-1, keepdim=True)
        # Starts out as one zero, and takes the number of tokens from the first batch.
        self.sums["token_weight"] = self.sums["token_weight"] + token_weight.sum((0, 2), dtype=torch.float64)
        if self.fisher:
            self._add_moments(x, token_weight)
        if self.block_shape is None:
            return
        weight = at_least_float32(self.linear.weight.detach())
        chunk = max(1, GRADIENT_BYTES_AT_ONCE // (weight.numel() * weight.element_size()))
        for xs, grads, images in zip(x.split(chunk), grad.split(chunk), index.split(chunk), strict=True):
            per_image = grads.transpose(1, 2) @ xs  # [chunk, out, in]
            self.sums["gradient"] += per_image.sum(0, dtype=torch.float64)
            projections = block_sums(per_image * weight, self.block_shape).float()
            signs = _signs(images).view(-1, 1, 1)
            self.sums["block_gradients"].index_add_(0, images % FISHER_ROWS, projections * signs)

    def _agree_on_tokens(self) -> None:
        """Give a process that saw no image as many zeros as the others have tokens."""
        from accelerate.utils import gather_object

        if "token_weight" in self.sums:
            tokens = max(gather_object([len(self.sums["token_weight"])]))
            self.sums["token_weight"] = self.sums["token_weight"].expand(tokens).clone()

    def _take_moments_about_zero(self) -> None:
        if self.origin is not None:
            weight = self.sums["token_weight"].sum() if self.fisher else self.num_tokens
            sums = self.sums["mean"], self.sums["second_moment"]
            self.sums["mean"], self.sums["second_moment"] = about_zero(weight, *sums, self.origin.double())

    def finish(self, accelerator: "Accelerator") -> LayerStatistics:
        """Add up over processes and divide."""
        counts = torch.tensor([self.num_tokens, self.num_images], device=accelerator.device)
        tokens, images = (int(n) for n in accelerator.reduce(counts, "sum"))
        self._agree_on_tokens()
        self._take_moments_about_zero()
        sums = {name: cast(Tensor, accelerator.reduce(value, "sum")) for name, value in self.sums.items()}
        weight = sums["token_weight"].sum().clamp(min=1e-300) if self.fisher else tokens
        divide_by = {"mean": weight, "second_moment": weight, "output_weight": tokens}
        divide_by |= {"gradient_moment": tokens, "gradient": images}
        done = {name: sums[name] / count for name, count in divide_by.items() if name in sums}
        if "token_weight" in sums:
            total = sums["token_weight"].sum().clamp(min=1e-300)
            done["token_weight"] = sums["token_weight"] * (len(sums["token_weight"]) / total)
        if "block_gradients" in sums:
            done["block_gradients"] = sums["block_gradients"] * (FISHER_ROWS / images) ** 0.5
        return LayerStatistics(num_tokens=tokens, num_images=images, **done)


def _signs(index: Tensor) -> Tensor:
    """+1 for an image with a row of its own; for later ones a sign hashed from its position.

    The hash mixes twice: after one multiplication the signs of images that share a row would still be correlated.
    """
    mixed = index * 2654435761 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 2246822519 & 0xFFFFFFFF
    bit = (mixed ^ mixed >> 13) >> 16 & 1
    return torch.where(index < FISHER_ROWS, 1, 1 - 2 * bit).float()
