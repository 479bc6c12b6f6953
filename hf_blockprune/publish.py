"""Saved checkpoints on the Hub."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .card import model_card
from .checkpoint import REPORT_FILE, read_json
from .errors import HubError
from .fetching import hub_errors
from .inspection import open_checkpoint

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

CARD_FILE = "README.md"


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

    folder = Path(folder).expanduser()
    open_checkpoint(folder)
    api = HfApi(token=token)
    names = (folder.name, repo_id)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
            files[CARD_FILE] = _card(folder, names, repo_id, Path(scratch))
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


def _card(folder: Path, names: tuple[str, ...], repo_id: str, scratch: Path) -> Path:
    """The folder's card, under the repository's name where nobody has edited what was written under one of `names`."""
    card, report = folder / CARD_FILE, folder / REPORT_FILE
    if not report.is_file():
        return card
    values, new = read_json(report), scratch / CARD_FILE

    def text(name: str) -> str:
        model_card(values, name).save(new)
        return new.read_text(encoding="utf-8")

    if card.is_file() and card.read_text(encoding="utf-8") not in map(text, names):
        return card
    text(repo_id)
    return new
