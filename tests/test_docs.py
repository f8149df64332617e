"""README.md and docs/: links and anchors lead somewhere, quoted errors are those of the code, numbers those of the files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from doc_commands import TEXTS

import igpt_ds
from igpt_ds.config import RECIPES
from igpt_ds.evaluate.report.results import read_all
from igpt_ds.plan.costs import parameters

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", flags=re.MULTILINE | re.DOTALL)
QUOTED = re.findall(r"^```text\n(.+?)\n```", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub and the site give to the headings of a file."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def complaint(source: Path, target: str) -> str:
    """Why a link of the file leads nowhere, or ""."""
    path, _, anchor = target.partition("#")
    there = (source.parent / path).resolve() if path else source
    if not there.exists():
        return f"{target} does not exist"
    return f"{target}: no such heading" if anchor and anchor not in anchors(there) else ""


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for link in LINK.findall(CODE.sub("", path.read_text())) if not link.startswith(("http", "mailto"))]
    assert not [said for link in links if (said := complaint(path, link))]


def test_a_wrong_link_is_noticed() -> None:
    page = ROOT / "docs" / "scale.md"
    assert complaint(page, "nothing.md") == "nothing.md does not exist"
    assert complaint(page, "own_data.md#nowhere") == "own_data.md#nowhere: no such heading"
    assert not complaint(page, "own_data.md#crops-and-filters")
    assert not complaint(page, "#choose-a-ds_config")


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {(ROOT / link.split("#")[0]).resolve() for link in LINK.findall((ROOT / "README.md").read_text())}
    pages = {page for page in TEXTS if page.parent in (ROOT / "docs", ROOT / "ds_configs")}
    assert not {page.name for page in pages - linked}


def messages() -> list[str]:
    """Every text of the code, with … where a value stands."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        return "…"

    files = [*(ROOT / "igpt_ds").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *ROOT.glob("*.py")]
    trees = [ast.parse(path.read_text()) for path in files]
    lines = [line for path in (*ROOT.glob("tools/*.sh"), *ROOT.glob("slurm/*.sh")) for line in path.read_text().splitlines()]
    shell = [re.sub(r"\$\{[^}]*\}|\$\w+", "…", line) for line in lines]
    return [*shell, *(text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant))]


def test_quoted_errors_are_those_of_the_code() -> None:
    known = messages()
    assert len(QUOTED) > 30
    assert not [line for line in QUOTED if not any(line in message for message in known)]


def test_python_examples_use_names_that_exist() -> None:
    blocks = [
        block for path in TEXTS for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    ]
    trees = [ast.parse(block) for block in blocks]
    used = [
        node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    assert {node.attr for node in used if node.value.id == "igpt_ds"} <= set(igpt_ds.__all__)
    assert {node.attr for node in used if node.value.id == "model"} <= set(dir(igpt_ds.Model)) | {
        "config"
    }  # config: Hugging Face's


def test_recipes_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+_\d+)` \| (.+) \|$", (ROOT / "docs" / "one_machine.md").read_text(), flags=re.MULTILINE)
    shown = {name: row.replace(",", "").split(" | ") for name, row in rows}
    assert shown == {
        name: [
            *map(str, (one.model.n_layer, one.model.n_head, one.model.n_embd, parameters(one.model, one.objective))),
            f"{one.batch_images} x {one.steps}",
            f"{one.lr:g}",
        ]
        for name, one in RECIPES.items()
    }


def test_accuracies_in_the_readme_are_those_of_the_rows() -> None:
    rows = read_all([ROOT / "docs" / "cifar10" / "results.jsonl"])
    for name, layer, accuracy in re.findall(
        r"^\| ([a-z, ]+) \| (\d|-)[^|]* \| (\d+\.\d) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE
    ):
        weights, _, kind = name.partition(", ")
        of = (
            [row for row in rows if row.weights == weights and row.features == kind]
            if kind
            else [row for row in rows if row.weights == "pixels"]
        )
        best = max(of, key=lambda row: row.held_out_accuracy)
        assert (accuracy, layer) == (f"{100 * best.accuracy:.1f}", str(best.layer) if kind else "-"), name
