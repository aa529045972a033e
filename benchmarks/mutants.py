"""How many small faults in the code do its tests notice?

    python -m benchmarks.mutants run [ROOM ...]     # plants faults one at a time; goes on where it stopped
    python -m benchmarks.mutants table              # the score of each module and the faults that survived

cosmic-ray knows the faults (another operator, a number one higher, a condition negated, a decorator dropped ...) and
plants them in a copy of the tree. Its full list is days of work, since every operator has a dozen replacements, so a
share of the places of each module is drawn with a seed, and one fault for each place. The tests of the room run until
the first that fails.

``mutants.json`` beside this file keeps the result. A survivor that no test can notice gets its reason there by hand,
under ``equivalent``; it then leaves the score, and later runs keep the reason.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkItem

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutants"
RESULTS = Path(__file__).parent / "mutants.json"
ROOMS = {
    "training": "tests/training",
    "learning": "tests/learning tests/training/test_step.py",
    "scoring": "tests/scoring",
    "trials": "tests/service/test_trials.py",
    "search": "tests/service/test_space.py tests/service/test_samplers.py tests/service/test_studies.py",
}


def tree(room: str) -> Path:
    """A fresh copy of every tracked file, for faults to be planted in."""
    copy = WORK / room
    shutil.rmtree(copy, ignore_errors=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


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


def sampled(items: Iterable[WorkItem], share: float, seed: int) -> list[WorkItem]:
    """A share of the places of each module, five at least, and one fault for each; the same for one seed and source."""
    places: dict[str, dict[tuple[int, int], list[WorkItem]]] = {}
    skipped: dict[str, set[tuple[int, int]]] = {}
    for item in items:
        spec: MutationSpec = item.mutations[0]
        module = str(spec.module_path)
        if module not in skipped:
            skipped[module] = without_effect(Path(module).read_text())
        if spec.start_pos not in skipped[module]:
            places.setdefault(module, {}).setdefault(spec.start_pos, []).append(item)
    chosen: list[WorkItem] = []
    for module, here in sorted(places.items()):
        draw = random.Random(f"{seed} {module}")
        for place in draw.sample(sorted(here), min(max(5, round(share * len(here))), len(here))):
            chosen.append(draw.choice(sorted(here[place], key=lambda item: item.mutations[0].operator_name)))
    return chosen


def run(room: str, share: float, seed: int) -> None:
    """Plant the sample of one room; what an interrupted run decided is kept as long as the sources stay the same."""
    os.chdir(tree(room))
    modules = sorted(Path("ris_hpo", room).rglob("*.py"))
    content = b"".join(module.read_bytes() for module in modules)
    session = WORK / f"{room}-{hashlib.sha256(content).hexdigest()[:12]}.sqlite"
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {ROOMS[room]}"
    os.environ |= {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    outcome, output = run_tests(command, 3600)
    if outcome is not TestOutcome.SURVIVED:
        raise SystemExit(f"{room}: the tests fail without a fault\n{output[-2000:]}")
    limit_s = 60 + 3 * (time.monotonic() - began)
    with use_db(str(session)) as work:
        if work.num_work_items == 0:
            init(modules, work, {})
        chosen = sampled(work.work_items, share, seed)
        decided = {job for job, _ in work.results}
        for number, item in enumerate(chosen, 1):
            if item.job_id not in decided:
                result = mutate_and_test(item.mutations, command, limit_s)
                work.set_result(item.job_id, result)
                spec = item.mutations[0]
                print(f"{number}/{len(chosen)} {result.test_outcome.value:8} {spec.module_path}:{spec.start_pos[0]}")
        record(room, work, {item.job_id for item in chosen})


def record(room: str, work: WorkDB, chosen: set[str]) -> None:
    """Write the figures and survivors of one room beside those of the others."""
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    reasons = {
        one["fault"]: one["equivalent"] for one in known.get(room, {}).get("survivors", []) if "equivalent" in one
    }
    mutants: dict[str, int] = {}
    survivors = []
    for item, result in work.completed_work_items:
        if item.job_id not in chosen:
            continue
        module = str(item.mutations[0].module_path)
        mutants[module] = mutants.get(module, 0) + 1
        if result.test_outcome is TestOutcome.SURVIVED:
            changed = [line for line in result.diff.splitlines() if line[:1] in "-+" and line[:3] not in ("---", "+++")]
            fault = f"{module}: " + "  ->  ".join(line[1:].strip() for line in changed)
            survivors.append({"fault": fault} | ({"equivalent": reasons[fault]} if fault in reasons else {}))
    known[room] = {"mutants": mutants, "survivors": sorted(survivors, key=lambda one: one["fault"])}
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
    parser.add_argument("--share", type=float, default=0.15, help="of the places in each module")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.what == "table":
        table()
    for room in (arguments.rooms or ROOMS) if arguments.what == "run" else ():
        run(room, arguments.share, arguments.seed)
