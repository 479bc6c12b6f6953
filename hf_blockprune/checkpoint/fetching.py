"""Checkpoints that are named as models on the Hub are."""

import re
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from .card import HUB_ID

NEEDED_FILES = ("*.json", "*.safetensors")


def checkpoint_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint; what describes one on the Hub is downloaded, and no code of it.

    Args:
        source: a folder, or a name on the Hub.
        revision: branch, tag or commit on the Hub; the main branch by default.

    Raises:
        CheckpointError: there is neither such a folder nor such a repository.
        ConfigError: a revision of a folder.
    """
    folder = Path(source).expanduser()
    if folder.exists() or not re.fullmatch(HUB_ID, str(source)):
        if revision is not None:
            raise ConfigError(f"{source}: a revision belongs to a model on the Hub; leave it out for a folder")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(NEEDED_FILES)))
    except hub_errors() as error:
        where = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(
            f"{source}: no such folder, and no such model on the Hub{where} ({' '.join(str(error).split())[:200]})"
        ) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """What talking to the Hub may raise where the name, the network or the Hub is at fault."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are those of a lost connection too, in whichever library huggingface_hub calls the Hub through.
    return (*HfHubHTTPError.__bases__, OSError, ValueError)
