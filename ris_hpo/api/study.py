"""A study as a Python object: make or open it, run it, read its trials, write its report and its best configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from ris_hpo.api.table import LiveTable, in_notebook
from ris_hpo.api.upkeep import StudyUpkeep
from ris_hpo.errors import ConfigError
from ris_hpo.process import storage_directory
from ris_hpo.report.collect import Report, Trial, collect
from ris_hpo.report.study_page import kept_current
from ris_hpo.results.notices import notified
from ris_hpo.results.replay import ReplayReport, replay
from ris_hpo.results.tensorboard import logged
from ris_hpo.search.archive import restore_study
from ris_hpo.search.files import checked, load_study
from ris_hpo.search.lifecycle import as_made, create_or_resume_study, fill_budget, get_study, only_study, stored_spec
from ris_hpo.search.lifecycle import status as status_of
from ris_hpo.search.spec import StudySpec
from ris_hpo.search.status import StudyStatus
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.workers.devices import plan_slots
from ris_hpo.workers.local import LocalProcesses
from ris_hpo.workers.pool import Executor
from ris_hpo.workers.supervisor import PoolSnapshot, Supervisor
from ris_hpo.workers.worker import job_for

if TYPE_CHECKING:
    import pandas

    from ris_hpo.training.files import Exported, ExportedSettings

NO_PROOF = "no-proof"
"""What a study records that was made without a proof."""


class Study(StudyUpkeep):
    """A study in a store. ``Study.make`` makes or resumes one, ``Study.open`` takes one that is there.

    Args:
        store: the store.
        study: the study in it.

    Attributes:
        name: the study's name.
    """

    def __init__(self, store: Store, study: optuna.Study) -> None:
        super().__init__(store, study.study_name)
        self._study = study

    @classmethod
    def make(
        cls,
        space: str | Path,
        *,
        name: str | None = None,
        storage: str | None = None,
        base: Mapping[str, Any] | None = None,
        changes: Mapping[str, Any] | None = None,
        proof: bool = True,
    ) -> Study:
        """Make the study of a file, or resume it where the store has it.

        Args:
            space: name of a study file, or its path.
            name: of the study; by default the file's.
            storage: address of the store; by default ``$RIS_HPO_STORAGE_URL``, or SQLite under ``storage/``.
            base: values of ``[base]`` other than the file's, by dotted key.
            changes: other settings than the file's, by dotted key, such as ``{"sampler.name": "random"}``.
            proof: for a study that trains networks of this package, first show that such a network can learn at all.

        Raises:
            SpaceError: a file that cannot be used, or a study that was made with another space.
            ConfigError: its program cannot be imported.
            StoreError: the store cannot be opened.
        """
        spec = load_study(space)
        if base:
            spec = spec.with_base(base)
        store, named = open_store(storage), list(base or ())
        spec = as_made(store, name or spec.name, spec, named)
        checked(spec.replaced(changes or {}))
        certificate = certificate_of(spec) if proof else NO_PROOF
        study = create_or_resume_study(store, spec, name=name, changes=changes, named=named, proof=certificate)
        return cls(store, study)

    @classmethod
    def open(cls, name: str | None = None, *, storage: str | None = None) -> Study:
        """Open a study that is there.

        Args:
            name: of the study; may be left out where the store has one alone.
            storage: as in ``make``.

        Raises:
            StudyError: no such study, or several and no name.
            StoreError: no store there.
        """
        store = open_store(storage, create=False)
        return cls(store, get_study(store, name or only_study(store)))

    @classmethod
    def restore(cls, archive: str | Path, *, name: str | None = None, storage: str | None = None) -> Study:
        """Put the study of an archive into a store; it resumes and replays as before.

        Args:
            archive: the file.
            name: of the study from now on; None for its own.
            storage: as in ``make``.

        Raises:
            ArchiveError: not a whole archive of a study.
            StudyError: the store has a study of that name.
        """
        store = open_store(storage)
        return cls(store, get_study(store, restore_study(store, Path(archive), name=name).study))

    def __repr__(self) -> str:
        return f"Study('{self.name}', {self._store.redacted})"

    @property
    def spec(self) -> StudySpec:
        """What is searched, as the store has it."""
        return stored_spec(self._study)

    # -- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        n_trials: int | None = None,
        *,
        workers: int | None = None,
        gpus: Sequence[int] | None = None,
        per_gpu: int = 1,
        notify: Sequence[str] = (),
        tensorboard: str | Path | None = None,
        show: bool | None = None,
    ) -> StudyStatus:
        """Run trials on worker processes of this machine until the study has ended; return where it then stands.

        Interrupt it at any time: trials at hand are checkpointed, and the next call goes on with them. A study on
        PostgreSQL can have workers of other machines at the same time (``ris-hpo worker``).

        Args:
            n_trials: total number of trials to finish, over all runs and workers; None for the study's own.
            workers: processes; by default one, or one a GPU slot.
            gpus: GPUs to use, counted among the visible; None for all, empty for none.
            per_gpu: workers that share a GPU.
            notify: commands or web addresses that hear of failed trials and of the end; see ``notices``.
            tensorboard: folder for the trials' curves, for TensorBoard.
            show: keep a table of the workers up to date in the notebook; by default where there is a notebook.

        Raises:
            WorkerError: trials keep failing, or workers keep ending, and not one trial ends well.
        """
        fill_budget(self._store, self._study, n_trials)
        chosen = None if gpus is None else [str(gpu) for gpu in gpus]
        slots = plan_slots(workers, chosen, per_gpu)
        supervisor = self.supervisor(lambda folder: LocalProcesses(slots, folder))
        table = LiveTable() if (in_notebook() if show is None else show) else None
        for snapshot in self.followed(supervisor, notify=notify, tensorboard=tensorboard):
            if table is not None:
                table.update(snapshot)
        return self.status()

    def supervisor(self, executor: Callable[[Path], Executor]) -> Supervisor:
        """Return a supervisor of the study's workers.

        Args:
            executor: makes what starts them, given the folder of the study's trials.
        """
        job = job_for(self._store, self._study)
        return Supervisor(self._store, self._study, executor(Path(job.directory)), job)

    def followed(
        self, supervisor: Supervisor, *, notify: Sequence[str] = (), tensorboard: str | Path | None = None
    ) -> Iterator[PoolSnapshot]:
        """Run a supervisor, with everything that follows a run beside it: the dashboard's page, curves, notices.

        Args:
            supervisor: of this study.
            notify: see ``run``.
            tensorboard: see ``run``.

        Yields:
            What the supervisor yields.
        """
        job = job_for(self._store, self._study)
        assert job.artifacts is not None
        snapshots = kept_current(self._study, self._store, supervisor.run(), Path(job.artifacts), Path(job.directory))
        if tensorboard is not None:
            snapshots = logged(snapshots, self._study, Path(tensorboard))
        return notified(snapshots, supervisor, self._study, notify)

    # -- reading -----------------------------------------------------------------------------------------------------

    def status(self) -> StudyStatus:
        """Return counts by state, the best trial, what runs now, and what failed."""
        return status_of(self._store, self.name)

    def trials(self) -> list[Trial]:
        """Return every trial that has begun, with parameters, score, curve, cost, and cause where it failed."""
        return collect(self._study, with_importances=False).trials

    def best(self) -> Trial | None:
        """Return the best completed trial."""
        return collect(self._study, with_importances=False).best

    def frame(self) -> pandas.DataFrame:
        """Return the trials as a pandas table: one row a trial, columns for parameters and metrics by their names.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ConfigError("a table of trials needs pandas; install ris-hpo[notebook]") from None
        rows = self.records()
        return pandas.DataFrame(rows).set_index("number") if rows else pandas.DataFrame()

    def records(self) -> list[dict[str, Any]]:
        """Return the trials as flat records of the same keys: number, state, score, parameters, metrics, cost."""
        metric, trials = self.spec.score, self.trials()
        params = list(dict.fromkeys(name for trial in trials for name in trial.params))
        metrics = [name for trial in trials for name in trial.metrics if name not in params]
        return [
            {
                "number": trial.number,
                "state": trial.state,
                metric: trial.value if trial.value is not None else trial.last_value,
                **{name: trial.params.get(name) for name in params},
                **{name: trial.metrics.get(name) for name in dict.fromkeys(metrics)},
                "steps": trial.scenes,
                "seconds": trial.seconds,
                "device": trial.device,
                "origin": trial.origin,
                "cause": trial.cause,
                "error": trial.error,
            }
            for trial in trials
        ]

    # -- results -----------------------------------------------------------------------------------------------------

    def report(self, out: str | Path) -> Report:
        """Write the study as one page (``.html``), or its figures as numbers (``.json``).

        Raises:
            OutputError: the file cannot be written.
        """
        from ris_hpo.report.html import write_report  # imported late, since it brings a plotting library

        return write_report(self._study, Path(out))

    def export(self, out: str | Path, trial: int | None = None) -> Exported | ExportedSettings:
        """Write the configuration of a trial, the best one by default, with where it came from (``.toml``, ``.json``).

        Raises:
            StudyError: no such trial, or none has completed.
            OutputError: the file cannot be written.
        """
        from ris_hpo.results.export import exported  # imported late, since they bring torch
        from ris_hpo.training.files import write_config

        found = exported(self._study, self.spec, trial)
        write_config(found, Path(out))
        return found

    def replay(self, number: int) -> ReplayReport:
        """Run a trial again and compare its curve with the recorded one, digit for digit.

        Raises:
            StudyError: no such trial, or one without a curve.
        """
        return replay(self._store, self.name, number)

    def close(self) -> None:
        """Close the connections to the store."""
        self._store.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def certificate_of(spec: StudySpec, note: Callable[[str], None] = lambda sentence: None) -> str | None:
    """Return the proof that a study's networks can learn at all, made at a small size where there is none yet.

    Args:
        spec: the study; of one that trains no networks of this package there is no proof.
        note: called with a sentence when the proof is made, and when it is passed.

    Raises:
        ProofError: such a network does not learn.
    """
    if not spec.trains_networks:
        return None
    from ris_hpo.training.proof import SMALL_SCENES, find_certificate, prove, small_form  # late, since it brings torch

    folder, config = storage_directory() / "proofs", spec.config({})
    found = find_certificate(folder, config)
    if found is None:
        note("no proof for this code and form of network yet: making a small one")
        found = prove(small_form(config), folder, scenes=SMALL_SCENES, epochs=400)
        note(f"passed: NMSE {found.nmse:.3f} on {found.scenes} memorised scenes, {found.seconds:.0f} s")
    return f"{found.code}-{found.form}"
