"""How many small faults in the code do its tests notice?

    python -m benchmarks.mutants run [ROOM ...]     # plants faults one at a time; goes on where it stopped
    python -m benchmarks.mutants run --again        # those that survived, once more, after tests were added
    python -m benchmarks.mutants table              # the score of each room and the faults that survived

cosmic-ray knows the faults (another operator, a number one higher, a condition negated, a decorator dropped ...). Its
full list is days of work, since every operator has a dozen replacements, so places of each module are drawn with a
seed, and one fault for each place.

The tests of a room are collected once, in a copy of the tree, and each fault is tried in a fork of that process, which
costs no import. A first fork notes which tests call which functions: a fault is tried on the tests that call its
function, until one fails. A fault within a function takes the place of the function's code. A fault elsewhere (a
default of a specification, a decorator) is written to its file: the fork imports everything of this tree once more, and
tries every test of the files in which one calls anything in that module: a default or a bound is no call.

``mutants.json`` beside this file keeps the result. A survivor that no test can notice gets its reason there by hand,
under ``equivalent``; it then leaves the score, and later runs keep the reason.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import cosmic_ray.plugins
import pytest
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutants"
RESULTS = Path(__file__).parent / "mutants.json"
SERVICE = [
    f"tests/service/test_{of}.py"
    for of in ("space", "samplers", "studies", "trial_ends", "trials", "promotion", "upkeep")
]
DEFAULTS = "tests/test_settings.py::test_the_kept_defaults_are_those_of_the_code"
ROOMS = {
    "scoring": ["tests/scoring"],
    "trials": SERVICE,
    "search": [*SERVICE, DEFAULTS],
    "learning": ["tests/learning", "tests/report/test_bundle.py", DEFAULTS],
    "training": ["tests/training", DEFAULTS],
}
LONG = ("studies.py::test_every_dimension", "test_nobody.py", "test_units.py", "kill_9")
"""Parts of names of tests that are left out, since they take long and say the same of many places."""
OPTIONS = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
OPTIONS += ["-m", "not slow and not system and not postgres"]
OPTIONS.append(f"--basetemp={WORK / 'tmp'}")  # each fork empties it first

Calls = dict[str, dict[str, Any]]
"""Of each test its seconds and the functions that it calls, as ``module:line``."""


# -- the faults of a module ------------------------------------------------------------------------------------------


def session_of(module: Path) -> Path:
    """Where the faults of a module and their results are kept, as long as it stays the same."""
    digest = hashlib.sha256(module.read_bytes()).hexdigest()[:12]
    return WORK / f"{'.'.join(module.with_suffix('').parts)}-{digest}.sqlite"


def without_effect(source: str) -> set[tuple[int, int]]:
    """Every (line, column) in annotations, where ``X | None`` is no arithmetic, and in the flags of dataclasses."""
    found: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(source)):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for part in parts + (node.decorator_list if isinstance(node, ast.ClassDef) else []):
            if isinstance(part, ast.expr):
                last_line, last_column = part.end_lineno or part.lineno, part.end_col_offset or 0
                for line in range(part.lineno, last_line + 1):
                    first = part.col_offset if line == part.lineno else 0
                    found |= {(line, column) for column in range(first, last_column if line == last_line else 200)}
    return found


def places_of(module: Path, seed: int) -> list[WorkItem]:
    """One fault for each place of a module, in an order drawn with the seed, so that more faults contain fewer."""
    with use_db(str(session_of(module))) as work:
        if work.num_work_items == 0:
            init([module], work, {})
        skipped = without_effect(module.read_text())
        places: dict[tuple[int, int], list[WorkItem]] = {}
        for item in work.work_items:
            if item.mutations[0].start_pos not in skipped:
                places.setdefault(item.mutations[0].start_pos, []).append(item)
    order = sorted(places)
    random.Random(f"{seed} {module}").shuffle(order)
    return [
        random.Random(f"{seed} {module} {place}").choice(
            sorted(places[place], key=lambda item: (item.mutations[0].operator_name, item.mutations[0].occurrence))
        )
        for place in order
    ]


def functions_in(code: CodeType) -> Iterator[CodeType]:
    """The code of every function of a module or class, in order, but not of those within functions."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            is_class = not each.co_flags & 0x2  # CO_NEWLOCALS: a function's
            yield from functions_in(each) if is_class else (each,)


def changed_functions(module: Path, source: str, mutant: str, line: int) -> list[tuple[CodeType, CodeType]]:
    """The functions that a fault changes, as they were and as they are; none where it changes something else too."""
    inside = any(
        isinstance(node, ast.FunctionDef) and node.body[0].lineno <= line <= (node.end_lineno or 0)
        for node in ast.walk(ast.parse(source))
    )
    try:
        before, after = (list(functions_in(compile(text, str(module), "exec"))) for text in (source, mutant))
    except SyntaxError:
        return []
    if not inside or len(before) != len(after):
        return []
    return [
        (old, new)
        for old, new in zip(before, after, strict=True)
        if old != new and old.co_freevars == new.co_freevars and old.co_firstlineno == new.co_firstlineno
    ]


# -- running tests ---------------------------------------------------------------------------------------------------


def forked(action: Callable[[], bool], limit_s: float) -> tuple[bool, str]:
    """Return whether an action in a fork of this process came to a good end in time, and what it wrote."""
    written = WORK / "output.txt"
    child = os.fork()
    if child == 0:
        good = False
        try:
            os.setsid()
            file = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(file, stream)
            good = action()
        finally:
            sys.stdout.flush()
            os._exit(not good)
    waiting = os.pidfd_open(child)
    ended, _, _ = select.select([waiting], [], [], limit_s)
    os.close(waiting)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # whatever its tests have started
    status = os.waitpid(child, 0)[1]
    return bool(ended) and status == 0, written.read_text(errors="replace")


def pass_all(session: pytest.Session, items: Sequence[pytest.Item], *, to_the_end: bool = False) -> bool:
    """Run tests until the first that fails, or all of them; return whether none failed."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed and not to_the_end:
            print(f"noticed by {item.nodeid}")
            return False
    return session.testsfailed == 0


class Recorder:
    """Notes the functions of the package which each test calls, by itself and by its fixtures; a plugin of pytest."""

    def __init__(self) -> None:
        self.folder = str(Path("ris_hpo").resolve())
        self.known: dict[CodeType, str] = {}
        self.called: list[set[str]] = [set()]
        self.of_fixture: dict[Any, set[str]] = {}
        self.tests: Calls = {}
        self.failed: set[str] = set()

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        place = self.known.get(code)
        if place is None:
            inside = code.co_filename.startswith(self.folder)
            place = f"{os.path.relpath(code.co_filename)}:{code.co_firstlineno}" if inside else ""
            self.known[code] = place
        if place:
            self.called[-1].add(place)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        self.called.append(set())
        try:
            return (yield)
        finally:
            here = self.called.pop()
            self.of_fixture.setdefault(fixturedef, set()).update(here)
            self.called[-1] |= here

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, Any, Any]:
        self.called = [set()]
        threading.settrace(self._note)
        sys.settrace(self._note)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            fixtures = [one for several in item._fixtureinfo.name2fixturedefs.values() for one in several]
            called = self.called[0].union(*(self.of_fixture.get(one, set()) for one in fixtures))
            self.tests.setdefault(item.nodeid, {"seconds": 0.0})["calls"] = sorted(called)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests.setdefault(report.nodeid, {"seconds": 0.0})["seconds"] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)


# -- one room --------------------------------------------------------------------------------------------------------


class Planter:
    """Tries the faults of one room on its collected tests; a plugin of pytest, in place of its loop over the tests."""

    def __init__(self, room: str, faults: int, seed: int, again: bool) -> None:
        self.room = room
        self.seed = seed
        self.again = again
        self.modules = sorted(Path("ris_hpo", room).rglob("*.py"))
        self.places = {module: places_of(module, seed) for module in self.modules}
        self.share = faults / sum(map(len, self.places.values()))
        self.calls: Calls = {}
        self.live: dict[tuple[str, int, str], list[FunctionType]] = {}
        self.finished = False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the long tests out."""
        items[:] = [item for item in items if not any(name in item.nodeid for name in LONG)]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try all faults, then write down what survived."""
        self.calls = self._calls(session)
        for each in gc.get_objects():
            if type(each) is FunctionType:  # objects with a class of their own making may warn when asked
                code = each.__code__
                self.live.setdefault((code.co_filename, code.co_firstlineno, code.co_qualname), []).append(each)
        mutants: dict[str, int] = {}
        survivors: list[str] = []
        for module in self.modules:
            chosen = self.places[module][: max(1, round(self.share * len(self.places[module])))]
            with use_db(str(session_of(module))) as work:
                decided = dict(work.results)
                for number, item in enumerate(chosen, 1):
                    result = decided.get(item.job_id)
                    if result is None or (self.again and result.test_outcome is TestOutcome.SURVIVED):
                        result = self._try(session, item)
                        work.set_result(item.job_id, result)
                        line = item.mutations[0].start_pos[0]
                        print(
                            f"{number}/{len(chosen)} {result.test_outcome.value} {module}:{line}",
                            *[row for row in result.output.splitlines() if row.startswith("noticed")][:1],
                            flush=True,
                        )
                    mutants[str(module)] = mutants.get(str(module), 0) + 1
                    if result.test_outcome is TestOutcome.SURVIVED:
                        survivors.append(f"{module}: " + "  ->  ".join(row[2:] for row in result.diff.splitlines()))
        record(self.room, mutants, survivors)
        self.finished = True
        return True

    def _calls(self, session: pytest.Session) -> Calls:
        """Run the tests without a fault, or take what such a run of the same tree left."""
        content = b"".join(path.read_bytes() for path in sorted(Path().rglob("*.py")))
        content += " ".join(ROOMS[self.room]).encode()
        kept = WORK / f"calls-{hashlib.sha256(content).hexdigest()[:12]}.json"

        def note() -> bool:
            recorder = Recorder()
            session.config.pluginmanager.register(recorder)
            pass_all(session, session.items, to_the_end=True)
            for failed in recorder.failed:  # a limit of time, where the machine is busy: it notices nothing
                del recorder.tests[failed]
            kept.write_text(json.dumps(recorder.tests))
            print("failed without a fault:", *sorted(recorder.failed))
            return len(recorder.failed) <= 3

        if not kept.exists():
            passed, output = forked(note, 3600)
            if not passed:
                kept.unlink(missing_ok=True)
                raise RuntimeError(f"{self.room}: the tests fail without a fault\n{output[-3000:]}")
        calls: Calls = json.loads(kept.read_text())
        return calls

    def _try(self, session: pytest.Session, item: WorkItem) -> WorkResult:
        """Plant one fault and run its tests."""
        spec: MutationSpec = item.mutations[0]
        module = Path(spec.module_path)
        source = module.read_text()
        operator = cosmic_ray.plugins.get_operator(spec.operator_name)(**spec.operator_args)
        mutant = mutate_code(source, operator, spec.occurrence)
        pairs = changed_functions(module, source, mutant, spec.start_pos[0])
        found = [self.live.get((str(module.resolve()), old.co_firstlineno, old.co_qualname), []) for old, _ in pairs]
        if pairs and all(found):
            wanted = {f"{module}:{old.co_firstlineno}" for old, _ in pairs}
            tests = self._selected(session, lambda called: bool(wanted & called), everywhere=False)

            def action() -> bool:
                for (_, new), functions in zip(pairs, found, strict=True):
                    for function in functions:
                        function.__code__ = new
                return pass_all(session, tests)

        else:
            tests = self._selected(
                session, lambda called: any(one.startswith(f"{module}:") for one in called), everywhere=True
            )

            def action() -> bool:
                for name in [name for name in sys.modules if name.split(".")[0] in ("ris_hpo", "tests")]:
                    del sys.modules[name]
                sys.dont_write_bytecode = True
                module.write_text(mutant)
                return pytest.main([*OPTIONS, "-x", *dict.fromkeys(test.nodeid for test in tests)]) == 0

        limit_s = 60 + 5 * sum(self.calls[test.nodeid]["seconds"] for test in tests)
        try:
            passed, output = forked(action, limit_s) if tests else (True, "no test of the room calls it")
        finally:
            module.write_text(source)
        changed = [
            f"{sign} {line.strip()}"
            for sign, lines, others in (("-", source, mutant), ("+", mutant, source))
            for line in lines.splitlines()
            if line not in others.splitlines()
        ]
        return WorkResult(
            output=output[-3000:],
            diff="\n".join(changed),
            test_outcome=TestOutcome.SURVIVED if passed else TestOutcome.KILLED,
            worker_outcome=WorkerOutcome.NORMAL,
        )

    def _selected(
        self, session: pytest.Session, calls_it: Callable[[set[str]], bool], everywhere: bool
    ) -> list[pytest.Item]:
        """The tests that call it, short files first; with ``everywhere`` whole files, or the room where none does."""
        callers = [test for test, of in self.calls.items() if calls_it(set(of["calls"]))]
        if everywhere:
            files = {test.split("::")[0] for test in callers} | {DEFAULTS.split("::")[0]}
            callers = [test for test in self.calls if test.split("::")[0] in files]
        cost: dict[str, float] = {}
        for test in callers:
            file = test.split("::")[0]
            cost[file] = cost.get(file, 0.0) + self.calls[test]["seconds"]
        first = set(callers)
        ranked = []
        for place, item in enumerate(session.items):
            file = item.nodeid.split("::")[0]
            if item.nodeid in first or (everywhere and not first and item.nodeid in self.calls):
                ranked.append((cost.get(file, 0.0), place, item))
        return [item for *_, item in sorted(ranked, key=lambda row: row[:2])]


def tree() -> Path:
    """A copy of every tracked file, for faults to be planted in; what Python compiled for an earlier run stays."""
    copy = WORK / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {copy / name: ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()}
    for path in copy.rglob("*.py"):
        if path not in tracked:
            path.unlink()
    for target, source in tracked.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    return copy


def run(room: str, faults: int, seed: int, again: bool) -> bool:
    """Plant the sample of one room, in this process; what earlier runs decided holds while the module is the same."""
    os.chdir(tree())
    os.environ |= {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    sys.path[:] = [str(Path.cwd()), *(path for path in sys.path if path not in ("", str(ROOT)))]
    planter = Planter(room, faults, seed, again)
    pytest.main([*OPTIONS, *ROOMS[room]], [planter])
    return planter.finished


def record(room: str, mutants: dict[str, int], survivors: list[str]) -> None:
    """Write the figures and survivors of one room beside those of the others; reasons written there stay."""
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    reasons = {
        one["fault"]: one["equivalent"] for one in known.get(room, {}).get("survivors", []) if "equivalent" in one
    }
    listed = [
        {"fault": fault} | ({"equivalent": reasons[fault]} if fault in reasons else {}) for fault in sorted(survivors)
    ]
    known[room] = {"mutants": mutants, "survivors": listed}
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def table() -> None:
    """Print the score of each module, then what survived."""
    known: dict[str, Any] = json.loads(RESULTS.read_text())
    for room, found in known.items():
        total, left = sum(found["mutants"].values()), found["survivors"]
        counted = [one for one in left if "equivalent" not in one]
        real = total - (len(left) - len(counted))
        noticed = real - len(counted)
        print(f"{room}: {noticed} of {real} noticed ({noticed / real:.0%}), {total - real} equivalent")
        for one in left:
            print(f"    {one['fault']}" + (f"    equivalent: {one['equivalent']}" if "equivalent" in one else ""))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("rooms", nargs="*", help=f"of {', '.join(ROOMS)}; all of them by default")
    parser.add_argument("--faults", type=int, default=50, help="in each room, spread over its modules by their length")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="try the survivors of earlier runs once more")
    arguments = parser.parse_args()
    if arguments.what == "table":
        table()
    for room in (arguments.rooms or ROOMS) if arguments.what == "run" else ():
        chosen = (arguments.faults, arguments.seed, arguments.again)
        # a process of its own for each room: what one has imported and collected is of no use to the next
        child = os.fork()
        if child == 0:
            os._exit(not run(room, *chosen))
        if os.waitpid(child, 0)[1]:
            raise SystemExit(1)
