"""Files that the dashboard shows beside a trial or on a study's page, rewritten in place as they change."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact

from ris_hpo.atomic import make_folder, write_text
from ris_hpo.errors import OutputError
from ris_hpo.store.credentials import redact

log = logging.getLogger(__name__)

MIMETYPES: Final = {".toml": "application/toml", ".svg": "image/svg+xml", ".jsonl": "application/jsonl"}


class Artifacts:
    """The text files of one trial or study in the artifact store; a name written again replaces its file.

    Args:
        owner: the trial the files belong to, or the study itself.
        folder: of the artifact store, as given to the dashboard.
        listing: file to note the names of new files in, which go when their study goes; None for none.
    """

    def __init__(self, owner: optuna.Trial | optuna.Study, folder: Path, listing: Path | None = None) -> None:
        self._owner = owner
        self._listing = listing
        self._store = _Folder(folder)
        known = get_all_artifact_meta(owner)
        self.identifiers = {meta.filename: meta.artifact_id for meta in known}

    def put(self, name: str, make: Callable[[], str]) -> str | None:
        """Make a file's text and write it; returns what went wrong, if anything did.

        A figure must never cost a trial or a run, whatever is wrong with it, so that every error of ``make`` is caught
        here, and of writing those of the disk. Errors of the trial store are raised: they say who owns the trial.
        """
        try:
            text = make()
        except Exception as error:
            log.exception("%s was not drawn", name)
            return _one_line(error)
        try:
            self._write(name, text)
        except (OSError, OutputError) as error:
            log.warning("%s was not written (%s)", name, error)
            return _one_line(error)
        return None

    def _write(self, name: str, text: str) -> None:
        if name in self.identifiers:
            write_text(self._store.folder / self.identifiers[name], text)
            return
        make_folder(self._store.folder)
        with tempfile.TemporaryDirectory(prefix=".", dir=self._store.folder) as scratch:
            file = Path(scratch) / name
            file.write_text(text, encoding="utf-8")
            self.identifiers[name] = upload_artifact(
                artifact_store=self._store,
                file_path=str(file),
                study_or_trial=self._owner,
                mimetype=MIMETYPES[file.suffix],
            )
        if self._listing is not None:
            make_folder(self._listing.parent)
            with self._listing.open("a", encoding="utf-8") as listing:
                listing.write(f"{self.identifiers[name]}\n")


def _one_line(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]


class _Folder(FileSystemArtifactStore):
    """A folder of artifacts that moves an uploaded file into place, where Optuna's copies it.

    A full disk is noticed while that file is written, before the artifact is registered.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        os.replace(content_body.name, self.folder / artifact_id)
