"""The check of a JSON file's fields: a record, or one error that names the file, the field, its value and the fix.

In: what `json.load` returns, and a dataclass that describes it. Out: the dataclass. The one reader of each format calls it, and
its one writer calls `to_json`.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

from igpt_ds.errors import InputError

T = TypeVar("T")
_WORDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_JSON_TYPES: dict[Any, type] = {tuple: list, Mapping: dict}
_hints = lru_cache(maxsize=None)(typing.get_type_hints)


class UnknownFieldError(InputError):
    """A field that this code does not know. Newer code may have written it, so the file may be undamaged."""


class OtherVersionError(InputError):
    """A file of another format, or of a version that this code does not read. It may be undamaged."""


def check_file_name(name: str, field: str = "name") -> None:
    """A file's name that stands in another file is data: plain letters, digits, ".", "_" and "-", so no path and no command.

    Raises:
        ValueError: anything else; the text continues the sentence of `record_from`.
    """
    if not _FILE_NAME.fullmatch(name):
        raise InputError(f"{field} {short(name)}, which is not a plain file name")


def record_from(kind: type[T], values: object, where: str, fix: str, strict: bool = False) -> T:
    """A dataclass made of a JSON object; a field with a default may be missing.

    Fields are str, int, float, bool, object (anything), None, dataclasses, unions, and tuples, lists and dicts of these. Any
    other class, such as a tensor in a torch file, must be the class of the value. A float may be a whole number in the file.

    Args:
        where: what the file is and where it lies, for the error.
        fix: what the user can do about it.
        strict: whether unknown fields are errors; otherwise they are ignored.

    Raises:
        UnknownFieldError: a field is unknown.
        ValueError: a field is missing or has another type, or the dataclass refuses its values.
    """
    try:
        return typing.cast(T, _value(kind, values, "", strict))
    except _WrongFieldError as error:
        raise InputError(f"{where} {error}; {fix}") from None
    except UnknownFieldError as error:
        raise UnknownFieldError(f"{where} {error}; read it with the code that wrote it") from None


def to_json(record: Any) -> dict[str, Any]:
    """The JSON object of a dataclass. Fields that are None are left out."""
    return dataclasses.asdict(record, dict_factory=lambda pairs: {name: value for name, value in pairs if value is not None})


class _WrongFieldError(Exception):
    pass


def _value(kind: Any, value: Any, place: str, strict: bool) -> Any:
    """`value` as `kind`; `place` is the field's name from the top of the file."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        fitting = [one for one in arguments if _fits(one, value)]
        if not fitting:
            raise _wrong(value, place, " or ".join(map(_words, arguments)))
        return _value(fitting[0], value, place, strict)
    if not _fits(kind, value):
        raise _wrong(value, place, _words(kind))
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, place, strict)
    if type(value) in (int, float) and kind is not object:
        return _number(kind, value, place)
    if origin in (list, tuple):
        kinds = arguments if origin is tuple and arguments[-1] is not Ellipsis else arguments[:1] * len(value)
        if len(kinds) != len(value):
            raise _wrong(value, place, f"a list of {len(kinds)}")
        return origin(
            _value(one, each, f"{place}[{number}]", strict) for number, (one, each) in enumerate(zip(kinds, value, strict=True))
        )
    if origin in (dict, Mapping):
        return {key: _value(arguments[1], one, f"{place}.{key}", strict) for key, one in value.items()}
    return value


def _number(kind: type, value: float, place: str) -> float:
    try:
        if kind is float or -(1 << 63) <= value < 1 << 64:  # a seed may be unsigned
            return kind(value)
    except OverflowError:
        pass
    raise _wrong(value, place, f"{_WORDS[kind]} of 64 bits")


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value has the JSON type of `kind`, whatever it contains. True is not a number."""
    if kind is object:
        return True
    expected = _outer(kind)
    return type(value) is expected or (expected is float and type(value) is int)


def _outer(kind: Any) -> type:
    if dataclasses.is_dataclass(kind):
        return dict
    kind = typing.get_origin(kind) or kind
    return _JSON_TYPES.get(kind, kind)


def _words(kind: Any) -> str:
    expected = _outer(kind)
    return _WORDS.get(expected, expected.__name__)


def _record(kind: Any, value: Any, place: str, strict: bool) -> Any:
    hints, found = _hints(kind), {}
    prefix = f"{place}." if place else ""
    for field in dataclasses.fields(kind):
        if field.name in value:
            found[field.name] = _value(hints[field.name], value[field.name], prefix + field.name, strict)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _WrongFieldError(f"has no {prefix + field.name!r}")
    if strict and (unknown := [key for key in value if key not in hints]):
        raise UnknownFieldError(f"has an unknown field {prefix}{unknown[0]} {short(value[unknown[0]])}")
    try:
        return kind(**found)
    except ValueError as error:
        raise _WrongFieldError(f"has {prefix}{error}") from None


def _wrong(value: object, place: str, words: str) -> _WrongFieldError:
    return _WrongFieldError(f"has {place or 'content'} {short(value)}, which is not {words}")


def short(value: object) -> str:
    """A value of a file in an error's text."""
    try:
        text = repr(value)
    except RecursionError:  # deeper than json_files.parse_json reads
        text = f"a deep {type(value).__name__}"
    except ValueError:  # a whole number with more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."
