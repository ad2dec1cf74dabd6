"""The filter language: one Python-like condition over a phase's columns, read into a syntax tree and never executed.

    split == 'train' and label in ('run', 'walk') and end - start > 1.0 and not has('flow')

Columns, numbers, texts in quotes, True and False; == != < <= > >= (chains too), in and not in a tuple or list;
and, or, not; + - * / // % of numbers; has('view'): the clips that have a view. Integers are exact to 64 bits.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput
from cascade_engine.store.columns import Categorical

Kind: TypeAlias = Literal["condition", "number", "text"]
Mask = npt.NDArray[np.bool_]
BLOCK = 1 << 20  # rows at a time: what a filter needs on the way stays within some 10 MB
LONGEST = 10_000
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class _Value:
    """What a part of the condition evaluates to on a block of rows: an array, or a single value."""

    kind: Kind
    data: Any


def mask(
    condition: str, rows: int, column: Callable[[str], Any], has: Callable[[str], Mask], names: tuple[str, ...]
) -> Mask:
    """The rows (n,) for which a condition holds.

    Args:
        condition: the text.
        rows: n.
        column: a column's values (n,), numbers, bools or `Categorical`, by name.
        has: the clips (n,) that have a view, by name.
        names: the columns there are.

    Raises:
        InvalidInput: not of the language, or of types that do not fit; the position and what was expected are named.
    """
    tree = _parse(condition)
    columns = {node.id: column(node.id) for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names}
    views = {view: has(view) for call in ast.walk(tree) if (view := _has_argument(call))}
    out = np.empty(rows, np.bool_)
    for start in range(0, max(rows, 1), BLOCK):  # no rows: the condition is checked all the same
        part = slice(start, min(start + BLOCK, rows))
        block = {name: _slice(values, part) for name, values in columns.items()}
        walk = _Walk(condition, block, {view: held[part] for view, held in views.items()})
        try:
            out[part] = walk.condition(tree.body)
        except RecursionError:
            raise _unreadable(condition) from None
    return out


def _parse(condition: str) -> ast.Expression:
    if len(condition) > LONGEST:
        raise InvalidInput(f"where: expected a condition of at most {LONGEST} characters")
    text = condition.replace("\n", " ").replace("\r", " ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape in a text stands for itself
            tree = ast.parse(text.lstrip(), mode="eval")
    except SyntaxError as error:
        offset = error.offset or 0  # below 1 where the text ends too early
        position = min(offset + len(text) - len(text.lstrip()), len(text) + 1) if offset > 0 else len(text) + 1
        raise InvalidInput(f"where: position {position}: {error.msg}, in {condition!r}") from None
    except (ValueError, RecursionError, MemoryError):
        raise _unreadable(condition) from None
    else:
        return tree


def _unreadable(condition: str) -> InvalidInput:
    return InvalidInput(f"where: expected a condition, got what cannot be read: {condition[:80]!r}")


class _Walk:
    """Evaluates a tree on one block of rows."""

    def __init__(self, text: str, columns: Mapping[str, Any], views: Mapping[str, Mask]) -> None:
        self._text, self._columns, self._views = text, columns, views

    def condition(self, node: ast.expr) -> Any:
        """A part that must be a condition."""
        value = self._value(node)
        if value.kind != "condition":
            raise self._error(node, f"expected a condition, got a {value.kind}")
        return value.data

    def _value(self, node: ast.expr) -> _Value:
        match node:
            case ast.Constant(value=bool() as truth):
                return _Value("condition", np.bool_(truth))
            case ast.Constant(value=int() as number):
                return self._integer(node, number)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)) if type(number) is int:
                return self._integer(node, -number)
            case ast.Constant(value=float() as number):
                return _Value("number", np.float64(number))
            case ast.Constant(value=str() as text):
                return _Value("text", text)
            case ast.Name(id=name):
                return self._column(node, name)
            case ast.BoolOp(op=op, values=parts):
                join = np.logical_and if isinstance(op, ast.And) else np.logical_or
                found = self.condition(parts[0])
                for part in parts[1:]:
                    found = join(found, self.condition(part))
                return _Value("condition", found)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _Value("condition", np.logical_not(self.condition(operand)))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._combine(node, ast.Sub(), _Value("number", np.int64(0)), self._number(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._combine(node, op, self._number(left), self._number(right))
            case ast.Compare():
                return self._compare(node)
            case ast.Call() if view := _has_argument(node):
                return _Value("condition", self._views[view])
            case _:
                raise self._error(
                    node, "expected a column, a number, a text, a comparison, and, or, not, in or has('view')"
                )

    def _integer(self, node: ast.expr, number: int) -> _Value:
        if not _LOWEST <= number <= _HIGHEST:
            raise self._error(node, "expected an integer of 64 bits")
        return _Value("number", np.int64(number))

    def _column(self, node: ast.expr, name: str) -> _Value:
        if name not in self._columns:
            raise self._error(node, f"no column is called {name!r}")
        values = self._columns[name]
        if isinstance(values, Categorical):
            return _Value("text", values)
        return _Value("condition" if values.dtype == np.bool_ else "number", values)

    def _number(self, node: ast.expr) -> _Value:
        value = self._value(node)
        if value.kind != "number":
            raise self._error(node, f"expected a number, got a {value.kind}")
        return value

    def _combine(self, node: ast.expr, op: ast.operator, left: _Value, right: _Value) -> _Value:
        a, b = left.data, right.data
        whole = a.dtype.kind == "i" and b.dtype.kind == "i"
        if whole and isinstance(op, ast.Div | ast.FloorDiv | ast.Mod) and np.any(b == 0):
            raise self._error(node, "division by zero")
        with np.errstate(all="ignore"):
            result = _ARITHMETIC[type(op)](a, b)
            if whole and not isinstance(op, ast.Div | ast.Mod) and not _fits(_ARITHMETIC[type(op)], a, b):
                raise self._error(node, "the result does not fit in 64 bits")
        return _Value("number", result)

    def _compare(self, node: ast.Compare) -> _Value:
        found: Any = np.bool_(True)
        left = self._value(node.left)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                one = self._membership(left, right_node)
                one = np.logical_not(one) if isinstance(op, ast.NotIn) else one
                right = left
            elif type(op) in _COMPARE:
                right = self._value(right_node)
                if right.kind != left.kind:
                    raise self._error(right_node, f"expected a {left.kind} to compare with, got a {right.kind}")
                one = _compare(_COMPARE[type(op)], left, right)
            else:
                raise self._error(right_node, "expected == != < <= > >= in or not in before it")
            found = np.logical_and(found, one)
            left = right
        return _Value("condition", found)

    def _membership(self, left: _Value, node: ast.expr) -> Any:
        if not isinstance(node, ast.Tuple | ast.List | ast.Set):
            raise self._error(node, "expected a tuple such as ('run', 'walk')")
        found: Any = np.bool_(False)
        for each in node.elts:
            member = self._value(each)
            if member.kind != left.kind or isinstance(member.data, Categorical) or np.ndim(member.data):
                raise self._error(each, f"expected a {left.kind} written out")
            found = np.logical_or(found, _compare(operator.eq, left, member))
        return found

    def _error(self, node: ast.AST, reason: str) -> InvalidInput:
        start = len(self._text) - len(self._text.lstrip())
        before = self._text[start:].encode()[: getattr(node, "col_offset", 0)].decode()
        position = start + len(before) + 1
        return InvalidInput(f"where: position {position}: {reason}, in {self._text!r}")


def _fits(combine: Callable[[Any, Any], Any], a: Any, b: Any) -> bool:
    """Whether integers combine to integers of 64 bits: roughly in float64, and exactly where that is in doubt."""
    doubtful = np.abs(combine(a.astype(np.float64), b.astype(np.float64))) >= 2.0**62
    if not doubtful.any():
        return True
    left, right = (np.broadcast_to(each, doubtful.shape)[doubtful].tolist() for each in (a, b))
    return all(_LOWEST <= combine(one, other) <= _HIGHEST for one, other in zip(left, right, strict=True))


def _compare(compare: Callable[[Any, Any], Any], left: _Value, right: _Value) -> Any:
    """A comparison of two values of one kind, exact."""
    a, b = left.data, right.data
    if left.kind == "text":
        if isinstance(a, Categorical) and isinstance(b, str):
            return _by_category(a, lambda text: compare(text, b))
        if isinstance(b, Categorical) and isinstance(a, str):
            return _by_category(b, lambda text: compare(a, text))
        if isinstance(a, Categorical) and isinstance(b, Categorical):
            return compare(np.asarray(a), np.asarray(b))
        return np.bool_(compare(a, b))
    if left.kind == "number" and a.dtype != b.dtype:
        return compare(a.astype(np.longdouble), b.astype(np.longdouble))  # holds every int64 and float64 exactly
    return compare(a, b)


def _by_category(column: Categorical, holds: Callable[[str], bool]) -> Any:
    """A condition on a text column, decided once a category."""
    table = np.array([holds(text) for text in column.categories] or [False], np.bool_)
    return table[column.codes]


def _slice(values: Any, part: slice) -> Any:
    return values.take(part) if isinstance(values, Categorical) else values[part]


def _has_argument(node: ast.AST) -> str | None:
    """The view in ``has('view')``, where `node` is that."""
    match node:
        case ast.Call(func=ast.Name(id="has"), args=[ast.Constant(value=str(view))], keywords=[]):
            return view
    return None
