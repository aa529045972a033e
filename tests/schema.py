"""The defaults of this version's settings, as ``ris_hpo/schemas/N.json`` keeps them.

``python -m tests.schema`` adds to that file the keys that are new. A default that changed, or a key that went, needs a
new schema version first: see "Changing a setting" in CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ris_hpo
from ris_hpo.config import SCHEMA, Spec, defaults_of
from ris_hpo.programs.inference import RunConfig as InferenceRun
from ris_hpo.search.spec import StudySpec
from ris_hpo.training.config import RunConfig

FILE = Path(ris_hpo.__file__).parent / "schemas" / f"{SCHEMA}.json"
KINDS: tuple[type[Spec], ...] = (RunConfig, InferenceRun, StudySpec)


def current() -> dict[str, Any]:
    """The defaults in the code."""
    found = {str(kind.settings): defaults_of(kind) for kind in KINDS}
    del found["study"]["base_schema"]  # the version itself
    return found


def changes(kept: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key whose default is not the kept one any more, in words."""
    for name, value in kept.items():
        path = f"{prefix}{name}"
        if name not in now:
            yield f"{path} went"
        elif isinstance(value, Mapping) and isinstance(now[name], Mapping):
            yield from changes(value, now[name], f"{path}.")
        elif value != now[name]:
            yield f"{path} was {value!r} and is {now[name]!r}"


def main() -> int:
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    if found := list(changes(kept, current())):
        sys.stderr.write(f"{FILE.name} is version {SCHEMA}; raise it first: {'; '.join(found)}\n")
        return 1
    FILE.write_text(json.dumps(current(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
