"""Tables, progress, errors and logs: coloured and updated in place on a terminal, plain lines in a pipe or a file."""

from __future__ import annotations

import csv
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ris_hpo.atomic import replacing
from ris_hpo.errors import ConfigError, one_line
from ris_hpo.store.credentials import redact
from ris_hpo.text import finite

if TYPE_CHECKING:
    from ris_hpo.results.replay import ReplayReport

PLAIN_WIDTH = 120
PLAIN_SECONDS = 10.0
"""Least time between two plain lines of progress."""


def stdout() -> Console:
    """The console for results."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def stderr() -> Console:
    """The console for progress, notes and errors."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH, highlight=False)


def set_up_logging(level: int) -> None:
    """Send every logger of the process to stderr, once."""
    root = logging.getLogger()
    for former in list(root.handlers):
        if isinstance(former, RichHandler) or type(former) is logging.StreamHandler:
            root.removeHandler(former)
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=stderr(), show_path=False, rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)


def print_error(message: str) -> None:
    """Print one line on stderr, with control characters escaped and passwords removed."""
    line = redact(one_line(" ".join(message.split())))  # a user may type a store's URL into any option
    stderr().print("[bold red]error:[/] ", end="", soft_wrap=True)
    stderr().print(line, markup=False, soft_wrap=True)


def print_note(message: str) -> None:
    """Print a line on stderr that is not part of the result."""
    stderr().print(redact(message), markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON alone on stdout; NaN and infinities become null."""
    sys.stdout.write(json.dumps(finite(value), indent=2, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()  # a program may read it from a pipe while the command goes on


def write_csv(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write records of the same keys as CSV with a head line; what is not known is empty.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = list(rows)
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]) if lines else [])
        writer.writeheader()
        writer.writerows(lines)


def write_parquet(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write records of the same keys as Parquet; a column of values of several types is written as text.

    Raises:
        ConfigError: pyarrow is not installed.
        OutputError: the file cannot be written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("Parquet files need pyarrow; install ris-hpo[parquet]") from None
    columns = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            columns[name] = pyarrow.array([None if value is None else str(value) for value in values])
    with replacing(path) as partial:
        parquet.write_table(pyarrow.table(columns), partial)


def print_result(line: str) -> None:
    """Print a line on stdout and flush it."""
    print(line, flush=True)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, text: Collection[int] = (0,)
) -> None:
    """Print a table on stdout; columns at the positions ``text`` hold words, the others numbers."""
    grid = Table(header_style="bold", box=None, pad_edge=False)
    for position, column in enumerate(columns):
        grid.add_column(column, justify="left" if position in text else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell(value)) for value in row))  # text, since a path may have brackets
    _print_under(title, grid)


def facts(title: str, pairs: Mapping[str, object]) -> None:
    """Print name and value pairs on stdout."""
    grid = Table(show_header=False, box=None, pad_edge=False)
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        grid.add_row(name, Text(cell(value)))
    _print_under(title, grid)


def _print_under(title: str, grid: Table) -> None:
    console = stdout()
    if title:
        console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(grid)


def cell(value: object) -> str:
    """Format a value for a table: three decimals, a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value and abs(value) < 0.01:
            return f"{value:.2e}"
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def comparison(report: ReplayReport) -> None:
    """Print a recorded curve beside the replayed one, and whether they agree."""
    rows = [(step.step, f"{step.recorded:.9f}", f"{step.replayed:.9f}") for step in report.steps]
    columns = [report.step_unit, f"recorded {report.metric}", "replayed"]
    table(f"trial {report.number} of '{report.study}'", columns, rows, text=())
    if not report.fingerprint_agrees:
        print_result("the configuration differs from the recorded one: the program has changed since")
    if report.older and not report.identical:
        print_result("an earlier version recorded this curve: CHANGELOG.md says what is computed differently since")
    if not report.stopped:
        difference = f"different, by up to {report.max_difference:.3g}"
        print_result("identical" if report.identical else difference)


Advance = Callable[[float, str], None]


@contextmanager
def progress(total: float, unit: str) -> Iterator[Advance]:
    """Show progress on stderr: a bar on a terminal, else at most one line every ``PLAIN_SECONDS``, none twice.

    Yields:
        A function of (units done, a short status).
    """
    if sys.stderr.isatty():
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=stderr(), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, status: bar.update(task, completed=done, description=status)
        return
    printed_at, printed = time.monotonic(), ""

    def advance(done: float, status: str) -> None:
        nonlocal printed_at, printed
        now = time.monotonic()
        line = f"{done:,.0f} of {total:,.0f} {unit}  {status}".rstrip()
        if now - printed_at >= PLAIN_SECONDS and line != printed:
            printed_at, printed = now, line
            print_note(line)

    yield advance
