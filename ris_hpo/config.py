"""Frozen specifications: one base class, TOML in, dotted replacement that validates again, fingerprints.

Every module owns its ``Spec``; nothing reads a global. An unknown key is an error that says what was probably meant.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import tomlkit
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ris_hpo.errors import ConfigError

_brief = reprlib.Repr()  # what was found may be a whole table
_brief.maxstring = _brief.maxother = _brief.maxlong = 120


class Spec(BaseModel):
    """Immutable, validated settings; unknown keys are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _beside_defaults(cls, tree: Any) -> Any:
        """A table with some keys of a nested specification leaves its others as the owner of the field has them."""
        if not isinstance(tree, Mapping):
            return tree
        fields = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, Spec)}
        return {
            name: _filled(fields[name], value) if name in fields and isinstance(value, Mapping) else value
            for name, value in tree.items()
        }

    def replaced(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with dotted paths set, validated as a whole.

        Args:
            changes: for example ``{"network.width": 64, "loss.count": 0.2}``.

        Raises:
            ConfigError: a path that does not exist (with a suggestion) or a value out of bounds.
        """
        tree = self.model_dump(mode="json")
        for path, value in changes.items():
            node = tree
            *parents, leaf = path.split(".")
            for part in [*parents, leaf]:
                if not isinstance(node, dict) or part not in node:
                    raise ConfigError(f"unknown key '{path}'{suggestion(path, list(dotted_keys(self)))}")
                if part is not leaf:
                    node = node[part]
            node[leaf] = value
        return type(self).parse(tree)

    @classmethod
    def parse(cls, tree: Mapping[str, Any], source: str = "configuration") -> Self:
        """Validate a mapping (JSON or TOML types) into this specification.

        Raises:
            ConfigError: one line that names the key, what was found and what was expected.
        """
        try:
            return cls.model_validate(tree, strict=False)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_first_problem(cls, error)}") from None

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change exactly when a setting does."""
        return fingerprint(self.model_dump(mode="json"))


def _filled(default: Spec, given: Mapping[str, Any]) -> dict[str, Any]:
    tree = default.model_dump(mode="json")
    for name, value in given.items():
        inner = getattr(default, name, None) if name in tree else None
        tree[name] = _filled(inner, value) if isinstance(inner, Spec) and isinstance(value, Mapping) else value
    return tree


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of ``value`` as canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def dotted_keys(spec: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield every dotted path of a specification, leaves and branches."""
    for name in type(spec).model_fields:
        yield prefix + name
        value = getattr(spec, name)
        if isinstance(value, BaseModel):
            yield from dotted_keys(value, f"{prefix}{name}.")


def suggestion(word: str, known: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, or the choices when few, or nothing."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not nearest:  # the leaf alone may be right where the path is not
        leaf = word.rsplit(".", 1)[-1]
        nearest = [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    if nearest:
        return f"; did you mean '{nearest[0]}'?"
    return f"; known: {', '.join(sorted(known))}" if len(known) <= 12 else ""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: missing, unreadable or malformed, with the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:  # besides malformed TOML: numbers and nesting beyond all bounds
        raise ConfigError(f"{path}: not valid TOML ({error})") from None


def to_toml(tree: Mapping[str, Any]) -> str:
    """Write a mapping as TOML; ``None`` is left out, since TOML has no null."""

    def without_none(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: without_none(item) for key, item in value.items() if item is not None}
        return [without_none(item) for item in value] if isinstance(value, list) else value

    return tomlkit.dumps(without_none(tree))


def _first_problem(cls: type[BaseModel], error: ValidationError) -> str:
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        owner: Any = cls
        for part in problem["loc"][:-1]:
            annotation = owner.model_fields[str(part)].annotation if hasattr(owner, "model_fields") else None
            owner = annotation if isinstance(annotation, type) else None
        known = list(owner.model_fields) if hasattr(owner, "model_fields") else []
        return f"unknown key '{path}'{suggestion(str(problem['loc'][-1]), known)}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(problem["input"], Mapping):  # a rule over several keys: its message names them
        return f"{path}: {message}" if path else message
    return f"{path or 'value'}: {message} (found {_brief.repr(problem['input'])})"
