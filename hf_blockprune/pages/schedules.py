"""How tokens merge in a checkpoint, and what else was tried: for a page."""

from typing import TypedDict

from ..errors import CheckpointError
from ..hub.blockprune_tokens import TokenSchedule
from ..stored_values import StoredValues
from .drawings import Mark, Plot, scatter


class Tried(TypedDict):
    """A schedule that was tried, see `report.values.TokenTrial`; `left` is how many patches it leaves in the end."""

    leave: list[float]
    left: int
    share: float
    divergence: float


class Schedules(TypedDict):
    """The schedule of a checkpoint, how many patches are left after each layer, and what else was tried.

    Attributes:
        frontier: with tokens alone, from none that merge to as many as the budget asks for.
        trials: with the other moves, which saved the rest.
        taken: number of the trial that was taken, from 1; None where that is not known.
    """

    leave: list[int]
    patches: int
    remaining: list[int]
    frontier: list[Tried]
    trials: list[Tried]
    taken: int | None


def schedules(schedule: TokenSchedule | None, report: StoredValues) -> tuple[Schedules | None, str | None]:
    """(what is known of a checkpoint's tokens, None where none merge; a note where its report file speaks of others).

    Args:
        schedule: of the checkpoint's config.
        report: its report file.

    Raises:
        CheckpointError: a value of the report file is of another kind than it should be.
    """
    said = report.part("tokens")
    if schedule is None:
        note = "The report file speaks of tokens that merge, the config of none; this page shows the config"
        return None, None if said is None else note
    found: Schedules = {
        "leave": list(schedule.leave),
        "patches": schedule.patches,
        "remaining": schedule.remaining(schedule.patches),
        "frontier": [],
        "trials": [],
        "taken": None,
    }
    if said is None:
        return found, None
    if said.numbers("leave", len(schedule.leave)) != found["leave"] or said.count("patches") != schedule.patches:
        return found, "The report file speaks of other tokens that merge than the config; this page shows the config"
    found["frontier"] = [_tried(part, schedule) for part in said.parts("frontier")]
    found["trials"] = [_tried(part, schedule) for part in said.parts("trials")]
    alike = [number for number, trial in enumerate(found["trials"]) if trial["leave"] == found["leave"]]
    if alike:  # one schedule may have been tried with the other moves and without
        found["taken"] = 1 + min(alike, key=lambda number: found["trials"][number]["divergence"])
    return found, None


def _tried(part: StoredValues, schedule: TokenSchedule) -> Tried:
    if (leave := part.numbers("leave", len(schedule.leave))) is None:
        raise CheckpointError(f"{part.where}.leave: expected {len(schedule.leave)} numbers, got nothing")
    return {
        "leave": leave,
        "left": round(schedule.patches - sum(leave)),
        "share": part.need("share", 0),
        "divergence": part.need("divergence"),
    }


def schedules_plot(found: Schedules) -> Plot | None:
    """What was tried, by the share of the cost that merging leaves and by divergence; None where nothing was."""
    marks = [_mark(each, "tokens alone") for each in found["frontier"]]
    for number, each in enumerate(found["trials"], 1):
        marks.append(_mark(each, "with the other moves", number, taken=number == found["taken"]))
    return scatter(marks) if marks else None


def _mark(tried: Tried, how: str, number: int | None = None, *, taken: bool = False) -> Mark:
    divergence = tried["divergence"]
    return Mark(
        label="" if number is None else str(number),
        title=f"{tried['left']} patches left, {how}: {divergence:.3g} nats",
        cost=tried["share"],
        gain=divergence,
        interval=(divergence, divergence),
        best=number is None,
        dense=taken,
    )
