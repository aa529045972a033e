"""Decayed branches of the schedule ``wsd`` (warm-up, stable, decay): a score at any length without a planned end.

The trunk trains at the highest learning rate. Toward each rung a branch leaves it: over the last ``decay_share`` of the
scenes up to the rung the rate falls, and the branch is scored there. Then the trunk goes on from where the branch left,
undecayed, with the same scenes. So a run that ends at a rung is a planned one of this length, digit for digit, and one
that goes on trains the scenes of each branch once more. (Hu et al., "MiniCPM", 2024; Haegele et al., "Scaling laws and
compute-optimal training beyond fixed training durations", 2024.)
"""

from __future__ import annotations

from torch import Tensor

from ris_hpo.training.config import RunConfig
from ris_hpo.training.learner import Learner

_TRUNK = "trunk."


class Branches:
    """Where branches begin and end, and the trunk's state while one is trained; none under another schedule.

    Args:
        config: of the run.

    Attributes:
        start: scenes seen where the present branch left the trunk; None on the trunk.
    """

    def __init__(self, config: RunConfig) -> None:
        self._share = config.optimizer.decay_share
        self.ends = config.branch_ends()
        self.start: int | None = None
        self._trunk: dict[str, Tensor] = {}

    def next_stop(self, scenes_seen: int, validated: int, validation: int, learner: Learner) -> int:
        """Begin a branch where one begins, and return where the next step must end at the latest.

        Args:
            scenes_seen: so far.
            validated: scenes at the last validation; a branch that ended there is not begun again.
            validation: scenes at the next one.
            learner: what is trained; its state is the trunk's from here on, where a branch begins.
        """
        starts = [self._start(end) for end in self.ends if end > validated]
        if self.start is None and scenes_seen in starts:
            self.start = scenes_seen
            self._trunk = {name: tensor.detach().clone() for name, tensor in learner.state().items()}
        if self.start is not None:
            return validation
        return min([validation, *(start for start in starts if start > scenes_seen)])

    def fall(self, scenes_seen: int) -> float:
        """Return the share of the branch that is left when so many scenes are seen; 1 on the trunk."""
        if self.start is None:
            return 1.0
        end = self._end(self.start)
        return (end - scenes_seen) / (end - self.start)

    def rejoin(self, scenes_seen: int, learner: Learner) -> int:
        """Take the trunk up again where a branch ends; return the scenes seen from there on."""
        if self.start is None or scenes_seen != self._end(self.start):
            return scenes_seen
        learner.restore(self._trunk)
        at, self.start, self._trunk = self.start, None, {}
        return at

    def state(self) -> dict[str, Tensor]:
        """The trunk's state, for the checkpoint; empty on the trunk."""
        return {_TRUNK + name: tensor for name, tensor in self._trunk.items()}

    def restore(self, tensors: dict[str, Tensor], start: int | None) -> None:
        """Take up a :meth:`state`."""
        self.start = start
        own = (name for name in tensors if name.startswith(_TRUNK))
        self._trunk = {name.removeprefix(_TRUNK): tensors[name] for name in own}

    def _start(self, end: int) -> int:
        return end - max(1, round(self._share * end))

    def _end(self, start: int) -> int:
        return next(end for end in self.ends if self._start(end) == start)
