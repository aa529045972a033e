"""Conditions between parameters, as a study file states them: ``"optimizer.batch_size * optimizer.accumulate <= 256"``.

An expression of Python's syntax with dotted keys of the run configuration, numbers, words in quotes, arithmetic,
comparisons, ``in`` a list, ``and``, ``or``, ``not``, ``min``, ``max`` and ``abs``. Nothing else is evaluated: a study
file may come from somebody else.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

from ris_hpo.errors import SpaceError

_BINARY: Final[dict[type[ast.AST], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, others: one in others,
    ast.NotIn: lambda one, others: one not in others,
}
_UNARY: Final[dict[type[ast.AST], Callable[[Any], Any]]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {"min": min, "max": max, "abs": abs}
_LARGEST_POWER: Final = 64  # 9**9**9 would take for ever


class Constraint:
    """One condition.

    Args:
        text: as the study file has it.

    Attributes:
        keys: the dotted keys that it names.

    Raises:
        SpaceError: no such expression, or one that uses anything else.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.keys: set[str] = set()
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise SpaceError(f"constraint '{text}': not an expression ({error})") from None
        self._check(self._tree)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Say whether the condition holds.

        Args:
            values: of the keys that it names.

        Raises:
            SpaceError: values that cannot be combined in this way.
        """
        try:
            return bool(self._value(self._tree, values))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise SpaceError(f"constraint '{self.text}': {error}") from None

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.Constant(value=bool() | int() | float() | str()):
                return
            case ast.Name() | ast.Attribute():
                self.keys.add(_key(node, self.text))
                return
            case ast.BinOp(op=op) if type(op) in _BINARY:
                parts = [node.left, node.right]
            case ast.UnaryOp(op=op) if type(op) in _UNARY:
                parts = [node.operand]
            case ast.BoolOp():
                parts = node.values
            case ast.Compare() if all(type(op) in _BINARY for op in node.ops):
                parts = [node.left, *node.comparators]
            case ast.List() | ast.Tuple():
                parts = node.elts
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS and node.args:
                parts = node.args
            case _:
                raise SpaceError(f"constraint '{self.text}': '{ast.unparse(node)}' is not allowed in a constraint")
        for part in parts:
            self._check(part)

    def _value(self, node: ast.expr, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.BinOp(left=left, op=op, right=right):
                one, other = self._value(left, values), self._value(right, values)
                if isinstance(op, ast.Pow) and abs(other) > _LARGEST_POWER:
                    raise ValueError(f"power {other} is above {_LARGEST_POWER}")
                return _BINARY[type(op)](one, other)
            case ast.UnaryOp(op=op, operand=operand):
                return _UNARY[type(op)](self._value(operand, values))
            case ast.BoolOp(op=op, values=parts):
                chosen = all if isinstance(op, ast.And) else any
                return chosen(self._value(part, values) for part in parts)
            case ast.Compare(left=left, ops=ops, comparators=rest):
                sides = [self._value(part, values) for part in (left, *rest)]
                return all(_BINARY[type(op)](*sides[i : i + 2]) for i, op in enumerate(ops))
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [self._value(part, values) for part in parts]
            case ast.Call(func=ast.Name(id=name), args=parts):
                return _FUNCTIONS[name](*(self._value(part, values) for part in parts))
            case _:
                return values[_key(node, self.text)]


def _key(node: ast.expr, text: str) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=parent, attr=name):
            return f"{_key(parent, text)}.{name}"
    raise SpaceError(f"constraint '{text}': '{ast.unparse(node)}' is no dotted key")
