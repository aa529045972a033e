from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import sys

import pytest
from rich.console import Console
from rich.text import Text

from ris_hpo.cli import display, live
from ris_hpo.results.replay import ReplayReport, ReplayStep
from ris_hpo.search.counting import Tally
from ris_hpo.search.status import BestTrial
from ris_hpo.text import duration, file_size
from ris_hpo.workers.pool import WorkerView
from ris_hpo.workers.supervisor import PoolSnapshot


def snapshot(ended: int = 3, messages: tuple[str, ...] = ()) -> PoolSnapshot:
    best = BestTrial(1, 2.5, 1.0, 0.75, None, {}, 96)
    views = [
        WorkerView(0, "cpu", "training", trial=4, step=2048, score=3.25, floor=1.0, steps_per_second=321.0),
        WorkerView(1, "cpu", "restarting", restarts=2),
    ]
    return PoolSnapshot("wide", 8, Tally(complete=ended), best, views, 65.0, list(messages))


def test_the_live_view_shows_every_worker_and_the_best_trial() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(live._view(snapshot()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 of 8 trials (3 complete, 0 pruned, 0 failed), 1 min 05 s" in text
    assert "best: trial 1, k_loc 2.500, floor 1.000" in text
    for part in ("2048", "3.250", "321", "restarting"):
        assert part in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_view_titles_its_columns(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    console.print(live._view(snapshot()))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [Text.from_ansi(line).plain for line in printed.splitlines()]
    first = next(index for index, line in enumerate(lines) if "training" in line)
    assert lines[first - 1].split()[:4] == ["worker", "device", "state", "trial"]
    assert any("restarting" in line for line in lines)


def test_without_a_terminal_a_line_is_said_when_something_changed(capsys: pytest.CaptureFixture[str]) -> None:
    live.follow([snapshot(1), snapshot(1), snapshot(2, ("trial 7: worker 1 ended with signal 9",))])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" trials")[0] for line in lines if "trials (" in line] == ["1 of 8", "2 of 8"]
    assert "trial 7: worker 1 ended with signal 9" in lines


def test_without_a_terminal_no_line_is_printed_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PLAIN_SECONDS", 0.0)
    later = dataclasses.replace(snapshot(1), seconds=80.0)
    trained = dataclasses.replace(snapshot(1), workers=[WorkerView(0, "cpu", "training", trial=4, step=4096)])
    live.follow([snapshot(1), later, trained])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "1 min 05 s" in lines[0]
    assert "#4 at 4,096 scenes" in lines[1]
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    with display.progress(10, "scenes") as advance:
        for done in (5, 5, 6):
            advance(done, "half")
    assert capsys.readouterr().err.splitlines() == ["5 of 10 scenes  half", "6 of 10 scenes  half"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (True, "yes"),
        (0.0, "0.000"),
        (2.71828, "2.718"),
        (0.000338, "3.38e-04"),
        (12345.6, "12,346"),
        (7, "7"),
        ("word", "word"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert display.cell(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.26, "1.3 s"), (59.0, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(512, "512 B"), (1000, "1.00 kB"), (23_400, "23.4 kB"), (999_600, "1.00 MB"), (7e8, "700 MB"), (2.5e9, "2.50 GB")],
)
def test_file_sizes(size: int, text: str) -> None:
    assert file_size(size) == text


def test_json_has_no_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    display.print_json({"a": [math.inf, 1.5], "b": {"c": math.nan}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}


def test_an_error_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    display.print_error("first\nsecond [bold]as it is[/]")
    assert capsys.readouterr().err == "error: first second [bold]as it is[/]\n"


def test_logs_and_warnings_go_to_stderr_once(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    kept, level = list(root.handlers), root.level
    try:
        for _ in range(2):
            display.set_up_logging(logging.INFO)
        logging.getLogger("ris_hpo.anything").info("said once")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("said once") == 1
    finally:
        root.handlers[:], root.level = kept, level
        logging.captureWarnings(False)


def test_progress_is_silent_while_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    with display.progress(10, "scenes") as advance:
        advance(5, "half")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("older", [False, True])
def test_a_curve_of_an_earlier_version_that_came_out_differently_says_why(
    older: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [ReplayStep(32, 5.5, 5.25)]
    display.comparison(ReplayReport("smoke", 0, False, 0.25, steps, True, False, older))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "different, by up to 0.25"
    assert ("an earlier version recorded this curve" in lines[-2]) == older


def test_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes them for markup: a path lost its part in brackets, and ``[/b]`` was a traceback."""
    display.facts("", {"file": "a[red]b[/b].toml"})
    display.table("", ["file"], [["c[red]d[/b].toml"]])
    out = capsys.readouterr().out
    assert "a[red]b[/b].toml" in out
    assert "c[red]d[/b].toml" in out
