"""A run configuration as it is written: whatever a file leaves out stays as its owner has it."""

from ris_hpo.training.config import RunConfig


def test_a_table_with_one_key_leaves_its_neighbours_alone() -> None:
    """`inference.likelihood` has defaults of its own, which a plain LikelihoodSpec has not."""
    written = RunConfig.parse({"inference": {"likelihood": {"search": {"greedy_steps": 7}}}})
    assert written == RunConfig().replaced({"inference.likelihood.search.greedy_steps": 7})
    assert written.inference.likelihood.batch == RunConfig().inference.likelihood.batch


def test_what_is_written_in_full_comes_back() -> None:
    changed = RunConfig().replaced({"inference.likelihood.double": True, "inference.likelihood.batch": 16})
    assert RunConfig.parse(changed.model_dump(mode="json")) == changed
