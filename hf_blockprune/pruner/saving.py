"""A pruned model as a folder, and on the Hub."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import folder as checkpoint
from ..checkpoint import measurements
from ..checkpoint.card import card_digest, model_card
from ..checkpoint.inspection import describe_checkpoint, open_checkpoint
from ..checkpoint.publish import upload_checkpoint
from ..checkpoint.simulation import predict_checkpoint
from ..hub.blockprune_skeleton import skeleton
from ..report.values import Report
from .loaded_model import LoadedModel

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Saving(LoadedModel):
    """What of `BlockPruner` saves."""

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False, repo_id: str | None = None) -> None:
        """Write the block-sparse model with everything that loads and explains it; whole or not at all.

        Args:
            directory: a folder that does not exist yet, or an older checkpoint with `overwrite`.
            overwrite: replace an older checkpoint, once the new one is complete.
            repo_id: the name in the card's example; the folder's name by default.

        Raises:
            ModelError: nothing was pruned yet.
            CheckpointError: the folder exists, or cannot be written.
        """
        report = self._made()
        if self.accelerator.is_main_process:
            with checkpoint.staged_directory(directory, overwrite=overwrite) as folder:
                self._write(folder, report, repo_id or Path(directory).expanduser().resolve().name)
            assert report.measured.weights_sha256 is not None  # _write saw to it
            self._stored = (Path(directory).expanduser(), report.measured.weights_sha256)
        self.accelerator.wait_for_everyone()

    def save_into(self, folder: Path, repo_id: str) -> None:
        """Write what `save_pretrained` does into a folder; no report and card where nobody knows how it was pruned."""
        if self._report is not None:
            self._write(folder, self._report, repo_id)
        else:
            self._write_model(folder)

    def _write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _write(self, folder: Path, report: Report, repo_id: str) -> None:
        self._write_model(folder)
        stored = open_checkpoint(folder, skeleton(self.model))
        values = describe_checkpoint(stored)
        report.size_bytes, report.dense_size_bytes = values["size_bytes"], values["dense_size_bytes"]
        report.predicted = predict_checkpoint(stored)
        self._forget_others()
        report.measured.weights_sha256 = measurements.files_fingerprint(folder)
        self.config.save(folder / checkpoint.RECIPE_FILE)
        card = model_card(report, repo_id)
        report.card_sha256 = card_digest(card.text)
        checkpoint.write_json(folder / checkpoint.REPORT_FILE, report.to_dict())
        card.save(folder / checkpoint.CARD_FILE)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload block-sparse model",
    ) -> "CommitInfo | None":
        """Save to a temporary folder and upload that; see `upload_checkpoint`. Of several processes the first one does.

        Returns:
            The commit, with the pull request where one was asked for; None on the other processes.

        Raises:
            ModelError: nothing was pruned yet.
            HubError: the Hub refused, or cannot be reached.
        """
        options = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
        report = self._made()
        commit = None
        if self.accelerator.is_main_process:
            with tempfile.TemporaryDirectory() as parent:
                folder = Path(parent) / "checkpoint"
                folder.mkdir()
                self._write(folder, report, repo_id)
                commit = upload_checkpoint(folder, repo_id, commit_message=commit_message, **options)
        self.accelerator.wait_for_everyone()
        return commit
