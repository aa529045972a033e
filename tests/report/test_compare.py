"""Two studies side by side: paired where they can be, and honest where they cannot."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from ris_hpo.errors import StudyError
from ris_hpo.programs.program import Program, TrialContext
from ris_hpo.results.compare import compare_studies, comparison_page
from ris_hpo.search.lifecycle import create_or_resume_study
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store

SEEN: list[int] = []


def train(trial: TrialContext) -> float:
    """Each seed has its own scenes, which count for more than the gain: only pairs tell the gains apart."""
    SEEN.append(trial.seed)
    return float(trial.config["gain"]) + (trial.seed % 97)


PROGRAM = Program(train)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    SEEN.clear()
    return open_store(f"sqlite:///{tmp_path / 'studies.db'}")


def study(store: Store, name: str, gains: list[float], **changes: object) -> optuna.Study:
    tree = {"name": name, "program": f"{__name__}:PROGRAM", "space": {"gain": {"low": -1.0, "high": 1.0}}, **changes}
    made = create_or_resume_study(store, StudySpec.parse(tree), score_version=1)
    ranges = {"gain": FloatDistribution(-1, 1)}
    for gain in gains:
        marks = {names.SECONDS: 2.0, names.SEED: 1}
        made.add_trial(create_trial(value=gain + 5, params={"gain": gain}, distributions=ranges, user_attrs=marks))
    return made


def test_winners_meet_the_same_seeds_and_the_better_one_is_named(store: Store, tmp_path: Path) -> None:
    first, second = study(store, "first", [0.5, 0.2]), study(store, "second", [0.1, 0.9])
    found = compare_studies(first, second, tmp_path / "runs", seeds=3)
    assert (found.unpaired, found.seeds, found.better) == (None, 3, "second")
    assert found.difference == pytest.approx(-0.1)
    assert found.low == pytest.approx(-0.1)
    assert SEEN[::2] == SEEN[1::2]
    assert len(set(SEEN)) == 3
    assert (found.first.best, found.first.score, found.second.params) == (1, 5.2, {"gain": 0.1})
    assert "'second' is better: k_loc of 'second' minus 'first' is -0.1" in found.sentence
    assert compare_studies(first, second, tmp_path / "runs", seeds=3) == found
    assert len(SEEN) == 6  # nothing was trained twice
    assert compare_studies(second, first, tmp_path / "runs", seeds=3).better == "second"
    assert compare_studies(first, first, tmp_path / "runs", seeds=3).better is None
    assert compare_studies(first, second, tmp_path / "runs", seeds=1).better is None
    page = comparison_page(found, first, second)
    assert "<script" not in page
    for part in ("first and second", "<code>gain</code>", "&#39;second&#39; is better", "<svg"):
        assert part in page
    store.close()


def test_higher_is_better_where_the_study_says_so(store: Store, tmp_path: Path) -> None:
    first, second = (
        study(store, name, [gain], direction="maximize") for name, gain in (("first", 0.5), ("second", 0.1))
    )
    found = compare_studies(first, second, tmp_path / "runs", seeds=2)
    assert found.better == "first"
    store.close()


def test_what_makes_no_pairs_is_shown_as_searched(store: Store, tmp_path: Path) -> None:
    first, second = study(store, "first", [0.5]), study(store, "second", [0.1])
    second.set_user_attr(names.SCORE_VERSION, 9)
    found = compare_studies(first, second, tmp_path / "runs")
    assert found.unpaired == "Not the same score: version 1 of k_loc in the one study, 9 in the other."
    assert (found.difference, found.better, SEEN) == (None, None, [])
    assert "As searched, k_loc is 'first' 5.5 and 'second' 5.1." in found.sentence
    assert "Not the same score" in comparison_page(found, first, second)
    third = study(store, "third", [0.1])
    assert "Nothing was trained again" in compare_studies(first, third, tmp_path / "runs", train=False).sentence
    fourth = study(store, "fourth", [0.1], score="gain")
    with pytest.raises(StudyError, match=r"different scores, k_loc \(minimize\) and gain \(minimize\)"):
        compare_studies(first, fourth, tmp_path / "runs")
    with pytest.raises(StudyError, match="study 'fifth' has no completed trial"):
        compare_studies(first, study(store, "fifth", []), tmp_path / "runs")
    store.close()


def test_studies_of_other_scenes_make_no_pairs(store: Store, tmp_path: Path) -> None:
    made = []
    for name, snapshots in (("first", 64), ("second", 32)):
        tree = {
            "name": name,
            "base": {"scene.num_snapshots": snapshots},
            "space": {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        }
        one = create_or_resume_study(store, StudySpec.parse(tree), score_version=1)
        ranges = {"optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True)}
        one.add_trial(create_trial(value=2.0, params={"optimizer.learning_rate": 1e-3}, distributions=ranges))
        made.append(one)
    found = compare_studies(*made, tmp_path / "runs")
    assert found.unpaired == "Not the same scenes: the studies differ in scene.num_snapshots."
    store.close()
