"""The contract of a training program, and where the ones that come with the package are found."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ris_hpo.config import Spec


@dataclass(frozen=True)
class Program:
    """A training program: how it is configured, and what runs it."""

    trainer: Callable[..., Any]
    config: type[Spec]


_PROGRAMS = {"training": "ris_hpo.training.trainer", "inference": "ris_hpo.programs.inference"}


def load_program(kind_or_module: str) -> Program:
    """Return the program of a study kind, or of a module that has ``Trainer`` and ``RunConfig``.

    It is imported only here, so that a process that never trains never pays for torch.
    """
    module = importlib.import_module(_PROGRAMS.get(kind_or_module, kind_or_module))
    return Program(trainer=module.Trainer, config=module.RunConfig)
