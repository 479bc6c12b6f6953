"""Names of the device profiles that come with the package; importing this imports nothing else."""

from importlib.resources import files

FOLDER = files("hf_blockprune.hardware") / "profiles"


def profile_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))
