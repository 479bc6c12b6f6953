"""Device profiles: those that come with the package, and files of one's own."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..environment import environment
from ..errors import ConfigError
from ..files import partial_file
from ..hub.blockprune_profiles import profile_from_dict
from .profile_names import FOLDER, profile_names


def load_profile(name_or_path: str | Path) -> Any:
    """A profile by its name, or from a YAML file.

    Raises:
        ConfigError: no such profile or file, or one with a wrong key, which is named.

    Example:
        >>> load_profile("systolic-32").rows
        32
    """
    text = str(name_or_path)
    if text in profile_names():
        source, content = text, (FOLDER / f"{text}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(
                f"device: no profile {text!r}; name one of {', '.join(profile_names())}, or a YAML file (blockprune "
                "calibrate writes one for this machine)"
            )
        source, content = path.name, path.read_text(encoding="utf-8")
    try:
        return profile_from_dict(yaml.safe_load(content), source)
    except yaml.YAMLError as error:
        raise ConfigError(f"device: {source} is no YAML: {error}") from error
    except ValueError as error:
        raise ConfigError(f"device: {error}") from error


def save_profile(profile: Any, path: Path) -> dict[str, Any]:
    """Write a measured profile as YAML, whole or not at all.

    Returns:
        What was written.

    Raises:
        ConfigError: the file cannot be written.
    """
    found = environment()
    machine = found["gpu"] if profile.kind == "gpu" else f"{found['cpu']} ({found['cpu_capability']})"
    source = f"measured by blockprune calibrate on {machine}, {found['threads']} threads, torch {torch.__version__}"
    values = {"kind": profile.kind, **asdict(replace(profile, source=source))}
    try:
        with partial_file(path) as partial:
            partial.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from error
    return values
