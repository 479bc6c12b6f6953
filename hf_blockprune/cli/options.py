"""Options that several commands and the recipes share, in groups that belong together.

Options that are left out are None, which leaves the recipe's value; their help shows what holds without a recipe.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.table import Table

from ..budget import Budget, budget_text
from ..config import BlockPruneConfig, RecoveryConfig, shape_text
from ..cost.profile_names import profile_names
from ..errors import ConfigError
from ..runs.processes import is_first_process
from ..score.methods import MethodName, names_where
from ..types import JsonDict
from .terminal import emit, set_quiet

if TYPE_CHECKING:
    from ..sources.named import SourceOptions

T = TypeVar("T")
V = TypeVar("V")  # what a command found, as JSON-ready values
DEFAULTS, RECOVERY = BlockPruneConfig(), RecoveryConfig()
REFITS = f"with {' and '.join(names_where(lambda method: method.refits))} alone"


def parse_block_shape(text: str) -> tuple[int, int]:
    """ROWSxCOLS as two numbers.

    Raises:
        typer.BadParameter: it is something else.
    """
    rows, _, cols = text.lower().partition("x")
    try:
        return int(rows), int(cols)
    except ValueError:
        raise typer.BadParameter(f"expected ROWSxCOLS such as 32x32, got {text!r}") from None


def parse_budget(text: str) -> Budget:
    """METRIC=RATIO, or METRIC=AMOUNT@DEVICE; see `Budget.parse`.

    Raises:
        typer.BadParameter: it is something else.
    """
    try:
        return Budget.parse(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def parse_each(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """What reads comma-separated values, each of them by `parse`."""

    def parse_list(text: str) -> tuple[T, ...]:
        return tuple(parse(part.strip()) for part in text.split(",") if part.strip())

    return parse_list


def parse_moves(text: str) -> tuple[str, ...]:
    """Names with commas between, or `none`."""
    return () if text.strip() == "none" else parse_each(str)(text)


def parse_tokens(text: str) -> str | tuple[int, ...]:
    """`auto`, `keep`, or numbers with commas between.

    Raises:
        typer.BadParameter: it is something else.
    """
    if text.strip() in ("auto", "keep"):
        return text.strip()
    return parse_counts(text, "auto, keep, or a number for each layer such as 0,8,8")


def parse_counts(text: str, expected: str = "a number for each layer such as 0,8,8") -> tuple[int, ...]:
    """Numbers from 0 with commas between.

    Raises:
        typer.BadParameter: it is something else than what is expected.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise typer.BadParameter(f"expected {expected}, got {text!r}")
    return tuple(map(int, parts))


def parse_flops_or_budget(text: str) -> Budget:
    """A share of the FLOPs, or METRIC=RATIO."""
    return parse_budget(text if "=" in text else f"flops={text}")


def complete_profile(incomplete: str) -> list[str]:
    """Names of device profiles that come with the package."""
    return [name for name in profile_names() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars or warnings.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an older checkpoint once the new one is complete.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the same command was interrupted.")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.", show_default="the main branch")
]
Recipe = Annotated[Path | None, typer.Option("--config", help="Recipe in YAML or JSON; options override it.")]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder for the model.")]
EvaluateOn = Annotated[
    str | None, typer.Option("--evaluate-on", help="Labelled images to compare with the dense model on.")
]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Calibration images: a folder, file, pattern, URL or Hub data set.")
]
Profile = Annotated[
    str,
    typer.Option("--device", help="Device profile: its name or a YAML file.", autocompletion=complete_profile),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed of the draw of images.", show_default=str(DEFAULTS.calibration.seed)),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Leave layers that match dense; may be repeated.", show_default="none"),
]
PrunedModel = Annotated[str | None, typer.Argument(help="Pruned model: a folder or a Hub name. A recipe may name it.")]

BudgetOption = Annotated[
    Budget | None,
    typer.Option(
        "--budget",
        parser=parse_budget,
        metavar="METRIC=RATIO",
        help="Share kept: flops=0.75, params=0.6, density=0.5, latency=0.6@DEVICE or energy=0.6@DEVICE; or an "
        "amount: latency=8ms@DEVICE, energy=5mJ@DEVICE.",
        show_default=budget_text(asdict(DEFAULTS.budget)),
    ),
]


@dataclass(frozen=True)
class Columns:
    """How a data set is read."""

    split: Annotated[
        str | None,
        typer.Option("--split", help="Split of the data set.", show_default="train; to evaluate: validation or test"),
    ] = None
    dataset_config: Annotated[str | None, typer.Option("--dataset-config", help="Of a Hub data set.")] = None
    image_column: Annotated[
        str | None, typer.Option("--image-column", help="Column with the images.", show_default="the one with images")
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option(
            "--label-column",
            help="Column with the labels; json.label for a key inside of one.",
            show_default="the one with labels",
        ),
    ] = None
    labels_by: Annotated[
        Literal["name", "position", "none"] | None,
        typer.Option(
            "--labels-by",
            help="name finds classes by what they are called; position takes the data set's class numbers for the "
            "model's; none reads no labels.",
            show_default="name",
        ),
    ] = None
    streaming: Annotated[
        bool | None,
        typer.Option(
            "--streaming/--no-streaming",
            help="Read images one by one, no further than needed.",
            show_default="no-streaming",
        ),
    ] = None
    white: Annotated[
        float | None,
        typer.Option(
            "--white",
            help="Value of white in pictures of more than 8 bits.",
            show_default="what their format says",
        ),
    ] = None

    def of_evaluation(self) -> "SourceOptions":
        """Attributes of `DataSource` that labelled images of the same command have too."""
        return {
            "image_column": self.image_column,
            "label_column": self.label_column,
            "labels_by": self.labels_by,
            "streaming": self.streaming,
            "white": self.white,
        }

    def source(self) -> "SourceOptions":
        """Attributes of `DataSource` for one data set, its split included."""
        return {
            **self.of_evaluation(),
            "streaming": bool(self.streaming),
            "config": self.dataset_config,
            "split": self.split,
        }


@dataclass(frozen=True)
class Training(Columns):
    """How images to learn from are read."""

    shuffle_buffer: Annotated[
        int | None,
        typer.Option(
            "--shuffle-buffer",
            min=1,
            help="Draw a stream's images from a buffer of so many.",
            show_default="0, the first ones",
        ),
    ] = None

    def settings(self) -> JsonDict:
        """Overrides of a job; None where nothing was said."""
        columns = self.of_evaluation()
        options = {**columns, "config": self.dataset_config, "shuffle_buffer": self.shuffle_buffer}
        return {"split": self.split, "dataset_options": options, "evaluation_options": columns}


@dataclass(frozen=True)
class Calibration:
    """How many images are drawn."""

    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Calibration images.", show_default=str(DEFAULTS.calibration.samples)),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="Images in one pass.", show_default=str(DEFAULTS.calibration.batch_size)
        ),
    ] = None
    seed: Seed = None

    def settings(self) -> JsonDict:
        """Overrides of a job; None where nothing was said."""
        values = {"samples": self.samples, "batch_size": self.batch_size, "seed": self.seed}
        return {"calibration": {key: value for key, value in values.items() if value is not None}}


@dataclass(frozen=True)
class Choosing:
    """What is removed."""

    # Rows and columns. As a tuple typer would take two values for it, and not ask the parser.
    block_shape: Annotated[
        Sequence[int] | None,
        typer.Option(
            "--block-shape",
            parser=parse_block_shape,
            metavar="ROWSxCOLS",
            help="Block, out x in features.",
            show_default=shape_text(DEFAULTS.block_shape),
        ),
    ] = None
    budget: BudgetOption = None
    method: Annotated[
        MethodName | None,
        typer.Option("--method", help="How blocks are scored.", show_default=DEFAULTS.method),
    ] = None
    moves: Annotated[
        Sequence[str] | None,
        typer.Option(
            "--moves",
            parser=parse_moves,
            metavar="MOVE,...",
            help="What may leave: blocks, units, heads, or several of them; none leaves all to tokens.",
            show_default=f"all with {' and '.join(names_where(lambda method: method.fisher))}, else blocks",
        ),
    ] = None
    tokens: Annotated[
        Any,  # text or numbers
        typer.Option(
            "--tokens",
            parser=parse_tokens,
            metavar="auto|keep|N,...",
            help="Patches that leave each layer by merging: auto finds how many, keep merges none; or a number each.",
            show_default=str(DEFAULTS.tokens),
        ),
    ] = None
    ignore: Ignore = None

    def settings(self) -> JsonDict:
        """Overrides of a job; None where nothing was said."""
        return {
            "moves": self.moves,
            "tokens": self.tokens,
            "block_shape": self.block_shape,
            "budget": self.budget,
            "method": self.method,
            "ignore": self.ignore or None,
        }


@dataclass(frozen=True)
class Repair:
    """What becomes of the weights that stay."""

    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Solve for the surviving weights.", show_default=REFITS),
    ] = None
    recover: Annotated[
        bool | None,
        typer.Option(
            "--recover/--no-recover",
            help="Train the pruned model to behave like the dense one, without labels.",
            show_default="no-recover",
        ),
    ] = None

    def settings(self) -> JsonDict:
        """Overrides of a job; None where nothing was said."""
        return {"refit": self.refit, "recover": self.recover}


@dataclass(frozen=True)
class Recovering:
    """How a pruned model is recovered."""

    samples: Annotated[
        int | None,
        typer.Option("--samples", min=2, help="Images to learn from.", show_default=str(RECOVERY.samples)),
    ] = None
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", min=0, help="Passes over the images in distillation.", show_default=str(RECOVERY.epochs)
        ),
    ] = None
    lr: Annotated[
        float | None, typer.Option("--lr", min=0, help="Peak learning rate.", show_default=str(RECOVERY.lr))
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=2, help="Images of a step, on all.", show_default=str(RECOVERY.batch_size)),
    ] = None
    seed: Seed = None

    def settings(self) -> JsonDict:
        """Overrides of a job; None where nothing was said."""
        values = {"samples": self.samples, "epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
        return {"recovery": {key: value for key, value in values.items() if value is not None}, "seed": self.seed}


@dataclass(frozen=True)
class Unfinished:
    """What becomes of older output, and of state that an interruption left."""

    overwrite: Overwrite = False
    resume: Resume = False
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted run left, and begin again.")
    ] = False

    def what_to_do(self) -> dict[str, bool]:
        """Arguments of the functions that run jobs."""
        return {"overwrite": self.overwrite, "resume": self.resume, "restart": self.restart}


@dataclass(frozen=True)
class Shown:
    """What a command prints."""

    json_: Json = False
    quiet: Quiet = False

    def begin(self) -> None:
        """Be quiet where that was asked for, or where another process speaks."""
        set_quiet(self.quiet or not is_first_process())

    def result(self, values: V, table: Callable[[V], Table]) -> None:
        """Print JSON and nothing else, or a table, on the first process; the others end here."""
        from torch import distributed

        if is_first_process():
            emit(values, table(values), as_json=self.json_)
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # else torch warns of it
