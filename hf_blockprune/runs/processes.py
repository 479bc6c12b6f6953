"""The processes that a launcher started, known before there is an Accelerator."""

import os
import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Value = TypeVar("Value")


def is_first_process() -> bool:
    """Whether this process speaks for all, without setting up what the caller may want to set up otherwise."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> "PartialState":
    """This run's processes.

    `PartialState()` alone does not read the setting of `accelerate launch --cpu`, takes each of several processes on
    CPUs for the only one, and an Accelerator that is made later believes it.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def agreed(value: Value, accelerator: "Accelerator") -> Value:
    """The first process's object on every process: rounding may let ties fall differently."""
    from accelerate.utils import broadcast_object_list

    shared = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    return shared[0]
