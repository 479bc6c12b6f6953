"""Saved checkpoints on the Hub."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..errors import HubError, first_names
from .card import model_card, updated_card
from .fetching import hub_errors
from .folder import CARD_FILE, CONFIG_FILE, PROCESSOR_FILE, RECIPE_FILE, REPORT_FILE, read_json, read_report
from .inspection import SHARDS_FILE, open_checkpoint, weight_files
from .measurements import any_held, drop_stale, files_fingerprint

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.get_logger(__name__)
OWN_FILES = (
    CONFIG_FILE,
    PROCESSOR_FILE,
    "processor_config.json",
    "generation_config.json",
    SHARDS_FILE,
    CARD_FILE,
    REPORT_FILE,
    RECIPE_FILE,
)
CODE_FILES = "blockprune_*.py"  # those that loading does not import too
LICENSE = re.compile(r"(LICEN[CS]E|NOTICE)([.-]\w+)*", re.IGNORECASE)


def upload_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload block-sparse model",
) -> "CommitInfo":
    """Upload a saved checkpoint in one commit, creating the repository and the branch where needed.

    What else lies in the folder is left out, and named in a warning.

    Args:
        folder: what `BlockPruner.save_pretrained` wrote. Its card gets the repository's name, unless it was edited.
        repo_id: "name" or "owner/name".
        private: whether a new repository is; an older one stays as it is.
        token: by default the one that `hf auth login` stored.
        revision: branch; the main one by default.
        create_pr: open a pull request instead of changing the branch.
        commit_message: title of the commit, or of the pull request.

    Raises:
        CheckpointError: the folder is no block-sparse checkpoint, or is damaged.
        HubError: the Hub refused, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder).expanduser()
    api = HfApi(token=token)
    try:
        validate_repo_id(repo_id)
        open_checkpoint(folder)
        own, others = checkpoint_files(folder)
        if others:
            logger.warning(f"{folder}: not uploaded, as no part of the checkpoint: {first_names(others, 20)}")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            files = {path.name: path for path in own}
            if (card := _card(folder, repo_id, Path(scratch))) is not None:
                files[CARD_FILE] = card
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(name, path) for name, path in files.items()],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
    except hub_errors() as error:
        raise HubError(
            f"{repo_id}: could not be uploaded ({' '.join(str(error).split())[:300]}); check the name and the network, "
            "and log in with a token that may write (hf auth login)"
        ) from error


def checkpoint_files(folder: Path) -> tuple[list[Path], list[str]]:
    """(the files of a folder that are the checkpoint's, names of what else lies there).

    Those are weights and their index, configs, the image processor, the code that `auto_map` names with what it
    imports, card, report, recipe and license.
    """
    files = {folder / name for name in OWN_FILES} | {*weight_files(folder), *folder.glob(CODE_FILES)}
    for name in (CONFIG_FILE, PROCESSOR_FILE, "processor_config.json"):
        if (folder / name).is_file():
            for module in _modules(read_json(folder / name)):
                files.add(folder / module)
                if (folder / module).is_file():
                    files |= {Path(file) for file in get_relative_import_files(folder / module)}
    inside = sorted(folder.iterdir())
    own = [path for path in inside if path.is_file() and (path in files or LICENSE.match(path.name))]
    return own, [path.name + "/" * path.is_dir() for path in inside if path not in own]


def _modules(values: object) -> Iterator[str]:
    """Files of the folder's own code that a config, or one in it, names for Auto classes."""
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if key != "auto_map":
            yield from _modules(value)
            continue
        for reference in value.values() if isinstance(value, dict) else ():
            for name in reference if isinstance(reference, list) else [reference]:
                if isinstance(name, str) and "--" not in name:  # else it names another repository's
                    yield f"{name.partition('.')[0]}.py"


def _card(folder: Path, repo_id: str, scratch: Path) -> Path | None:
    """The folder's card; under the repository's name, and without old figures, where nobody has edited it."""
    card, report = folder / CARD_FILE, read_report(folder / REPORT_FILE)
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    if report is None:
        return card if card.is_file() else None
    current = report.copy()
    if any_held(current.measured):
        drop_stale(current.measured, files_fingerprint(folder))
    new = scratch / CARD_FILE
    if text is None:
        model_card(current, repo_id).save(new)
    elif (made := updated_card(text, report, current, repo_id)) is not None:
        new.write_text(made[0], encoding="utf-8", newline="")
    else:
        return card
    return new
