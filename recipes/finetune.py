"""Train a pruned model with one or more processes.

    accelerate launch recipes/finetune.py --config recipes/finetune-deit-base-32x32.yaml --model PRUNED \\
        --teacher DENSE --dataset IMAGES --output OUT

Without a GPU, two processes on the CPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/finetune.py --config ...

This is `blockprune finetune` as a file, for launchers. Any number of processes takes the same steps, but for rounding.
"""

import typer

from hf_blockprune.cli.training import finetune

if __name__ == "__main__":
    typer.run(finetune)
