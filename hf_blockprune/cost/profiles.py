"""Device profiles: those that come with the package, and files of one's own."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from ..errors import ConfigError
from ..files import partial_file
from ..hub.blockprune_devices import DEVICES
from ..hub.blockprune_profiles import DeviceProfile, named_profile, profile_from_dict
from ..runs.environment import environment

if TYPE_CHECKING:
    from ..types import JsonDict


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """A profile by its name, or from a YAML file.

    Raises:
        ConfigError: no such profile or file, or one with a wrong key, which is named.

    Example:
        >>> load_profile("systolic-32").rows
        32
    """
    if (name := str(name_or_path)) in DEVICES:
        return named_profile(name)
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"device: no profile {name!r}; name one of {', '.join(sorted(DEVICES))}, or a YAML file (blockprune "
            "calibrate writes one for this machine)"
        )
    try:
        return profile_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), path.name)
    except yaml.YAMLError as error:
        raise ConfigError(f"device: {path.name} is no YAML: {error}") from error
    except ValueError as error:
        raise ConfigError(f"device: {error}") from error


def save_profile(profile: DeviceProfile, path: Path) -> "JsonDict":
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
