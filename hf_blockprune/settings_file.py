"""Settings as files hold them: YAML or JSON, of this version or an older one."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import yaml

from .errors import ConfigError
from .types import JsonDict

OLD_DENSITY = "sparsity"  # the budget of blocks in older files, though sparsity is what is removed
OLD_RATIO = 0.5  # what such a budget kept without a ratio


def read_settings(path: str | Path) -> JsonDict:
    """The mapping in a YAML file, or a JSON file when its name ends in .json.

    Raises:
        ConfigError: the file cannot be read, or does not hold a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML or JSON ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def with_todays_budgets(values: Mapping[str, object], *, saved: bool) -> JsonDict:
    """Settings in which older files' `sparsity` budgets, which said what is kept, are called density.

    Args:
        values: of a file, with budgets among them.
        saved: whether this package wrote it. Others get a warning, since people may have meant what is removed.
    """
    new = dict(values)
    for key in ("budget", "second_budget"):
        budget = new.get(key)
        if isinstance(budget, Mapping) and budget.get("metric") == OLD_DENSITY:
            today = new[key] = {"ratio": OLD_RATIO, **budget, "metric": "density"}
            if not saved:
                kept = f"keeps {today['ratio']} of the blocks"
                warnings.warn(f"{key}: sparsity {kept}, as ever; write density", FutureWarning, stacklevel=3)
    return new
