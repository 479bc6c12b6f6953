"""The command that trains with labels: finetune."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

from ..finetune.config import FinetuneConfig
from ..types import JsonDict
from .options import Output, PrunedModel, Recipe, Shown, Training, Unfinished
from .pruning import ModelOption, Teacher, one_model
from .terminal import command

DEFAULTS = FinetuneConfig()


@dataclass(frozen=True)
class Learning:
    """How the model is trained; all else stands in recipes."""

    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Passes over the images.", show_default=str(DEFAULTS.epochs))
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Images of a step, on all.", show_default=str(DEFAULTS.batch_size)),
    ] = None
    micro_batch: Annotated[
        int | None,
        typer.Option("--micro-batch", min=1, help="Images at once on each.", show_default=str(DEFAULTS.micro_batch)),
    ] = None
    lr: Annotated[
        float | None, typer.Option("--lr", min=0, help="Peak learning rate.", show_default=str(DEFAULTS.lr))
    ] = None
    warmup_epochs: Annotated[
        float | None,
        typer.Option(
            "--warmup-epochs",
            min=0,
            help="Passes in which the learning rate rises.",
            show_default="5, at most a sixth of the epochs",
        ),
    ] = None
    precision: Annotated[
        Literal["no", "bf16", "fp16"] | None,
        typer.Option("--precision", help="Mixed precision.", show_default=DEFAULTS.precision),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=0, help="Processes that prepare images.", show_default=str(DEFAULTS.workers)),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Seed of images' order and views.", show_default=str(DEFAULTS.seed)),
    ] = None

    def settings(self) -> JsonDict:
        """Overrides of a job: keys of `FinetuneConfig`, None where nothing was said."""
        return asdict(self)


@command
def finetune(
    learning: Learning,
    training: Training,
    unfinished: Unfinished,
    shown: Shown,
    model: PrunedModel = None,
    model_option: ModelOption = None,
    config: Recipe = None,
    teacher: Teacher = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Images to learn from, named as for prune.")] = None,
    output: Output = None,
    evaluate_on: Annotated[
        str | None, typer.Option("--evaluate-on", help="Labelled images that choose which epoch's weights to keep.")
    ] = None,
) -> None:
    """Train a pruned model with labels, a dense model's answers or both, and save it block-sparse."""
    shown.begin()
    from ..jobs.finetune import FinetuneJob, run_finetune
    from ..report.tables import summary_table

    job = FinetuneJob.read(
        config,
        model=one_model(model, model_option),
        teacher=teacher,
        dataset=dataset,
        output=output,
        evaluation=evaluate_on,
        **training.settings(),
        **learning.settings(),
    )
    report = run_finetune(job, **unfinished.what_to_do())
    shown.result(report, summary_table)
