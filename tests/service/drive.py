"""A supervisor in a process of its own, for tests that send it signals: ``python drive.py OPTIONS_AS_JSON``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ris_hpo.search.files import parse_study
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget
from ris_hpo.store.open import open_store
from ris_hpo.workers.devices import plan_slots
from ris_hpo.workers.local import LocalProcesses
from ris_hpo.workers.supervisor import Supervisor
from ris_hpo.workers.worker import job_for


def main(options: dict[str, Any]) -> None:
    spec = parse_study(options["tree"], name=options["name"], source="test")
    store = open_store(options["url"])
    study = create_or_resume_study(store, spec, score_version=1)
    fill_budget(store, study, options["n_trials"])
    folder = Path(options["folder"])
    job = job_for(store, study, directory=folder / "trials", artifacts=folder / "artifacts")
    processes = LocalProcesses(plan_slots(options["workers"], [], threads=1), folder / "trials")
    supervisor = Supervisor(store, study, processes, job)
    for snapshot in supervisor.run(interval=0.2):
        sys.stdout.write(
            json.dumps({"tally": snapshot.tally.as_dict(), "pids": [w.pid for w in snapshot.workers]}) + "\n"
        )
        sys.stdout.flush()
    sys.stdout.write(json.dumps({"ending": supervisor.ending}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
