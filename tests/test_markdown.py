"""Tables as Markdown: a cell holds any text, keeps its column, and comes back."""

from __future__ import annotations

import os

import pytest

from igpt_ds.evaluate.report.page import html_table
from igpt_ds.markdown import as_table, read_cells


def test_a_table():
    assert as_table(["a", "b"], [["1", "2"], ["3", ""]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 |  |"


@pytest.mark.parametrize("name", ["a|b", "a\\|b\\", "|", "\\\\|", "größe 写真", "", "**x**"])
def test_a_cell_keeps_its_column_and_comes_back(name):
    line = as_table(["images", "accuracy"], [[name, "97.1"]]).splitlines()[2]
    assert read_cells(line) == [name, "97.1"]


@pytest.mark.parametrize(("name", "shown"), [("a\nb", "a\\nb"), ("\x1b[2J", "\\x1b[2J"), (os.fsdecode(b"\xff"), "\\udcff")])
def test_control_characters_are_shown(name, shown):
    lines = as_table(["images"], [[name]]).splitlines()
    assert len(lines) == 3
    assert read_cells(lines[2]) == [shown]


def test_html_has_the_same_columns():
    page = html_table(as_table(["images", "accuracy"], [["<a|b>", "97.1"]]))
    assert "<td>&lt;a|b&gt;</td><td>97.1</td>" in page
