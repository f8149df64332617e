"""Every statement of the paper has stages or a reason, a row in docs/paper.md, and a command there; every stage a section."""

from __future__ import annotations

import re
from pathlib import Path

from igpt_ds.paper.experiments import EXPERIMENTS
from igpt_ds.paper.full import Full
from igpt_ds.paper.scales import get_scale
from igpt_ds.paper.stage import Stage
from igpt_ds.paper.stages import stages

PAGE = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
BASELINES = r"(features|probe)-(pixels-.*|.*-untrained-.*)|figure-(confusion|neighbours|confusion_finetuned)|samples|report"


def full(paper: Full) -> dict[str, Stage]:
    found = stages(get_scale("full", "data", paper=paper), Path("out"), lambda recipe: {})
    return {stage.name: stage for stage in found}


def test_every_statement_has_a_stage_or_a_reason() -> None:
    plain, every = full(Full()), full(Full(search_rates=True, web="imagefolder:web"))
    for one in EXPERIMENTS:
        assert bool(one.stages) != bool(one.why), one.statement
        found = [stage for name, stage in every.items() if one.stages and re.fullmatch(one.stages, name)]
        assert bool(found) == bool(one.stages), one.statement
        assert not found or any(one.section in stage.section.split(", ") for stage in found), one.statement
        needs_flag = not any(re.fullmatch(one.stages, name) for name in plain) if one.stages else False
        assert needs_flag == bool(one.flag), one.statement


def test_every_stage_names_its_section() -> None:
    known = {one.section for one in EXPERIMENTS}
    for name, stage in full(Full(search_rates=True, web="imagefolder:web", web_keep=0.1)).items():
        sections = [part for part in stage.section.split(", ") if re.match(r"\d|A", part)]
        assert bool(stage.section) != bool(re.fullmatch(BASELINES, name)), name
        assert set(sections) <= known, name


def test_table_3_is_fine_tuning_on_cifar() -> None:
    found = {name for name, stage in full(Full()).items() if "Table 3" in stage.section}
    assert found == {
        f"{search}igpt_l_ar_32-{cifar}_32-finetuned" for search in ("", "search-") for cifar in ("cifar10", "cifar100")
    }


def test_the_page_has_a_row_and_a_command_for_each_statement() -> None:
    rows = re.findall(r"^\| ([\dA.]+) \| (.+?) \| (.+) \|$", PAGE, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [(one.section, one.statement) for one in EXPERIMENTS]
    for one, (*_, last) in zip(EXPERIMENTS, rows, strict=True):
        assert "`python tools/" in last or "`deepspeed " in last or one.why in last, one.statement
        assert one.why in last, one.statement
        assert one.flag in last, one.statement
