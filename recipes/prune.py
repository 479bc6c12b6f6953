"""Prune a model with one or more processes: `accelerate launch recipes/prune.py --config recipes/deit-base-32x32.yaml`.

Without a GPU, two processes on the CPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/prune.py --config ...

This is `blockprune prune` as a file, for launchers. The masks are the same for any number of processes.
"""

import typer

from hf_blockprune.cli.pruning import prune

if __name__ == "__main__":
    typer.run(prune)
