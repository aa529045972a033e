"""The report: complete, self-contained, escaped, honest about what is missing, and quick."""

import json
import re
import time
from html.parser import HTMLParser

import optuna
import pytest
from matplotlib.figure import Figure
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from ris_hpo.errors import OutputError
from ris_hpo.report.collect import collect
from ris_hpo.report.html import as_html, as_json, headline, write_report
from ris_hpo.report.study_figures import curve_range, history
from ris_hpo.store import attributes as names
from tests.report.synthetic import FLOOR, fill, make_study, scores

CANARY = "canary-Pa55word"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest and close, and collects what a reader and a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.references = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in {"src", "href", "action"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def study():
    return make_study()


@pytest.fixture(scope="module")
def page(study):
    return as_html(collect(study))


def test_one_file_without_script_or_reference(page):
    parsed = Page(page)
    assert parsed.references == []
    assert "script" not in parsed.tags
    assert not re.search(r"url\((?!#)", page)  # clip paths of its own alone
    assert set(re.findall(r'href="(.)', page)) <= {"#"}
    assert "@import" not in page
    assert len(page) < 400_000


def test_every_section_is_there(page):
    titles = re.findall(r"<h2>([^<]+)</h2>", page)
    assert titles == [
        "Best against base and reference",
        "History",
        "Learning curves",
        "What mattered",
        "Best trials",
        "Cost, pruning, failures",
        "How it was run",
    ]
    text = " ".join(Page(page).text)
    for piece in ("ml reference", "saved by pruning", "core-seconds", "lost worker", "asha", "0123456789abcdef"):
        assert piece in text


def test_figures_agree_with_the_study(study):
    report = collect(study)
    complete = [t for t in study.trials if t.state is TrialState.COMPLETE]
    proper = [t for t in complete if names.DIVERGED not in t.user_attrs]
    assert report.best.number == min(proper, key=lambda t: t.value).number
    assert report.base.number == 0
    assert report.floor == FLOOR
    assert report.counts["complete"] == len(complete)
    assert report.counts["diverged"] == len(complete) - len(proper)
    assert report.counts["pruned"] == sum(t.state is TrialState.PRUNED for t in study.trials)
    assert report.counts["fail"] == sum(report.causes.values())
    assert report.cost["core_seconds"] == pytest.approx(2 * sum(t.user_attrs[names.SECONDS] for t in study.trials))
    assert report.cost["gpu_seconds"] == 0
    missing = sum(400_000 - t.user_attrs[names.SCENES] for t in study.trials if t.state is TrialState.PRUNED)
    assert report.pruning.saved_scenes == missing
    assert next(iter(sorted(report.importances, key=report.importances.get, reverse=True))) in {
        "optimizer.learning_rate",
        "network.front_end",
    }
    assert sum(report.importances.values()) == pytest.approx(1)


def rungs(decisive):
    """Forty trials of which those with ``decisive`` = "bad" are pruned at the first rung: no survivor has it."""
    study = optuna.create_study()
    space = {
        "front_end": optuna.distributions.CategoricalDistribution(["good", "bad"]),
        "rate": optuna.distributions.FloatDistribution(0.0, 1.0),
        "dropout": optuna.distributions.FloatDistribution(0.0, 1.0),
    }
    for number in range(40):
        front_end = "bad" if number in decisive else "good"
        rate = (number * 0.618034) % 1
        value = (6.0 if front_end == "bad" else 4.0) + 0.3 * rate
        curve = {500: 6.5, 1000: value}
        if front_end == "good":
            curve |= {2000: value - 0.3, 4000: value - 0.5}
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if front_end == "bad" else TrialState.COMPLETE,
                value=None if front_end == "bad" else value - 0.5,
                params={"front_end": front_end, "rate": rate, "dropout": (number * 0.414214) % 1},
                distributions=space,
                intermediate_values=curve,
            )
        )
    return study


def test_importances_stand_on_all_trials_at_the_lowest_rung_they_share():
    study = rungs(range(0, 40, 3))
    for last_step in (500, 1000):  # trials that are still running change nothing
        study.ask().report(3.0, last_step)
    report = collect(study)
    assert report.comparison.step == 1000
    assert (report.comparison.complete, report.comparison.pruned, report.comparison.left_out) == (26, 14, 0)
    assert report.comparison.values[1] == study.trials[1].intermediate_values[1000]
    assert report.by_importance()[0] == "front_end"
    assert report.importances["front_end"] > 0.4
    assert report.importances["dropout"] < 0.1
    text = (
        "From the scores of 40 trials (26 complete, 14 pruned) at 1,000 scenes, the last step that all of them reached."
    )
    assert text in as_html(report)
    assert len([line for line in as_html(report).split("<figure>") if "k_loc, front_end" in line]) == 1


def test_a_trial_that_diverged_before_the_step_counts_as_worst():
    study = rungs(range(0, 40, 3))
    space = study.trials[0].distributions
    params = {"front_end": "good", "rate": 0.99, "dropout": 0.5}
    marks = {"user_attrs": {names.DIVERGED: "nan"}, "params": params, "distributions": space}
    study.add_trial(optuna.trial.create_trial(value=7.0, intermediate_values={500: 6.9}, **marks))
    study.add_trial(optuna.trial.create_trial(state=TrialState.PRUNED, params=params, distributions=space))
    report = collect(study)
    assert report.comparison.values[40] == 7.0
    assert (report.comparison.diverged, report.comparison.left_out) == (1, 1)
    assert "1 have no score there" in as_html(report)
    assert [trial.number for trial in report.compared()][-1] == 40


def test_the_axis_of_curves_is_that_of_the_scores_trials_end_at():
    study = make_study()
    report = collect(study)
    low, high = curve_range(report)
    ends = sorted(trial.last_value for trial in report.trials if trial.last_value is not None)
    assert low < min(ends) < ends[len(ends) // 2] < high
    assert low > FLOOR  # which no trial comes near
    assert high < ends[-1] < max(value for trial in report.trials for _, value in trial.curve)
    assert "floor 1.03 ↓" in as_html(report)


def test_the_best_trials_show_what_they_change():
    study = optuna.create_study()
    space = {name: optuna.distributions.FloatDistribution(0, 1) for name in ("rate", "dropout", "width")}
    for number, (value, rate) in enumerate([(3.0, 0.5), (2.0, 0.25), (2.5, 0.75)]):
        params = {"rate": rate, "dropout": 0.125, "width": 0.5 if number < 2 else 0.625}
        marks = {names.ORIGIN: "base"} if number == 0 else {}
        study.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=space, user_attrs=marks))
    page = as_html(collect(study))
    table = page.split("What they change")[1].split("</table>")[0]
    rows = [re.findall(r"<t[dh][^>]*>(?:<code>)?([^<]*)", row) for row in table.split("<tr>")[1:]]
    assert rows == [
        ["Parameter", "base", "trial 1", "trial 2"],
        ["rate", "0.5", "0.25", "0.75"],
        ["width", "0.5", "=", "0.625"],
    ]


def test_json_is_json_and_round_trips(study, tmp_path):
    out = tmp_path / "report.json"
    write_report(study, out)
    tree = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert tree["best"]["value"] == collect(study).best.value
    assert len(tree["trials"]) == len(study.trials)
    assert tree == json.loads(json.dumps(as_json(collect(study)) | {"made": tree["made"]}))


def test_what_users_and_errors_say_is_escaped():
    study = optuna.create_study(study_name="<img src=x onerror=alert(1)>")
    study.set_user_attr(names.SPEC, {"description": "</title><script>alert(2)</script>"})
    study.set_user_attr(names.COMMAND, "ris-hpo run --set 'a=<b>'")
    fill(study)
    page = as_html(collect(study))
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert "<b>out_of_memory" not in page
    assert "<b>lost_worker" not in page


def test_no_password_reaches_the_page_or_the_json(tmp_path):
    study = make_study(name="secret")
    url = f"postgresql://someone:{CANARY}@db/ris"
    study.set_user_attr(names.COMMAND, f"ris-hpo run --storage {url}")
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.FAIL,
            user_attrs={names.CAUSE: "bug", names.ERROR: f"OperationalError: {url} password={CANARY}"},
        )
    )
    for name in ("report.html", "report.json"):
        write_report(study, tmp_path / name)
        assert CANARY not in (tmp_path / name).read_text()
        assert "***" in (tmp_path / name).read_text()


def test_empty_running_and_bare_studies_have_a_report_too():
    empty = optuna.create_study()
    assert headline(collect(empty)) == ["No trial has completed yet (0 ended)."]
    Page(as_html(collect(empty)))
    running = optuna.create_study()
    running.ask().report(3.0, 1000)
    Page(as_html(collect(running)))
    bare = optuna.create_study()
    fill(bare, trials=12, bare=True)
    Page(as_html(collect(bare)))
    alike = optuna.create_study()
    alike.add_trials([optuna.trial.create_trial(value=1.0) for _ in range(6)])
    assert "score alike" in collect(alike).importances_note


def test_the_winner_is_told(study):
    winner = {
        "winner": "trial 3", "distinguishable": True, "verdict": "Trial 3 is better.", "method": "Paired.",
        "base_mean": 2.0, "peers": [],
        "candidates": [
            {"name": "trial 3", "mean": 1.7, "difference": -0.3, "low": -0.4, "high": -0.2, "searched": 1.6},
            {"name": "trial 9", "mean": 1.9, "difference": -0.1, "low": None, "high": None, "searched": 1.65},
        ],
    }  # fmt: skip
    other = make_study(name="confirmed")
    other.set_user_attr(names.WINNER, winner)
    page = as_html(collect(other))
    assert "Trial 3 is better." in page
    assert 'class="verdict sure"' in page
    Page(page)


def test_two_objectives_are_ranked_by_k_loc():
    study = optuna.create_study(directions=["minimize", "minimize"])
    for index in range(8):
        study.add_trial(
            optuna.trial.create_trial(
                values=[3.0 - 0.1 * index, 1000.0 * index],
                params={"x": index / 8},
                distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
                user_attrs={names.COMPONENTS: scores(3.0 - 0.1 * index)},
            )
        )
    report = collect(study)
    assert report.best.number == 7
    assert report.importances == {"x": 1.0}
    Page(as_html(report))


def test_a_score_that_is_maximised_is_so_in_every_sentence_and_figure():
    own = optuna.create_study(direction="maximize")
    own.set_user_attr(names.SPEC, {"program": "own:train", "score": "accuracy", "direction": "maximize", "worst": 0.0})
    widths = IntDistribution(1, 9)
    for width, value in ((4, 0.5), (1, 0.25), (9, 0.75), (6, 0.625), (2, 0.0)):
        marks = {names.METRICS: {"loss": 1 - value}, names.SCENES: 2, names.SECONDS: 3.0}
        marks |= {names.ORIGIN: "base"} if width == 4 else {}
        marks |= {names.DIVERGED: "loss is nan"} if value == 0 else {}
        curve = {1: value / 2, 2: value}
        own.add_trial(
            create_trial(
                value=value,
                params={"width": width},
                distributions={"width": widths},
                intermediate_values=curve,
                user_attrs=marks,
            )
        )
    report = collect(own)
    assert report.best.number == 2
    assert [trial.number for trial in report.compared()] == [2, 3, 0, 1, 4]
    assert [trial.number for trial in report.ranked(report.trials)] == [2, 3, 0, 1, 4]
    assert headline(report)[:2] == [
        "Trial 2 scores accuracy 0.750.",
        "That is 0.250 above the base configuration's 0.500.",
    ]
    low, high = curve_range(report)
    assert low > 0.0  # cut off below, where the bad ones are
    assert high > 0.75
    page = as_html(report)
    Page(page)
    assert "higher is better" in page
    assert ">loss <" in page
    for word in ("k_loc", "scenes", "pipeline", "Cramér"):
        assert word not in page
    drawn = Figure()
    history(drawn, report)
    best_so_far = next(line for line in drawn.axes[0].lines if line.get_label() == "best so far")
    assert list(best_so_far.get_ydata()) == [0.5, 0.5, 0.75, 0.75, 0.75]


def test_a_failed_write_leaves_nothing(study, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(study, tmp_path / "missing" / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_thousand_trials_take_seconds_and_stay_small(tmp_path):
    study = make_study(name="large", trials=1000, reports=50)
    begun = time.process_time()  # whatever else the machine does
    write_report(study, tmp_path / "report.html")
    assert time.process_time() - begun < 10
    assert (tmp_path / "report.html").stat().st_size < 1_500_000
