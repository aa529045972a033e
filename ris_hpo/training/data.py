"""Which scenes a run trains on, validates on and calibrates on, and the batches it takes from them.

Simulated scenes of the three kinds come from three families of seeds. A run on a user's own scenes does all three on
them: they are divided once, by ``budget.validation_seed``, or the scenes to validate on are given apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ris_hpo.errors import ConfigError
from ris_hpo.learning.features import Features
from ris_hpo.learning.network import Network
from ris_hpo.physics.array import to_cosines
from ris_hpo.physics.files import load_scenes
from ris_hpo.physics.scene import Scenes, simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.metrics import Scores, floor_scores
from ris_hpo.training.config import CALIBRATION_SEED, RunConfig

TRAINING_FAMILY = 1 << 40  # training seeds are this far from those of validation and test scenes
CACHE_BYTES = 4 << 30  # features of a fixed set are kept on the device where they fit in here
HELD_OUT = 5  # one in so many of a user's scenes is held out for each purpose, up to what the budget asks for
CHUNK = 64  # scenes whose features are computed at once


@dataclass(frozen=True)
class OwnScenes:
    """A user's scenes, divided.

    Attributes:
        training: what is trained on.
        validation: what selects the best weights, stops the run, and is scored at its end.
        calibration: what the count head ``evidence`` is fitted on; None for the other heads.
        divided: whether any were held out of those that were given to train on.
        fingerprint: of the scenes as they were given.
    """

    training: Scenes
    validation: Scenes
    calibration: Scenes | None
    divided: bool
    fingerprint: str

    @classmethod
    def of(cls, config: RunConfig, scenes: Scenes | None, validation: Scenes | None) -> OwnScenes | None:
        """Return the scenes that are given, or those that ``data`` names, divided; None where all are simulated."""
        if scenes is None and validation is None:
            scenes, validation = load_own(config)
        return None if scenes is None and validation is None else cls.divide(config, scenes, validation)

    @classmethod
    def divide(cls, config: RunConfig, scenes: Scenes | None, validation: Scenes | None = None) -> OwnScenes:
        """Check a user's scenes against a configuration, and divide them.

        Args:
            config: ``budget.validation_seed`` decides which scenes are held out, a fifth of them for each purpose and
                no more than ``budget.validation_scenes`` and ``budget.calibration_scenes``.
            scenes: with truth.
            validation: scenes to validate on, the first ``budget.validation_scenes`` of them; then none of ``scenes``
                are held out for that.

        Raises:
            ConfigError: scenes that cannot be trained or validated on, or too few to divide.
        """
        budget, fits = config.budget, config.network.count_head == "evidence"
        if budget.fixed_scenes:
            raise ConfigError("budget.fixed_scenes is for simulated scenes; set it to 0 to train on your own")
        if scenes is None:
            raise ConfigError("scenes to validate on are given without scenes to train on; give both, or none")
        mark = fingerprint(*(batch for batch in (scenes, validation) if batch is not None))
        if config.data.scenes_fingerprint not in (None, mark):
            raise ConfigError(
                f"the scenes have fingerprint {mark}, expected {config.data.scenes_fingerprint}: another file, or a "
                "changed one; give the same scenes, or leave data.scenes_fingerprint out"
            )
        scenes = checked(config, scenes, "training")
        count, share = len(scenes), len(scenes) // HELD_OUT
        held = min(budget.validation_scenes, share) if validation is None else 0
        fitted = min(budget.calibration_scenes, share) if fits else 0
        if share == 0 and (validation is None or fits):
            raise ConfigError(f"{count} training scenes are too few to hold one in {HELD_OUT} out; give more")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(budget.validation_seed))
        validated, calibrated, trained = order.split([held, fitted, count - held - fitted])
        if validation is None:
            validation = scenes[validated]
        else:
            validation = checked(config, validation, "validation")[: budget.validation_scenes]
        calibration = scenes[calibrated] if fits else None
        return cls(scenes[trained.sort().values], validation, calibration, held + fitted > 0, mark)


def load_own(config: RunConfig) -> tuple[Scenes | None, Scenes | None]:
    """The scenes that ``data.scenes`` and ``data.validation`` name, None where they name none.

    Raises:
        SceneFileError: a file that is missing or does not fit.
    """
    files = (config.data.scenes, config.data.validation)
    first, second = (None if file is None else load_scenes(file, config.scene.geometry) for file in files)
    return first, second


def with_fingerprint(config: RunConfig) -> dict[str, str]:
    """Changes that fix which scenes a study is about: absolute paths of its files, and their fingerprint.

    Raises:
        SceneFileError: as :func:`load_own`.
        ConfigError: scenes that cannot be trained or validated on.
    """
    if config.data.scenes is None:
        return {}
    own = OwnScenes.divide(config, *load_own(config))
    files = {"data.scenes": config.data.scenes, "data.validation": config.data.validation}
    found = {key: str(Path(file).resolve()) for key, file in files.items() if file is not None}
    return {**found, "data.scenes_fingerprint": own.fingerprint}


def checked(config: RunConfig, scenes: Scenes, purpose: str) -> Scenes:
    """Return a user's scenes in single precision, their truth K_max wide at most.

    Raises:
        ConfigError: no truth, no scene, another surface, a scene without a source, one with more than K_max, or one
            with a source outside the searched region; with how many scenes, and which one is the first.
    """
    truth = scenes.require_truth()
    if len(scenes) == 0:
        raise ConfigError(f"no {purpose} scenes are given")
    theirs, ours = (geometry.model_dump() for geometry in (scenes.geometry, config.scene.geometry))
    differing = [f"{name} {theirs[name]}, not {value}" for name, value in ours.items() if theirs[name] != value]
    if differing:
        raise ConfigError(f"the {purpose} scenes are of another surface: {', '.join(differing)}; set scene.geometry")
    most, counts = config.network.max_sources, truth.num_sources
    if config.scene.num_sources[0] > 0:
        advice = (
            f"set scene.num_sources = [0, {config.scene.num_sources[1]}] to train on such scenes, or leave them out"
        )
        _refuse(counts == 0, purpose, "no source", advice)
    _refuse(counts > most, purpose, f"more than {most} sources", f"scene.max_sources is {most}; leave them out")
    outside = _outside(config, truth).any(-1)
    _refuse(outside, purpose, "a source outside the searched region", "widen network.grid.region or leave them out")
    if truth.max_sources > most:  # padding, since no scene has more sources
        order = torch.argsort(truth.mask.to(torch.int8), dim=-1, descending=True, stable=True)[:, :most]
        symbols = scenes.symbols
        if symbols is not None:
            symbols = symbols.gather(2, order.unsqueeze(1).expand(-1, symbols.shape[1], -1))
        scenes = dataclasses.replace(scenes, truth=truth.take(order), symbols=symbols)
    return scenes.single()


def fingerprint(*batches: Scenes) -> str:
    """Sixteen hexadecimal digits over every value of the scenes, in their order."""
    digest = hashlib.sha256()
    for scenes in batches:
        digest.update(scenes.geometry.fingerprint().encode())
        for owner in (scenes, scenes.truth):
            for field in dataclasses.fields(owner) if owner is not None else ():
                value = getattr(owner, field.name)
                if isinstance(value, Tensor):
                    digest.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode())
                    for part in value.split(1024):  # one channel for all scenes is not copied for each of them at once
                        digest.update(part.detach().cpu().resolve_conj().contiguous().numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of a step.

    Attributes:
        scenes: with truth.
        features: of the scenes.
        share: of the step's scenes.
        scenes_seen: before this pass.
    """

    scenes: Scenes
    features: Features
    share: float
    scenes_seen: int


class Frozen(NamedTuple):
    """The validation scenes, their features in chunks of 64, and the floor of their scores."""

    scenes: Scenes
    features: list[Features]
    floor: Scores


class RunData:
    """The scenes of a run and their features, made once where they are used again.

    Args:
        config: of the run.
        network: whose front-end makes the features.
        device: where the scenes are.
        own: a user's scenes instead of simulated ones.

    Raises:
        ConfigError: simulated scenes cannot be mixed with these.
    """

    def __init__(self, config: RunConfig, network: Network, device: torch.device, own: OwnScenes | None) -> None:
        self.config, self.network, self.device, self.own = config, network, device, own
        shares = (config.data.simulated_share, config.data.simulated_first)
        if config.data.num_snapshots is not None and (own is not None or config.budget.fixed_scenes):
            raise ConfigError("data.num_snapshots is for scenes that are drawn afresh; leave it out for a fixed set")
        if own is None and any(shares):
            raise ConfigError("data.simulated_share and data.simulated_first are for training on your own scenes")
        if own is not None and shares[0]:
            shape = (config.scene.num_snapshots, config.scene.num_antennas)
            if own.training.y.shape[1:] != shape:
                raise ConfigError(
                    f"your scenes have {own.training.y.shape[1]} snapshots and {own.training.y.shape[2]} antennas, "
                    f"simulated ones {shape[0]} and {shape[1]}; to mix them set scene.num_snapshots and "
                    "scene.num_antennas"
                )
        fixed = config.budget.fixed_scenes
        self._set = own.training.to(device) if own else training_scenes(config, range(fixed), device) if fixed else None
        self._features: Features | None = None
        self._order, self._epoch = torch.empty(0, dtype=torch.int64), -1
        self._frozen: Frozen | None = None

    @property
    def fingerprint(self) -> str | None:
        """Of the user's scenes; None where the configuration alone says which scenes there are."""
        return self.own.fingerprint if self.own else None

    def batch(self, start: int, size: int) -> tuple[Scenes, Features]:
        """Scenes ``start`` .. ``start + size`` of the run: drawn afresh, or from the fixed set in shuffled epochs.

        Of a run on one's own scenes the first ``data.simulated_first`` of the budget are drawn, and after that every so
        many that they are ``data.simulated_share`` of all. With ``data.num_snapshots`` the scenes that are drawn have a
        number of snapshots that depends on ``start`` and the seed.
        """
        end = start + size
        own = [position for position in range(start, end) if not self._is_simulated(position)]
        drawn = [position for position in range(start, end) if self._is_simulated(position)]
        parts = []
        if drawn:
            index = torch.tensor(drawn, device=self.device)
            scenes = training_scenes(self.config, index, self.device, num_snapshots=self._snapshots(start))
            parts.append((scenes, self.network.features(scenes)))
        if own:
            parts.append(self._of_the_set(own))
        if len(parts) == 1:
            return parts[0]
        features = zip(*(part[1] for part in parts), strict=True)
        return Scenes.cat([part[0] for part in parts]), Features(*(torch.cat(fields) for fields in features))

    def _snapshots(self, start: int) -> int | None:
        """The number of snapshots of a batch, uniform in the logarithm between two limits; None for no change."""
        limits = self.config.data.num_snapshots
        if limits is None:
            return None
        generator = random.Random((self.config.seed << 40) + start)  # so that a resumed run draws the same
        low, high = (math.log(limit) for limit in limits)
        return round(math.exp(generator.uniform(low, high)))

    def _is_simulated(self, position: int) -> bool:
        if self._set is None:
            return True
        if self.own is None:
            return False
        data, first = self.config.data, self._simulated_first
        rest = position - first
        return rest < 0 or math.floor((rest + 1) * data.simulated_share) > math.floor(rest * data.simulated_share)

    @property
    def _simulated_first(self) -> int:
        return round(self.config.data.simulated_first * self.config.budget.scenes)

    def _of_the_set(self, positions: list[int]) -> tuple[Scenes, Features]:
        """Scenes of the fixed set at positions of the run."""
        assert self._set is not None
        index = torch.tensor([self._place(position) for position in positions], device=self.device)
        scenes = self._set[index]
        if self._features is None:
            numbers = sum(field.numel() for field in self.network.features(scenes[:1]))
            if numbers * 4 * len(self._set) >= CACHE_BYTES:
                return scenes, self.network.features(scenes)
            parts = self._chunks(self._set)
            self._features = Features(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        return scenes, Features(*(field[index] for field in self._features))

    def micro_batches(self, first: int, end: int) -> Iterator[MicroBatch]:
        """Scenes ``first`` .. ``end`` of one step in batches of ``optimizer.batch_size``; the last may be smaller."""
        size = self.config.optimizer.batch_size
        for start in range(first, end, size):
            few = min(size, end - start)
            yield MicroBatch(*self.batch(start, few), share=few / (end - first), scenes_seen=start)

    def frozen(self) -> Frozen:
        """The validation set, common to all trials of a study; the training set itself with ``fixed_scenes``."""
        if self._frozen is None:
            budget = self.config.budget
            if self.own is not None:
                scenes = self.own.validation.to(self.device)
            elif self._set is not None:
                scenes = self._set
            else:
                count = range(budget.validation_scenes)
                scenes = simulate(self.config.scene, budget.validation_seed, count, device=self.device)
            self._frozen = Frozen(scenes, self._chunks(scenes), floor_scores(scenes))
        return self._frozen

    def calibration(self) -> Scenes | None:
        """Scenes that were neither trained nor validated on; None where a user's scenes have none set apart."""
        if self.own is None:
            return calibration_scenes(self.config, self.device)
        return self.own.calibration.to(self.device) if self.own.calibration is not None else None

    def epoch(self, number: int) -> Tensor:
        """The order in which an epoch goes through the fixed set."""
        if self._epoch != number:
            assert self._set is not None
            generator = torch.Generator().manual_seed(((self.config.seed << 20) + number) % (1 << 64))
            self._order, self._epoch = torch.randperm(len(self._set), generator=generator), number
        return self._order

    def _place(self, position: int) -> int:
        assert self._set is not None
        if self.own is not None:  # simulated scenes before it do not count
            rest = position - self._simulated_first
            position = rest - math.floor(rest * self.config.data.simulated_share)
        number, place = divmod(position, len(self._set))
        return int(self.epoch(number)[place])

    def _chunks(self, scenes: Scenes) -> list[Features]:
        return [self.network.features(scenes[i : i + CHUNK]) for i in range(0, len(scenes), CHUNK)]


def training_scenes(
    config: RunConfig,
    index: Tensor | range,
    device: torch.device | str = "cpu",
    *,
    num_snapshots: int | None = None,
) -> Scenes:
    """Simulated scenes of a run by their index; their seeds are far from those of validation and test scenes."""
    scene = config.scene if num_snapshots is None else config.scene.replaced({"num_snapshots": num_snapshots})
    return simulate(scene, TRAINING_FAMILY + config.seed, index, device=device)


def calibration_scenes(config: RunConfig, device: torch.device | str = "cpu") -> Scenes:
    """Simulated scenes that the count head ``evidence`` is fitted on."""
    return simulate(config.scene, CALIBRATION_SEED, range(config.budget.calibration_scenes), device=device)


def _refuse(wrong: Tensor, purpose: str, what: str, advice: str) -> None:
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ConfigError(
            f"{int(wrong.sum())} of {len(wrong)} {purpose} scenes hold {what} (the first is scene {first}); {advice}"
        )


def _outside(config: RunConfig, truth: Sources) -> Tensor:
    """[B, K] sources more than half a cell outside the region that the network searches."""
    grid = config.network.cells
    outside = torch.zeros_like(truth.mask)
    positions = to_cosines(truth.azimuth, truth.elevation, truth.range_m)
    for value, (low, high), step in zip(positions, grid.region.bounds(), grid.spacing(), strict=True):
        slack = max(step / 2, 1e-5)  # a coordinate that is known has no step
        outside |= (value < low - slack) | (value > high + slack)
    return outside & truth.mask
