"""Train a pruned model with one or more processes.

    accelerate launch recipes/finetune.py --config recipes/finetune-deit-base-32x32.yaml --model PRUNED \\
        --teacher DENSE --dataset IMAGES --output OUT

Without a GPU, two processes on the CPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/finetune.py --config ...

Options override the recipe. Any number of processes takes the same steps, but for rounding.
"""

from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState

from hf_blockprune import cli


@cli.one_line_errors
def main(
    config: Annotated[Path, typer.Option("--config", help="Recipe in YAML or JSON; options override it.")],
    model: Annotated[str | None, typer.Option("--model", help="Pruned model: a Hub name or a folder.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="The dense model that it was pruned from.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Images to learn from, named as for prune."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for the trained model.")] = None,
    evaluate_on: Annotated[
        str | None, typer.Option("--evaluate-on", help="Labelled images that choose which epoch's weights to keep.")
    ] = None,
    split: cli.Split = None,
    dataset_config: cli.DatasetConfig = None,
    image_column: cli.ImageColumn = None,
    label_column: cli.LabelColumn = None,
    labels_by: cli.LabelsBy = None,
    streaming: cli.Streaming = None,
    shuffle_buffer: cli.ShuffleBuffer = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the images.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Images of a step, on all.")] = None,
    micro_batch: Annotated[int | None, typer.Option("--micro-batch", min=1, help="Images at once on each.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", min=0, help="Peak learning rate.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="no, bf16 or fp16.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Processes that prepare images.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of images' order and views.")] = None,
    overwrite: cli.Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same command was interrupted.")] = False,
    json_: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Train a pruned model as a recipe says, and save it block-sparse."""
    from hf_blockprune.finetune_jobs import FinetuneJob, run_finetune

    main_process = PartialState().is_main_process
    cli.set_quiet(quiet or not main_process)
    columns = {
        "image_column": image_column,
        "label_column": label_column,
        "labels_by": labels_by,
        "streaming": streaming,
    }
    job = FinetuneJob.read(
        config,
        model=model,
        teacher=teacher,
        dataset=dataset,
        output=output,
        evaluation=evaluate_on,
        split=split,
        dataset_options={**columns, "config": dataset_config, "shuffle_buffer": shuffle_buffer},
        evaluation_options=columns,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        precision=precision,
        workers=workers,
        seed=seed,
    )
    report = run_finetune(job, overwrite=overwrite, resume=resume)
    if main_process:
        cli.emit(report, cli.summary_table(report), as_json=json_)


if __name__ == "__main__":
    typer.run(main)
