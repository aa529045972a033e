"""Progress of a running pool: one view of all workers on a terminal, plain lines in a pipe or a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ris_hpo.cli import display
from ris_hpo.text import duration

if TYPE_CHECKING:
    from ris_hpo.workers.supervisor import PoolSnapshot

PLAIN_SECONDS = 15.0
"""Least time between two plain lines while no trial ends."""


def follow(snapshots: Iterable[PoolSnapshot]) -> None:
    """Show a pool's progress on stderr until it ends."""
    if not sys.stderr.isatty():
        _follow_plainly(snapshots)
        return
    with Live(console=display.stderr(), refresh_per_second=4, transient=True) as view:
        for snapshot in snapshots:
            for message in snapshot.messages:
                view.console.print(message, markup=False, style="yellow")
            view.update(_view(snapshot))


def _counts(snapshot: PoolSnapshot) -> str:
    tally = snapshot.tally
    by_state = f"{tally.complete} complete, {tally.pruned} pruned, {tally.fail} failed"
    by_state += f", {tally.paused} paused" if tally.paused else ""
    return f"{tally.at_rest} of {snapshot.n_trials} trials ({by_state})"


def _best(snapshot: PoolSnapshot) -> str:
    best = snapshot.best
    if best is None:
        return ""
    floor = f", floor {best.floor:.3f}" if best.floor is not None else ""
    return f" | best: trial {best.number}, {snapshot.metric} {best.score:.3f}{floor}"


def _follow_plainly(snapshots: Iterable[PoolSnapshot]) -> None:
    ended, printed_at, printed = -1, 0.0, ""
    for snapshot in snapshots:
        now = time.monotonic()
        for message in snapshot.messages:
            display.print_note(message)
        if snapshot.tally.ended == ended and now - printed_at < PLAIN_SECONDS:
            continue
        running = [
            f" | #{each.trial} at {each.step or 0:,} {snapshot.step_unit}"
            + (f" {snapshot.metric} {each.score:.2f}" if each.score is not None else "")
            for each in snapshot.workers
            if each.trial is not None
        ]
        rest = "".join([_best(snapshot), *running])
        ended, printed_at = snapshot.tally.ended, now
        if (news := _counts(snapshot) + rest) != printed:  # the clock alone is no news
            printed = news
            display.print_note(f"{_counts(snapshot)}, {duration(snapshot.seconds)}{rest}")


def _view(snapshot: PoolSnapshot) -> Group:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    unit = snapshot.step_unit
    figures = ("trial", unit, snapshot.metric, "floor", f"{unit}/s", "memory", "restarts")
    for column in ("worker", "device", "state", *figures):
        words = column in ("worker", "device", "state")
        grid.add_column(column, justify="left" if words else "right", no_wrap=column == "state")
    for each in snapshot.workers:
        rate = None if each.steps_per_second is None else f"{each.steps_per_second:,.0f}"
        memory = None if each.memory_bytes is None else f"{each.memory_bytes / 2**30:.1f} GiB"
        row = (
            each.slot,
            each.device,
            each.state,
            each.trial,
            each.step,
            each.score,
            each.floor,
            rate,
            memory,
            each.restarts,
        )
        grid.add_row(*(Text(display.cell(value)) for value in row))
    line = Table.grid(expand=True)  # a bar alone ends without a line break and would swallow the titles below it
    line.add_row(ProgressBar(total=snapshot.n_trials, completed=snapshot.tally.at_rest))
    headline = f"{_counts(snapshot)}, {duration(snapshot.seconds)}{_best(snapshot)}"
    return Group(Text(headline), line, grid)
