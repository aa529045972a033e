"""What the fuzz tests share: how many cases, what damaged bytes and trees look like, and what counts as a good end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ris_hpo.errors import RisHpoError
from tests.properties import examples

T = TypeVar("T")


def fuzz(check: Callable[[Any], None], strategy: st.SearchStrategy[Any]) -> None:
    """Check 50 drawn values, or 1,000 in the long form."""
    settings(examples(50), suppress_health_check=list(HealthCheck))(given(strategy)(check))()


def outcome(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or None where it refused with one line; anything else that it raises is a bug."""
    try:
        return call()
    except RisHpoError as error:
        refusal = str(error)
    assert refusal.strip()
    assert "\n" not in refusal, refusal
    return None


numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-300, 1e300, 1e38, float("nan"), float("inf"), float("-inf")]),
)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=12)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


class Whole(Generic[T]):
    """Something large and undamaged; without it a failing case would print all of it."""

    def __init__(self, value: T) -> None:
        self.value = value


@st.composite
def damaged_bytes(draw: st.DrawFn, content: Whole[bytes]) -> bytes:
    """A file cut short, with bits flipped, bytes overwritten, inserted or gone; or another file altogether."""
    data = bytearray(content.value)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.integers(1, 64))
        match draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "remove", "double", "other"])):
            case "cut":
                del data[place:]
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                data[place : place + size] = draw(st.binary(min_size=size, max_size=size))
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=size))
            case "remove":
                del data[place : place + size]
            case "double":
                data += bytes(data)
            case "other":
                data = bytearray(draw(st.binary(max_size=200)))
    return bytes(data)


@st.composite
def damaged_trees(
    draw: st.DrawFn, tree: Whole[dict[str, Any]], values: st.SearchStrategy[Any] = junk
) -> dict[str, Any]:
    """JSON types with values replaced, keys renamed, added and gone, one to four times, at any depth."""
    changed: dict[str, Any] = copy.deepcopy(tree.value)
    for _ in range(draw(st.integers(1, 4))):
        node: Any = changed
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            match draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"])):
                case "replace":
                    node[key] = draw(values)
                case "remove":
                    del node[key]
                case "rename" if isinstance(node, dict):
                    node[draw(st.one_of(st.just(f"{key}s"), st.text(max_size=8)))] = node.pop(key)
                case "add" if isinstance(node, dict):
                    node[draw(st.one_of(st.sampled_from(keys), st.text(max_size=8)))] = draw(values)
            break
    return changed
