"""Frozen specifications: one base class, TOML in, dotted replacement that validates again, fingerprints, versions.

Every module owns its ``Spec``; nothing reads a global. An unknown key is an error that says what was probably meant.

Names and defaults of settings have a version, ``SCHEMA``. What is stored says which version it was written in, and is
read through ``ris_hpo.migrations``; ``schemas/N.json`` keeps the defaults of version N. A fingerprint is taken of what
differs from these defaults, so that a new option leaves it as it was.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import json
import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Self, get_args, get_origin

import tomlkit
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from ris_hpo.errors import ConfigError, reading
from ris_hpo.migrations import RENAMED, STEPS, Tree, has, put, take

SCHEMA: Final = len(STEPS)
"""Version of the names and defaults of all settings."""

SCHEMA_KEY: Final = "schema_version"
"""Key of a stored tree that says its version; a tree without it has version 0."""

_ANY: Final[TypeAdapter[Any]] = TypeAdapter(Any)
_brief = reprlib.Repr()  # what was found may be a whole table
_brief.maxstring = _brief.maxother = _brief.maxlong = 120


class Spec(BaseModel):
    """Immutable, validated settings; unknown keys are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )
    settings: ClassVar[str | None] = None
    """What ``schemas/N.json`` and the migrations call these settings; None for what is not stored by itself."""
    follows: ClassVar[frozenset[str]] = frozenset()
    """Dotted keys that have the value of another key unless they are stated; they have no default of their own."""

    @model_validator(mode="before")
    @classmethod
    def _beside_defaults(cls, tree: Any) -> Any:
        """A table with some keys of a nested specification leaves its others as the owner of the field has them."""
        if not isinstance(tree, Mapping):
            return tree
        fields = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, Spec)}
        return {
            name: filled(value, fields[name].model_dump(mode="json"))
            if name in fields and isinstance(value, Mapping)
            else value
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
            follows = path in self.follows or any(key.startswith(f"{path}.") for key in self.follows)
            if not has(tree, path) and not follows:
                raise ConfigError(f"unknown key '{path}'{suggestion(path, list(dotted_keys(self)))}")
            put(tree, path, value)
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

    def stored(self) -> Tree:
        """Return JSON types that ``from_stored`` reads, in this version and in later ones."""
        return {SCHEMA_KEY: SCHEMA, **self.model_dump(mode="json")}

    @classmethod
    def from_stored(cls, tree: Mapping[str, Any], source: str) -> Self:
        """Read what ``stored`` returned, now or in an older version.

        Args:
            tree: JSON or TOML types. Keys that an older version left out have that version's defaults.
            source: where it was read, for messages.

        Raises:
            ConfigError: written by a newer version, or not what ``parse`` takes.
        """
        return cls.parse(migrated(tree, cls.settings, source), source)

    def fingerprint(self) -> str:
        """Version of the schema and sixteen hexadecimal digits, for example ``1-6a0de7f1c2b3a495``.

        They change exactly when a setting does, and stay the same when a setting with a default is added.
        """
        return _fingerprint(self.model_dump(mode="json"), SCHEMA, _current_defaults(type(self)))

    @classmethod
    def is_fingerprint_of(cls, recorded: str, tree: Mapping[str, Any], source: str) -> bool:
        """Say whether a recorded fingerprint is that of a stored tree, under the version that recorded it.

        Args:
            recorded: from ``fingerprint``, in this version or an older one.
            tree: as for ``from_stored``; not newer than the fingerprint.
            source: for messages.

        Raises:
            ConfigError: as ``from_stored``.
        """
        version = schema_of(recorded)
        if version >= SCHEMA or cls.settings is None:
            return cls.from_stored(tree, source).fingerprint() == recorded
        defaults = stored_defaults(version, cls.settings)
        whole = filled(migrated(tree, cls.settings, source, to=version), defaults)
        return _fingerprint(whole, version, defaults) == recorded


class AnySettings(Spec):
    """Settings of a program that does not say which it takes."""

    model_config = ConfigDict(extra="allow")


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of ``value`` as canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def schema_of(recorded: str) -> int:
    """Return the schema version under which a fingerprint was recorded."""
    version, dash, _ = recorded.partition("-")
    return int(version) if dash and version.isdigit() else 0


# -- schema versions -------------------------------------------------------------------------------------------------


def migrated(tree: Mapping[str, Any], settings: str | None, source: str, *, to: int | None = None) -> Tree:
    """Return a stored tree in the names of a schema version, without the key that says its own.

    Args:
        tree: JSON or TOML types; keys that an older version left out get that version's defaults.
        settings: ``Spec.settings`` of what is stored.
        source: where it was read, for messages.
        to: the version wanted; this program's by default.

    Raises:
        ConfigError: written by a newer version of this program, or not the settings of any.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{source}: expected a table of settings (found {type(tree).__name__})")
    version = tree.get(SCHEMA_KEY, 0)
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise ConfigError(f"{source}: {SCHEMA_KEY} must be a whole number from 0 to {SCHEMA} (found {version!r})")
    if version > SCHEMA:
        raise ConfigError(
            f"{source}: written in schema version {version}, this program reads up to {SCHEMA}; use a newer ris-hpo"
        )
    wanted = SCHEMA if to is None else to
    current = {name: value for name, value in tree.items() if name != SCHEMA_KEY}
    if settings is None or version >= wanted:
        return current
    try:
        current = copy.deepcopy(filled(current, stored_defaults(version, settings)))
        for step in STEPS[version:wanted]:
            step(settings, current)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{source}: not settings of schema version {version} ({error!r})") from error
    return current


@functools.cache
def stored_defaults(version: int, settings: str) -> Tree:
    """Return the defaults of some settings in a schema version, in the form of ``defaults_of``; not to be changed."""
    file = Path(__file__).with_name("schemas") / f"{version}.json"
    defaults: dict[str, Tree] = json.loads(file.read_text(encoding="utf-8"))
    return defaults[settings]


def defaults_of(spec: type[Spec]) -> Tree:
    """Return the defaults of a specification as JSON types.

    Where a field holds a list of specifications, or one or none, ``name[]`` beside it has the defaults of each of them.
    """
    fields = spec.model_fields.items()
    return _described(
        spec, {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}
    )


def _described(spec: type[Spec], values: Mapping[str, Any]) -> Tree:
    tree = _every_default(spec, values)
    for path in spec.follows:
        take(tree, path)
    return tree


def _every_default(spec: type[Spec], values: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for name, field in spec.model_fields.items():
        if name in values:
            value = values[name]
            tree[name] = (
                _described(type(value), dict(value))
                if isinstance(value, Spec)
                else _ANY.dump_python(value, mode="json")
            )
        items = () if get_origin(field.annotation) is dict else get_args(field.annotation)
        for item in items:
            if isinstance(item, type) and issubclass(item, Spec):
                tree[f"{name}[]"] = defaults_of(item)
    return tree


@functools.cache
def _current_defaults(spec: type[Spec]) -> Tree:
    own = defaults_of(spec)
    return own if spec.settings is None else _over(stored_defaults(SCHEMA, spec.settings), own)


def _over(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> Tree:
    merged = {**lower, **upper}
    for name in set(upper) & set(lower):
        if isinstance(upper[name], Mapping) and isinstance(lower[name], Mapping):
            merged[name] = _over(upper[name], lower[name])
    return merged


def filled(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> Tree:
    """Return a tree with the defaults of what it leaves out; for their form see ``defaults_of``."""
    whole = {**{name: value for name, value in defaults.items() if not name.endswith("[]")}, **tree}
    for name, value in whole.items():
        if isinstance(value, Mapping):
            inner = defaults.get(name)
            whole[name] = filled(value, inner if isinstance(inner, Mapping) else defaults.get(f"{name}[]", {}))
        elif isinstance(value, list) and f"{name}[]" in defaults:
            item = defaults[f"{name}[]"]
            whole[name] = [filled(each, item) if isinstance(each, Mapping) else each for each in value]
    return whole


def _fingerprint(tree: Mapping[str, Any], version: int, defaults: Mapping[str, Any]) -> str:
    if version == 0:  # the whole tree, with the types that validation gave it
        return fingerprint(_as_validated(tree, defaults))
    return f"{version}-{fingerprint(differing(tree, defaults))}"


def differing(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> Tree:
    """Return what a tree says beyond its defaults, whole numbers as such; for their form see ``defaults_of``."""
    found: Tree = {}
    for name, value in tree.items():
        default, item = defaults.get(name), defaults.get(f"{name}[]", {})
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            if inner := differing(value, default):
                found[name] = inner
        elif name not in defaults or value != default:
            if isinstance(value, Mapping):
                value = differing(value, item)
            elif isinstance(value, list) and item:
                value = [differing(each, item) for each in value]
            found[name] = _whole_numbers(value)
    return found


def _whole_numbers(value: Any) -> Any:
    """2.0 as 2: a number is the same however it was typed."""
    if isinstance(value, Mapping):
        return {name: _whole_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_validated(value: Any, default: Any) -> Any:
    """2 as 2.0 where the default is no whole number: in version 0 the type counted."""
    if isinstance(value, Mapping):
        return {name: _as_validated(each, _default_of(name, default)) for name, each in value.items()}
    if isinstance(value, list):
        kinds = default if isinstance(default, list) and len(default) == len(value) else [default] * len(value)
        return [_as_validated(each, kind) for each, kind in zip(value, kinds, strict=True)]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and (default is None or isinstance(default, float)) else value


def _default_of(name: str, defaults: Any) -> Any:
    if not isinstance(defaults, Mapping):
        return None
    return defaults.get(f"{name}[]", defaults.get(name))


def dotted_keys(spec: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield every dotted path of a specification, leaves and branches."""
    for name in type(spec).model_fields:
        yield prefix + name
        value = getattr(spec, name)
        if isinstance(value, BaseModel):
            yield from dotted_keys(value, f"{prefix}{name}.")


def description(spec: BaseModel, path: str) -> str:
    """Return what a dotted key of a specification means, as its owner describes it; empty where it does not."""
    *parents, leaf = path.split(".")
    for name in parents:
        spec = getattr(spec, name)
    return type(spec).model_fields[leaf].description or ""


def suggestion(word: str, known: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, the choices when few, a new name, or nothing."""
    for old, new in RENAMED.items():
        if f".{old}".endswith(f".{word}"):
            return f"; it is called '{new}' now"
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
        with reading(path, ConfigError):
            return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:  # besides malformed TOML: numbers and nesting beyond all bounds
        raise ConfigError(f"{path}: not valid TOML ({error})") from None


def toml_value(text: str) -> Any:
    """Return the value that ``text`` is in TOML, or the text itself where it is none: a plain word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


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
