"""Settings as trees of frozen dataclasses: read from TOML strictly, changed by ``key=value``, written with comments."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cascade_engine.errors import InvalidInput

T = TypeVar("T")


def option(default: T, text: str) -> T:
    """A dataclass field with a default and the comment that a written file carries."""
    made: T = dataclasses.field(default=default, metadata={"text": text})
    return made


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables.

    Raises:
        InvalidInput: no such file, or not TOML; the message names the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidInput(f"config: no such file: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"config: {path}: {error}") from None


def build(kind: type[T], values: Mapping[str, Any], place: str = "") -> T:
    """`values` as an instance of the dataclass `kind`, nested tables included.

    Raises:
        InvalidInput: an unknown key or a value of the wrong type; the message gives its place, such as ``phase.2.lr``.
    """
    hints = typing.get_type_hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise InvalidInput(f"{_join(place, key)}: no such key; there are {', '.join(fields)}")
    made = {key: _convert(hints[key], value, _join(place, key)) for key, value in values.items()}
    try:
        return kind(**made)
    except InvalidInput as error:
        raise InvalidInput(f"{place}: {error}" if place else str(error)) from None


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(place, "a table", value)
        return build(typing.cast("type[Any]", hint), value, place)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool):
            raise _wrong(place, "one of " + ", ".join(map(str, arguments)), value)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(place, "a list", value)
        return tuple(_convert(arguments[0], each, _join(place, str(n))) for n, each in enumerate(value, start=1))
    if origin in (types.UnionType, typing.Union):
        for choice in arguments:
            try:
                return _convert(choice, value, place)
            except InvalidInput:
                continue
        raise _wrong(place, " or ".join(map(_name, arguments)), value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong(place, _name(hint), value)
    return value


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))


def _wrong(place: str, expected: str, value: object) -> InvalidInput:
    return InvalidInput(f"{place}: expected {expected}, got {value!r}")


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`values` with each ``a.b=value`` set; a row of a list is named by its number from 1, or by its ``name``.

    The value is read as TOML, or as a plain string where it is none.

    Raises:
        InvalidInput: no ``=``, or a row that does not exist.
    """
    tree: dict[str, Any] = json.loads(json.dumps(values))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise InvalidInput(f"set: expected key=value, got {assignment!r}")
        keys = path.strip().split(".")
        node: Any = tree
        for key in keys[:-1]:
            node = _row(node, key, path) if isinstance(node, list) else node.setdefault(key, {})
            if not isinstance(node, dict | list):
                raise InvalidInput(f"{path}: no such key: {key!r} of it holds a value, not a table")
        if isinstance(node, list):
            raise InvalidInput(f"{path}: expected a key of one row, got the row itself")
        node[keys[-1]] = _value(text.strip())
    return tree


def _row(rows: list[Any], key: str, path: str) -> Any:
    if key.isdecimal() and 1 <= int(key) <= len(rows):
        return rows[int(key) - 1]
    for row in rows:
        if isinstance(row, dict) and row.get("name") == key:
            return row
    names = [str(row["name"]) for row in rows if isinstance(row, dict) and "name" in row]
    raise InvalidInput(f"{path}: no row {key!r}; there are 1 to {len(rows)}{': ' + ', '.join(names) if names else ''}")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(settings: Any) -> str:
    """The settings as TOML, each key with its comment; `build` of what that reads back is equal to them."""
    return "\n".join(_table(settings, "")).strip() + "\n"


def to_values(settings: Any) -> dict[str, Any]:
    """The settings as plain tables, lists and values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return values


def _table(settings: Any, place: str, *, commented: bool = True) -> list[str]:
    plain, tables = [], []
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        where = _join(place, each.name)
        if dataclasses.is_dataclass(value):
            tables += ["", f"# {_first_line(value)}", f"[{where}]", *_table(value, where)]
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            tables += ["", f"# {_first_line(value[0])}"]
            for number, row in enumerate(value):  # the comments of the first row serve them all
                tables += [f"[[{where}]]", *_table(row, where, commented=number == 0), ""]
        else:
            text = each.metadata.get("text")
            plain.append(f"{each.name} = {_literal(value)}" + (f"  # {text}" if text and commented else ""))
    return [*plain, *tables]


def _first_line(settings: Any) -> str:
    return str(type(settings).__doc__).partition("\n")[0]


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
