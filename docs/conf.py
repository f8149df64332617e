"""The site's settings for Sphinx. `make docs` builds the site in site/.

The source is the whole repository, so the links between Markdown files are those that GitHub follows. README.md is the first
page. Sphinx reads the names below and calls `setup`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Captions of the navigation, and their pages in order.
NAVIGATION = {
    "Start": ["docs/start"],
    "Tasks": [
        "docs/own_data",
        "docs/one_machine",
        "docs/cluster",
        "docs/scale",
        "docs/evaluate",
        "docs/finetune",
        "docs/interchange",
        "docs/paper",
    ],
    "Results": ["docs/results", "docs/paper_cifar", "docs/measured"],
    "Reference": [
        "docs/api",
        "docs/reference",
        "docs/quickstart",
        "ds_configs/README",
        "slurm/README",
        "docs/formats",
        "docs/troubleshooting",
        "docs/glossary",
    ],
    "Contributing": ["docs/architecture", "LOG"],
}

project = "igpt_ds"
root_doc = "README"
include_patterns = ["README.md", "LOG.md", "docs/*.md", "docs/*.rst", "docs/*.ipynb", "ds_configs/README.md", "slurm/README.md"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".ipynb": "notebook"}
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_heading_anchors = 3  # GitHub's anchors, of headings down to ###
autodoc_typehints = "description"
napoleon_use_ivar = True
default_role = "code"  # `text` in docstrings

html_theme = "furo"
html_title = "igpt_ds"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False


class Notebook(MystParser):
    """Reads a notebook as Markdown: its text, its code, and what the code printed."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Fills the document; called by Sphinx."""
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            text = "".join(cell["source"])
            parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
            for output in cell.get("outputs", []):
                printed = "".join(output.get("text") or output.get("data", {}).get("text/plain", []))
                parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
        super().parse("\n\n".join(parts) + "\n", document)


def add_navigation(_app: Sphinx, docname: str, source: list[str]) -> None:
    """The navigation stands in this file and not in README.md, where GitHub would show it as a block of code."""
    if docname == root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Writes the page that a web server opens first."""
    if error is None:
        moved = (
            f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><a href="{root_doc}.html">igpt_ds</a>\n'
        )
        (Path(app.outdir) / "index.html").write_text(moved, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Registers the above; called by Sphinx."""
    app.add_source_parser(Notebook)
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_index)
