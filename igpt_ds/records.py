"""JSON becomes frozen dataclasses, with one schema check. In: what a file says. Out: a record, or one clear error.

A record's fields and their types are its schema. Readers of files call `from_json`, writers `to_json`. Types may be int, float,
str, bool, other records, unions, tuples, lists and dicts with text keys.
"""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

R = TypeVar("R")
_JSON_TYPES: dict[Any, type] = {tuple: list, Mapping: dict}
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", type(None): "null"}


class UnknownFieldError(ValueError):
    """A field that this code does not know. Newer code may have written it, so the file may be undamaged."""


class OtherVersionError(ValueError):
    """A file of another format, or of a version that this code does not read. It may be undamaged."""


def without_header(values: object, name: str, version: int, where: str, fix: str) -> dict[str, object]:
    """The fields of a file beside "format" and "version", which are checked here. The arguments are those of `from_json`.

    Raises:
        OtherVersionError: another format or version.
        ValueError: no object, or a field is missing.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds {reprlib.repr(values)} instead of an object; {fix}")
    for field in ("format", "version"):
        if field not in values:
            raise ValueError(f"{where} has no {field}; {fix}")
    if (values["format"], values["version"]) != (name, version):
        raise OtherVersionError(f"{where} is not version {version} of {name}; read it with the code that wrote it")
    return {field: value for field, value in values.items() if field not in ("format", "version")}


def from_json(kind: type[R], values: object, where: str, fix: str) -> R:
    """The record of a JSON object.

    A whole number is accepted for a float. A field without a default must be there, unless it may be None.

    Args:
        where: the file and what it is, for the error.
        fix: what the user can do, for the error.

    Raises:
        UnknownFieldError: a field that `kind` does not have.
        ValueError: a field is missing or has another type, or the record refuses a value. The field and the value are named.
    """
    try:
        found: R = _record(kind, values, "")
    except UnknownFieldError as error:
        raise UnknownFieldError(f"{where} {error}; read it with the code that wrote it") from None
    except ValueError as error:
        raise ValueError(f"{where} {error}; {fix}") from None
    return found


def to_json(record: Any) -> dict[str, Any]:
    """The JSON object of a record. Fields that are None are left out."""
    return dataclasses.asdict(record, dict_factory=lambda pairs: {name: value for name, value in pairs if value is not None})


def _record(kind: Any, values: object, name: str) -> Any:
    if not isinstance(values, dict):
        raise _wrong(values, name, "an object")
    prefix = f"{name}." if name else ""
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    found = {}
    for field in fields:
        if field.name in values:
            found[field.name] = _value(hints[field.name], values[field.name], prefix + field.name)
        elif type(None) in typing.get_args(hints[field.name]):
            found[field.name] = None if field.default is dataclasses.MISSING else field.default
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"has no {prefix}{field.name}")
    if unknown := [key for key in values if key not in hints]:
        raise UnknownFieldError(f"has an unknown field {prefix}{unknown[0]}={reprlib.repr(values[unknown[0]])}")
    try:
        return kind(**found)
    except ValueError as error:
        raise ValueError(f"has {prefix}{error}") from None


def _value(kind: Any, value: object, name: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        fitting = [one for one in inner if _outer_fits(one, value)]
        if not fitting:
            raise _wrong(value, name, " or ".join(map(_words, inner)))
        return _value(fitting[0], value, name)
    if not _outer_fits(kind, value):
        raise _wrong(value, name, _words(kind))
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, name)
    if kind is float:
        try:
            return float(typing.cast(float, value))
        except OverflowError:
            raise _wrong(value, name, "a number that fits 64 bits") from None
    if origin in (dict, Mapping):
        return {key: _value(inner[1], one, f"{name}.{key}") for key, one in typing.cast(dict[str, object], value).items()}
    if origin in (list, tuple):
        values = typing.cast(list[object], value)
        kinds = inner if origin is tuple and inner[-1] is not Ellipsis else [inner[0]] * len(values)
        if len(kinds) != len(values):
            raise _wrong(value, name, f"a list of {len(kinds)}")
        return origin(
            _value(one, each, f"{name}[{number}]") for number, (one, each) in enumerate(zip(kinds, values, strict=True))
        )
    return value


def _outer_fits(kind: Any, value: object) -> bool:
    """Whether a value has the JSON type of `kind`; what is inside is not looked at. True is no number."""
    kind = typing.get_origin(kind) or kind
    if kind is float:
        return type(value) in (int, float)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return type(value) is _JSON_TYPES.get(kind, kind)


def _words(kind: Any) -> str:
    kind = typing.get_origin(kind) or kind
    return _WORDS.get(_JSON_TYPES.get(kind, kind), "an object")


def _wrong(value: object, name: str, expected: str) -> ValueError:
    return ValueError(
        f"has {name}={reprlib.repr(value)} instead of {expected}"
        if name
        else f"holds {reprlib.repr(value)} instead of {expected}"
    )
