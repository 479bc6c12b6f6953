"""Commands about this machine: calibrate, env and demo."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import ConfigError
from .options import BudgetOption, Overwrite, Shown
from .terminal import command


@command
def calibrate(
    shown: Shown,
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file for the profile.")],
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="What to measure.")] = "cpu",
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="About how long to measure.")] = 45.0,
    overwrite: Overwrite = False,
) -> None:
    """Measure this machine and write its device profile, for budgets and simulate."""
    shown.begin()
    from ..cost.profiles import save_profile
    from ..measure.calibrate import calibrate, rank_correlation
    from ..report.tables import plain_table

    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: exists; name another file, or allow --overwrite")
    profile, measured = calibrate(device, seconds=seconds, name=output.stem)
    values = save_profile(profile, output)
    values |= {"measurements": len(measured), "rank_correlation": rank_correlation(profile, measured)}
    shown.result(values, lambda values: plain_table(f"{output}", values))


@command
def env(shown: Shown) -> None:
    """Show the machine, the versions, and what multiplies with block-sparse weights here."""
    shown.begin()
    from ..report.tables import environment_table
    from ..runs.environment import backends, environment

    shown.result({**environment(), "backends": backends()}, environment_table)


@command
def demo(
    shown: Shown,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the models here.", show_default="nowhere")
    ] = None,
    budget: BudgetOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a small vision transformer on scikit-learn's digits, prune it, load it back. No network."""
    shown.begin()
    from ..jobs.demo import demo_table, run_demo

    shown.result(run_demo(output, budget=budget, overwrite=overwrite), demo_table)
