"""The check of a JSON file's fields: a record, or one error that names the file, the field, its value and the fix.

In: what `json.load` returns, and a dataclass that describes it. Out: the dataclass. The one reader of each format calls.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
_hints = lru_cache(maxsize=None)(typing.get_type_hints)


def record_from(kind: type[T], values: object, where: str, fix: str) -> T:
    """A dataclass made of a JSON object. Unknown keys are ignored; a field with a default may be missing.

    Fields are str, int, float, bool, object (anything), dataclasses, lists and dicts of these, or one of these or None.

    Args:
        where: what the file is and where it lies, for the error.
        fix: what the user can do about it.

    Raises:
        ValueError: a field is missing or has another type.
    """
    try:
        return typing.cast(T, _value(kind, values, ""))
    except _WrongFieldError as error:
        raise ValueError(f"{where} {error}; {fix}") from None


class _WrongFieldError(Exception):
    pass


def _value(kind: Any, value: Any, place: str) -> Any:
    """`value` as `kind`; `place` is the field's name from the top of the file."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _value(next(one for one in arguments if one is not type(None)), value, place)
    if kind is object:
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, place)
    expected = origin or kind
    if type(value) is not expected and not (expected is float and type(value) is int):  # bool is an int to Python
        raise _WrongFieldError(f"has {place or 'content'} {_short(value)}, which is not {_WORDS[expected]}")
    if origin is list:
        return [_value(arguments[0], one, f"{place}[{number}]") for number, one in enumerate(value)]
    if origin is dict:
        return {key: _value(arguments[1], one, f"{place}.{key}") for key, one in value.items()}
    return value


def _record(kind: Any, value: Any, place: str) -> Any:
    if type(value) is not dict:
        raise _WrongFieldError(f"has {place or 'content'} {_short(value)}, which is not {_WORDS[dict]}")
    hints, found = _hints(kind), {}
    for field in dataclasses.fields(kind):
        name = f"{place}.{field.name}" if place else field.name
        if field.name in value:
            found[field.name] = _value(hints[field.name], value[field.name], name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _WrongFieldError(f"has no {name!r}")
    return kind(**found)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
