"""Prune a model with one or more processes: `accelerate launch recipes/prune.py --config recipes/deit-base-32x32.yaml`.

Without a GPU, two processes on the CPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/prune.py --config ...

Options override the recipe. The masks are the same for any number of processes.
"""

from pathlib import Path
from typing import Annotated

import typer
from accelerate import Accelerator

from hf_blockprune import cli


@cli.one_line_errors
def main(
    config: Annotated[Path, typer.Option("--config", help="Recipe in YAML or JSON; options override it.")],
    model: Annotated[str | None, typer.Option("--model", help="Dense model: a Hub name or a folder.")] = None,
    dataset: cli.Dataset = None,
    output: cli.Output = None,
    block_shape: cli.BlockShape = None,
    budget: cli.BudgetOption = None,
    method: cli.Method = None,
    refit: cli.Refit = None,
    recover: cli.Recover = None,
    evaluate_on: cli.EvaluateOn = None,
    split: cli.Split = None,
    dataset_config: cli.DatasetConfig = None,
    image_column: cli.ImageColumn = None,
    label_column: cli.LabelColumn = None,
    labels_by: cli.LabelsBy = None,
    streaming: cli.Streaming = None,
    shuffle_buffer: cli.ShuffleBuffer = None,
    samples: cli.Samples = None,
    batch_size: cli.BatchSize = None,
    seed: cli.Seed = None,
    overwrite: cli.Overwrite = False,
    resume: cli.Resume = False,
    json_: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Prune a model as a recipe says, and save it block-sparse."""
    accelerator = Accelerator()
    cli.set_quiet(quiet or not accelerator.is_main_process)
    report = cli.prune_from_options(
        config,
        model=model,
        dataset=dataset,
        output=output,
        block_shape=block_shape,
        budget=budget,
        method=method,
        refit=refit,
        recover=recover,
        evaluation=evaluate_on,
        split=split,
        dataset_config=dataset_config,
        image_column=image_column,
        label_column=label_column,
        labels_by=labels_by,
        streaming=streaming,
        shuffle_buffer=shuffle_buffer,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        overwrite=overwrite,
        resume=resume,
    )
    if accelerator.is_main_process:
        cli.emit(report, cli.summary_table(report), as_json=json_)
    accelerator.end_training()


if __name__ == "__main__":
    typer.run(main)
