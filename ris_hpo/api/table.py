"""The workers of a run as a table in a notebook, drawn anew with each snapshot."""

from __future__ import annotations

import sys
from typing import Any

from markupsafe import Markup, escape

from ris_hpo.text import duration
from ris_hpo.workers.supervisor import PoolSnapshot


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


class LiveTable:
    """One table in the output of a notebook's cell."""

    def __init__(self) -> None:
        self._handle: Any = None

    def update(self, snapshot: PoolSnapshot) -> None:
        """Draw the table, in the place of the one before."""
        from IPython.display import HTML, display  # comes with every notebook

        shown = HTML(as_html(snapshot))
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)


def as_html(snapshot: PoolSnapshot) -> str:
    """Return a snapshot as a bar, a line of counts and a table of workers."""
    tally, best = snapshot.tally, snapshot.best
    counts = f"{tally.at_rest} of {snapshot.n_trials} trials: {tally.complete} complete, {tally.pruned} pruned"
    counts += f", {tally.paused} paused" if tally.paused else ""
    counts += f", {tally.fail} failed" if tally.fail else ""
    leader = "" if best is None else f"; best: trial {best.number}, {snapshot.metric} {best.score:.4g}"
    titles = ("worker", "device", "state", "trial", snapshot.step_unit, snapshot.metric, "restarts")
    rows = [
        (each.slot, each.device, each.state, each.trial, each.step, each.score, each.restarts)
        for each in snapshot.workers
    ]
    head = Markup("").join(Markup("<th>{}</th>").format(title) for title in titles)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(_cell(cell)) for cell in row))
        for row in rows
    )
    return str(
        Markup(
            '<progress style="width:100%" max="{}" value="{}"></progress>'
            "<p>{}, {}{}</p><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>"
        ).format(snapshot.n_trials, tally.at_rest, counts, duration(snapshot.seconds), escape(leader), head, body)
    )


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
