"""Export of a trial's configuration: one file with where it came from, which can be trained, replayed and packaged.

The file is the run configuration with a table ``[provenance]`` beside it: study, trial, fingerprints, versions, scores,
floor, and the trial's own curve. So ``train --config FILE --replay`` needs no store to check that the curve comes out
again.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.config import AnySettings, Spec
from ris_hpo.errors import CheckpointError, ConfigError, StudyError
from ris_hpo.learning.bundle import save_bundle
from ris_hpo.programs.program import built_in, load_program
from ris_hpo.results.replay import Repetition, ReplayReport, repeated
from ris_hpo.scoring.k_loc import finite_score
from ris_hpo.search.counting import best_trial, lineage_root, state_of
from ris_hpo.search.spec import StudySpec
from ris_hpo.search.status import standing_verdict
from ris_hpo.store import attributes as names
from ris_hpo.training.files import Exported, ExportedSettings, Provenance, is_unchanged
from ris_hpo.training.finished import load_network


def exported(study: optuna.Study, spec: StudySpec, number: int | None = None) -> Exported | ExportedSettings:
    """The configuration of a trial, the best one by default, with its provenance.

    Of an inference study it is the configuration of the network that was tuned, with the trial's settings in it; of a
    study with a program of its own the settings that the program was given.

    Raises:
        CheckpointError: that network is not there any more.
        StudyError: no such trial, or its configuration is not the one this version builds from its parameters.
    """
    trials = study.get_trials(deepcopy=False)
    trial = (
        best_trial(trials, spec.direction) if number is None else next((t for t in trials if t.number == number), None)
    )
    if trial is None:
        wanted = "completed trial yet" if number is None else f"trial {number}: it has {len(trials)}"
        raise StudyError(f"study '{study.study_name}' has no {wanted}")
    if state_of(trial) == "invalidated":
        raise StudyError(
            f"trial {trial.number} of study '{study.study_name}' was invalidated ({trial.user_attrs[names.ERROR]}); "
            f"'ris-hpo invalidate {trial.number} --undo' lets it count again"
        )
    if names.CONFIG_FINGERPRINT not in trial.user_attrs:
        raise StudyError(f"trial {trial.number} of study '{study.study_name}' never got its parameters")
    root, seed = lineage_root(trial), trial.user_attrs.get(names.SEED)
    config = spec.config(trial.params, root, seed=seed)
    recorded = trial.user_attrs[names.CONFIG_FINGERPRINT]
    if not spec.ran(recorded, trial.params, root, seed=seed):
        raise StudyError(
            f"trial {trial.number} ran configuration {recorded}, this version builds {config.fingerprint()} from its "
            f"parameters; use the version that ran it ({_versions(study)})"
        )
    if spec.program is not None:
        own = {"program": spec.program, "metric": spec.score}
        if trial.state is TrialState.COMPLETE:
            own["score"] = trial.values[0]
        provenance = _provenance(study, spec, trial, config).replaced({**own, "k_loc": None})
        return ExportedSettings(config=AnySettings.parse(config.model_dump(mode="json")), provenance=provenance)
    if spec.kind == "inference":
        return _of_network(study, spec, trial, config)
    return Exported(config=config, provenance=_provenance(study, spec, trial, config))


def replay_config(
    found: Exported,
    directory: Path,
    *,
    device: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, float], None] = lambda scenes, k_loc: None,
) -> ReplayReport:
    """Train an exported configuration from its first scene, as far as its trial went, and compare the curves.

    Args:
        found: from ``load_config``.
        directory: an empty or missing folder.
        device: the trial's by default.
        stop: asked between steps.
        progress: called with (scenes seen, k_loc) after each validation.

    Raises:
        ConfigError: no provenance, or a configuration that was changed after the export.
        CheckpointError: a run stands in the folder already.
    """
    provenance = found.provenance
    if provenance is None or not provenance.curve:
        raise ConfigError("this configuration carries no curve to compare with; replay one that 'export' wrote")
    if not is_unchanged(found):
        raise ConfigError(
            f"the configuration was changed after its export (fingerprint {found.config.fingerprint()}, exported as "
            f"{provenance.config_fingerprint}); its trial's curve cannot come out again"
        )
    if directory.exists() and any(directory.iterdir()):
        raise CheckpointError(f"{directory}: already there; choose an empty directory")
    context = Repetition(
        found.config.model_dump(mode="json"),
        directory,
        dict(provenance.curve),
        seed=found.config.seed,
        device=device or provenance.device or "cpu",
        finite=finite_score,
        stop=stop,
        progress=progress,
    )
    return repeated(
        load_program(built_in("training", "network")),
        context,
        study=provenance.study,
        number=provenance.trial,
        threads=provenance.threads,
        fingerprint_agrees=True,
        older=found.older,
    )


def package(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Make an inference bundle of a run's best weights; see ``ris_hpo.learning.bundle``.

    Args:
        checkpoint: a run's directory or a weights file.
        out: a folder that does not exist yet.

    Returns:
        What the manifest says of its origin.

    Raises:
        CheckpointError: no usable checkpoint.
        OutputError: ``out`` is there already, or cannot be written.
    """
    network, config = load_network(checkpoint)
    provenance = {
        "config_fingerprint": config.fingerprint(),
        "config": config.stored(),
        "parameters": network.parameter_counts(),
        "ris-hpo": version("ris-hpo"),
        "packaged": _now(),
    }
    save_bundle(out, network, config.inference, config.scene, provenance)
    return {name: value for name, value in provenance.items() if name != "config"}


def _provenance(study: optuna.Study, spec: StudySpec, trial: FrozenTrial, config: Spec) -> Provenance:
    read, attributes = trial.user_attrs.get, study.user_attrs
    winner = standing_verdict(attributes, study.get_trials(deepcopy=False))
    mine = winner is not None and winner["winner"] == f"trial {trial.number}"
    return Provenance(
        study=study.study_name,
        trial=trial.number,
        state=trial.state.name.lower(),
        exported=_now(),
        origin=read(names.ORIGIN),
        objective=spec.objective,
        config_fingerprint=config.fingerprint(),
        space_fingerprint=attributes.get(names.SPACE_FINGERPRINT),
        score_version=attributes.get(names.SCORE_VERSION),
        proof=attributes.get(names.PROOF),
        device=read(names.DEVICE),
        threads=read(names.THREADS),
        host=read(names.HOST),
        scenes=read(names.SCENES),
        seconds=read(names.SECONDS),
        k_loc=trial.values[0] if trial.state is TrialState.COMPLETE else None,
        floor=read(names.FLOOR),
        efficiency=read(names.EFFICIENCY),
        network=_finite(read(names.COMPONENTS)),
        pipeline=_finite(read(names.PIPELINE)),
        pipeline_floor=read(names.PIPELINE_FLOOR),
        winner=winner["verdict"] if winner is not None and mine else None,
        versions=attributes.get(names.VERSIONS, {}),
        curve=sorted(trial.intermediate_values.items()),
    )


def _of_network(study: optuna.Study, spec: StudySpec, trial: FrozenTrial, config: Any) -> Exported:
    """The run configuration of the network that an inference study tuned, with the trial's settings in it."""
    _, trained = load_network(Path(config.checkpoint))
    run = trained.replaced({"inference": config.inference.model_dump(mode="json")})
    provenance = _provenance(study, spec, trial, run)
    return Exported(config=run, provenance=provenance.replaced({"curve": []}))  # its curve is not one of training


def _finite(scores: dict[str, float | None] | None) -> dict[str, float]:
    return {name: value for name, value in (scores or {}).items() if value is not None}


def _versions(study: optuna.Study) -> str:
    versions: dict[str, str] = study.user_attrs.get(names.VERSIONS, {})
    return ", ".join(f"{name} {value}" for name, value in versions.items()) or "unknown"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
