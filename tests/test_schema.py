"""Records from JSON: every type that a field can have, and one error that names the file, the field, the value and the fix."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from igpt_ds.schema import check_file_name, record_from


@dataclass(frozen=True)
class Part:
    count: int


@dataclass(frozen=True)
class Whole:
    name: str
    rate: float
    good: bool
    seed: int | None
    sizes: list[int]
    parts: dict[str, Part]
    part: Part | None
    anything: object
    extra: int = 5


GOOD = {
    "name": "a",
    "rate": 1,
    "good": True,
    "seed": None,
    "sizes": [1, 2],
    "parts": {"train": {"count": 3}},
    "part": None,
    "anything": {"x": [None]},
}


def test_a_whole_record():
    expected = Whole("a", 1, True, None, [1, 2], {"train": Part(3)}, None, {"x": [None]})
    assert record_from(Whole, GOOD | {"unknown": 1}, "thing f.json", "remove it") == expected
    assert record_from(Whole, GOOD | {"part": {"count": 4}}, "thing", "fix").part == Part(4)
    assert record_from(Whole, GOOD | {"extra": 6}, "thing", "fix").extra == 6


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_field(name):
    values = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(ValueError, match=rf"^thing f\.json has no '{name}'; remove it$"):
        record_from(Whole, values, "thing f.json", "remove it")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": 3}, "has name 3"),
        ({"rate": "1"}, "has rate '1'"),
        ({"rate": True}, "has rate True"),
        ({"good": 1}, "has good 1"),
        ({"seed": 1.5}, "has seed 1.5"),
        ({"seed": False}, "has seed False"),
        ({"sizes": 3}, "has sizes 3"),
        ({"sizes": [1, "2"]}, "has sizes[1] '2'"),
        ({"parts": [1]}, "has parts [1]"),
        ({"parts": {"train": 3}}, "has parts.train 3"),
        ({"parts": {"train": {}}}, "has no 'parts.train.count'"),
        ({"parts": {"train": {"count": None}}}, "has parts.train.count None"),
        ({"part": 3}, "has part 3"),
    ],
)
def test_a_value_of_another_type(changes, complaint):
    with pytest.raises(ValueError, match=rf"^thing f\.json {re.escape(complaint)}.*; remove it$"):
        record_from(Whole, GOOD | changes, "thing f.json", "remove it")


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_what_is_not_an_object(values):
    with pytest.raises(
        ValueError, match=rf"^thing f\.json has content {re.escape(repr(values))}, which is not an object; remove it$"
    ):
        record_from(Whole, values, "thing f.json", "remove it")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a b", "a;b", "$(a)", "`a`", "a\nb", "-a", "a\0", "a'b", "|a", "x" * 202]
)
def test_a_file_name_that_could_be_a_path_or_a_command_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"palette .*, which is not a plain file name"):
        check_file_name(name, "palette")


def test_plain_file_names() -> None:
    for name in ("train-000000.tar", "zero_pp_rank_0_mp_rank_00_model_states.pt", "palette.npy"):
        check_file_name(name)


def test_a_value_that_is_nested_too_deep_to_be_printed():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"^thing has name a deep list, which is not a string; fix$"):
        record_from(Whole, GOOD | {"name": deep}, "thing", "fix")
    while deep:  # Python would free it by recursion
        deep = deep.pop()
