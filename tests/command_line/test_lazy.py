"""Imports wait in a program, and happen at once in any other module."""

from __future__ import annotations

import runpy

import pytest

from igpt_ds.command_line import lazy

PROGRAM = """
import sys
from igpt_ds.command_line import lazy

sys.modules.pop("colorsys", None)
with lazy.imports():
    import colorsys
    import xml.dom
    import os.path as paths
    from string import ascii_letters, digits as numbers

loaded = "colorsys" in sys.modules
{more}
if __name__ == "__main__":
    lazy.load()
found = colorsys.hsv_to_rgb, xml.dom.Node, paths.join, ascii_letters, numbers
"""


@pytest.mark.parametrize("name", ["__main__", "a_module"])
def test_names_are_there_after_load(tmp_path, name):
    import os
    import string

    file = tmp_path / "program.py"
    file.write_text(PROGRAM.format(more=""))
    names = runpy.run_path(str(file), run_name=name)
    assert names["loaded"] is (name != "__main__")
    assert names["found"][2:] == (os.path.join, string.ascii_letters, string.digits)


@pytest.mark.parametrize("more", ["colorsys.hsv_to_rgb(0, 0, 0)", "class Child(xml.dom.Node): pass"])
def test_a_use_before_load_is_a_mistake(tmp_path, more):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM.format(more=more))
    with pytest.raises(TypeError, match=r"(colorsys\.hsv_to_rgb|xml\.dom\.Node) is used before lazy\.load\(\)"):
        runpy.run_path(str(file), run_name="__main__")
    lazy.load()
