"""A picture of the patches that merge in a model, and how many tokens it has after each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..calibration.merged import MergedLayer, merged_layers
from ..checkpoint.folder import check_output_file
from ..cost.flops import count_flops
from ..data.model_input import find_input, preprocess
from ..errors import BlockSparseFormatError, CheckpointError, ConfigError, DataError, ModelError
from ..files import partial_file
from ..hub.blockprune_tokens import TokenSchedule, schedule_of
from ..model.layers import layer_lists
from ..model.loading import load_model
from ..model.merging import Merging
from ..sources.pictures import BROKEN, Decoding, decode_image
from ..types import ImageProcessor
from .patches import groups_picture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENDING = ".png"


@dataclass(frozen=True)
class DrawnTokens:
    """What a picture of merged patches shows.

    Attributes:
        output: its file.
        image_size: [height, width] of the image as the model takes it.
        patches: of the image.
        tokens_before: the first layer, class tokens and registers included.
        tokens_after: each layer.
        layer: after which it is drawn, from 1.
        groups: of patches, those of one patch included.
        largest: patches of the largest group.
    """

    output: str
    image_size: list[int]
    patches: int
    tokens_before: int
    tokens_after: list[int]
    layer: int
    groups: int
    largest: int


def draw_tokens(
    model: str | Path,
    image: str | Path,
    output: str | Path = "tokens.png",
    *,
    leave: int | Sequence[int] | None = None,
    layer: int | None = None,
    overwrite: bool = False,
) -> DrawnTokens:
    """Draw which patches of an image merge in a model, beside the image as the model takes it.

    Each group is filled with its mean colour. The file is written whole or not at all.

    Args:
        model: a pruned model whose tokens merge, or any in which they can: a folder, or a name on the Hub.
        image: a picture file, or its address.
        output: PNG file.
        leave: how many patches leave each layer, one number for all or one for each; by default what the model was
            saved with.
        layer: after which the groups are drawn, from 1; by default the last one in which patches leave.
        overwrite: replace an older file.

    Raises:
        ConfigError: no such layer, numbers that are no schedule, or another kind of file.
        ModelError: there is no such model, no tokens merge in it, or they cannot.
        DataError: the image cannot be read.
        CheckpointError: the file exists, or cannot be written.

    Example:
        ```python
        drawn = draw_tokens("pruned", "photo.jpg", "merged.png")
        print(drawn.tokens_after)
        ```
    """
    target = _checked_output(output, overwrite=overwrite)
    loaded, processor = load_model(str(model), {})
    pictures = _Pictures.of(loaded, processor, image)
    prefix = _set(loaded, str(model), leave, pictures.size)
    schedule = schedule_of(loaded)
    if schedule is None or not schedule.merges:
        raise ModelError(
            f"{model}: no tokens merge in it; name how many patches leave each layer (--leave or --per-layer, leave=), "
            "or a model that was pruned with tokens (--tokens auto)"
        )
    number = _checked_layer(layer, schedule)
    found = merged_layers(loaded, pictures.pixels)
    groups = found[number - 1].places[0, prefix:].cpu() - prefix
    patch = _patch_size(loaded)
    rows, columns = _grid(loaded, pictures.size, patch, len(groups))
    _write(groups_picture(pictures.shown, groups.view(rows, columns), patch), target)
    return _drawn(str(output), pictures.size, found, number, groups)


@dataclass(frozen=True)
class _Pictures:
    """An image as a model takes it.

    Attributes:
        pixels: [1, channels, height, width].
        shown: the same as a picture, uint8 [height, width, 3].
    """

    pixels: Tensor
    shown: Tensor

    @classmethod
    def of(cls, model: "PreTrainedModel", processor: ImageProcessor, image: str | Path) -> "_Pictures":
        """A file's image for a model."""
        wanted = find_input(model, processor)
        path = str(Path(image).expanduser()) if "://" not in str(image) else str(image)
        try:
            picture = decode_image({"bytes": None, "path": path}, Decoding(wanted.channels))
        except BROKEN as error:
            raise DataError(f"{image}: is no picture that can be read ({error}); name a file such as a JPEG") from error
        pixels = preprocess(processor, [picture], wanted.channels)
        wanted.check(pixels, str(image))
        seen = preprocess(processor, [picture], wanted.channels, do_rescale=False, do_normalize=False)[0]
        values = seen.float().round().clamp(0, 255).byte().permute(1, 2, 0)
        # Opacity is nothing that a picture beside another one could show.
        return cls(pixels, values[..., :3].expand(-1, -1, 3).contiguous())

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


def _checked_output(output: str | Path, *, overwrite: bool) -> Path:
    target = Path(output).expanduser()
    if target.suffix.lower() != ENDING:
        raise ConfigError(f"output: a picture is written as PNG; name a file that ends in {ENDING}, got {output}")
    check_output_file(target, overwrite=overwrite)
    if not target.parent.is_dir():
        raise CheckpointError(f"{output}: its folder does not exist; make it, or name another file")
    return target


def _set(model: "PreTrainedModel", name: str, leave: int | Sequence[int] | None, size: tuple[int, int]) -> int:
    """Set a schedule in a model, where one is given; how many tokens come before its patches.

    Args:
        model: of transformers.
        name: of it.
        leave: as of `draw_tokens`.
        size: (height, width) of an image.
    """
    try:
        lists = tuple(f"{each}." for each, _ in layer_lists(model))
        tokens = {each: n for each, n in count_flops(model, size).linear_tokens.items() if n and each.startswith(lists)}
        merging = Merging.of(model, tokens)
        if leave is not None:
            numbers = (leave,) * merging.layers if isinstance(leave, int) else tuple(leave)
            if any(type(number) is not int or number < 0 for number in numbers):
                raise ConfigError(f"leave: expected numbers from 0, one for each layer, got {list(numbers)}")
            merging.set(numbers)
    except BlockSparseFormatError as error:
        raise ModelError(f"{name}: {error}") from None
    return merging.prefix


def _checked_layer(layer: int | None, schedule: TokenSchedule) -> int:
    """The layer that was asked for, or the last one in which patches leave."""
    last = max(number for number, count in enumerate(schedule.leave, 1) if count)
    if layer is not None and not 1 <= layer <= len(schedule.leave):
        raise ConfigError(f"layer: expected a number from 1 to {len(schedule.leave)}, got {layer}")
    return last if layer is None else layer


def _patch_size(model: "PreTrainedModel") -> tuple[int, int]:
    """(height, width) of a patch, by the model's config."""
    config = getattr(model.config, "vision_config", model.config)
    side = getattr(config, "patch_size", None)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ModelError(f"{type(model).__name__}: its config names no patch_size, so its patches cannot be drawn")
    return height, width


def _grid(model: "PreTrainedModel", size: tuple[int, int], patch: tuple[int, int], patches: int) -> tuple[int, int]:
    """(rows, columns) of the patches of an image of a size, of which a model has so many."""
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    if rows * columns != patches:
        raise ModelError(
            f"{type(model).__name__}: has {patches} patches of an image that has {rows} x {columns} of its patch_size, "
            "so they cannot be drawn"
        )
    return rows, columns


def _write(picture: Image.Image, target: Path) -> None:
    try:
        with partial_file(target) as partial:
            picture.save(partial, "PNG", optimize=True)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error


def _drawn(output: str, size: tuple[int, int], found: list[MergedLayer], layer: int, groups: Tensor) -> DrawnTokens:
    """What a picture of groups shows, as values."""
    counts = torch.bincount(groups)
    return DrawnTokens(
        output=output,
        image_size=list(size),
        patches=len(groups),
        tokens_before=found[0].places.shape[1],
        tokens_after=[each.tokens for each in found],
        layer=layer,
        groups=int((counts > 0).sum()),
        largest=int(counts.max()),
    )
