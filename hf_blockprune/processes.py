"""The processes that a launcher started, known before there is an Accelerator."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def processes() -> "PartialState":
    """This run's processes.

    `PartialState()` alone does not read the setting of `accelerate launch --cpu`, takes each of several processes on
    CPUs for the only one, and an Accelerator that is made later believes it.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
