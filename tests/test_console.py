"""Words for people."""

import pytest

from igpt_ds.console import clock, count, next_command


def test_counts_have_their_noun() -> None:
    assert [count(n, "rank") for n in (0, 1, 2, 1640)] == ["0 ranks", "1 rank", "2 ranks", "1,640 ranks"]
    assert [count(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (45, "0:45"), (200, "3:20"), (93909, "26:05:09")])
def test_a_clock_has_hours_when_it_needs_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_next_command_can_be_pasted_into_a_shell() -> None:
    assert next_command("python", "tools/x.py", "--out", "my photos/a") == "next: python tools/x.py --out 'my photos/a'"
    assert next_command("ls", label="or") == "or:   ls"
