"""A running pool as a person sees it: one view of all workers on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ris_hpo.cli import display
from ris_hpo.text import duration

if TYPE_CHECKING:
    from ris_hpo.workers.local import PoolSnapshot

PLAIN_SECONDS = 15.0


def follow(snapshots: Iterable[PoolSnapshot], n_trials: int) -> None:
    """Show a pool until it ends; everything goes to stderr."""
    if not sys.stderr.isatty():
        _follow_plainly(snapshots, n_trials)
        return
    with Live(console=display.stderr(), refresh_per_second=4, transient=True) as view:
        for snapshot in snapshots:
            for message in snapshot.messages:
                view.console.print(message, markup=False, style="yellow")
            view.update(_view(snapshot, n_trials))


def tell(event: Mapping[str, Any]) -> None:
    """One line for each trial that a single worker takes up or ends."""
    if event["event"] == "claimed":
        display.print_note(f"trial {event['number']}: taken up")
    elif event["event"] == "ended":
        value = event.get("value")
        parts = [
            event.get("state"),
            None if value is None else f"k_loc {value:.3f}",
            event.get("cause"),
            event.get("error"),
        ]
        display.print_note(f"trial {event.get('number', '?')}: {', '.join(str(part) for part in parts if part)}")


def _headline(snapshot: PoolSnapshot, n_trials: int) -> str:
    tally, best = snapshot.tally, snapshot.best
    text = f"{tally.ended} of {n_trials} trials ({tally.complete} complete, {tally.pruned} pruned, {tally.fail} failed)"
    text += f", {duration(snapshot.seconds)}"
    if best is not None:
        text += f" | best: trial {best.number}, k_loc {best.k_loc:.3f}"
        text += f", floor {best.floor:.3f}" if best.floor is not None else ""
    return text


def _follow_plainly(snapshots: Iterable[PoolSnapshot], n_trials: int) -> None:
    ended, spoken = -1, 0.0
    for snapshot in snapshots:
        now = time.monotonic()
        for message in snapshot.messages:
            display.print_note(message)
        if snapshot.tally.ended == ended and now - spoken < PLAIN_SECONDS:
            continue
        ended, spoken = snapshot.tally.ended, now
        at_work = [
            f"#{each.trial} at {each.step or 0:,} scenes"
            + (f" k_loc {each.k_loc:.2f}" if each.k_loc is not None else "")
            for each in snapshot.workers
            if each.trial is not None
        ]
        display.print_note(" | ".join([_headline(snapshot, n_trials), *at_work]))


def _view(snapshot: PoolSnapshot, n_trials: int) -> Group:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("worker", "device", "state", "trial", "scenes", "k_loc", "floor", "scenes/s", "memory", "restarts"):
        grid.add_column(column, justify="left" if column in ("worker", "device", "state") else "right")
    for each in snapshot.workers:
        rate = None if each.scenes_per_second is None else f"{each.scenes_per_second:,.0f}"
        memory = None if each.memory_bytes is None else f"{each.memory_bytes / 2**30:.1f} GiB"
        row = (
            each.slot,
            each.device,
            each.state,
            each.trial,
            each.step,
            each.k_loc,
            each.floor,
            rate,
            memory,
            each.restarts,
        )
        grid.add_row(*(display.cell(value) for value in row))
    bar = ProgressBar(total=n_trials, completed=min(snapshot.tally.ended, n_trials))
    return Group(Text(_headline(snapshot, n_trials)), bar, grid)
