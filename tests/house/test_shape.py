"""Files and functions stay small, say what they are, and a tool is nothing but a tool."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
HARNESS = {"harness.py", "device.py", "plain.py", "gpu_zero3.py"}  # what the benchmarks share: no programs of their own
FILES = [*sorted((ROOT / "igpt_ds").rglob("*.py")), *TOOLS]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


@every_file
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 300, f"{path} has {text.count(chr(10))} lines; 300 at most"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{path}:{node.lineno} {node.name} has {lines} lines; 60 at most"


@every_file
def test_what_is_public_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), f"{path} has no docstring"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for scope in (tree, *classes):
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"


@every_file
def test_nothing_is_left_for_later(path):
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        assert not any(word in line for word in ("TODO", "FIXME", "XXX", "NotImplemented")), f"{path}:{number}: {line}"


@pytest.mark.parametrize(
    "path", [path for path in TOOLS if path.name not in HARNESS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_tool_has_an_example_and_one_entry(path):
    tree = ast.parse(path.read_text())
    name = str(path.relative_to(ROOT))
    assert f"{name} --" in (ast.get_docstring(tree) or ""), f"{name}'s docstring shows no example command"
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert ast.unparse(main.args) == "argv: Sequence[str] | None=None"
    assert (
        ast.unparse(tree.body[-1]).removesuffix(", ranks=True)").removesuffix(")")
        == "if __name__ == '__main__':\n    cli.run(main"
    )


def test_text_of_files_and_programs_has_a_stated_encoding():
    """The linter sees open() and Path(...) alone; paths in variables and subprocess are found here."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {word.arg for word in node.keywords}
                reads = isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text")
                assert "encoding" in given or not reads, f"{path}:{node.lineno}: state the encoding"
                assert not given & {"text", "universal_newlines"}, f"{path}:{node.lineno}: state encoding and errors"


def test_an_error_for_a_user_is_an_input_error():
    """`cli.run` turns InputError and OSError into one line. A plain ValueError there is a library's, and a mistake of ours."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                names = {part.id for part in ast.walk(node.exc or node) if isinstance(part, ast.Name)}
                assert "ValueError" not in names, f"{path}:{node.lineno}: raise igpt_ds.errors.InputError"
