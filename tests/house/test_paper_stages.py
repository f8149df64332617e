"""Every command of the paper's stages has flags that its program knows, and values that its own parser takes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from igpt_ds.config import Recipe, get_recipe, recipe_to_dict
from igpt_ds.json_files import write_json
from igpt_ds.paper.budget import machine_flags, trained
from igpt_ds.paper.full import Full
from igpt_ds.paper.scales import SCALES, get_scale
from igpt_ds.paper.stage import Flags, Stage
from igpt_ds.paper.stages import stages
from igpt_ds.paper.system import Scale, Training
from igpt_ds.plan.gpus import GPUS
from igpt_ds.plan.step_time import Cluster
from igpt_ds.train import finetune_flags
from igpt_ds.train import flags as train_flags
from igpt_ds.train.sweep import Result, write_sweep

ROOT = Path(__file__).parents[2]
# Tools whose parser does not look for the files that it is given, which are not there yet.
PARSED = ("tables", "figures", "evaluate", "extract_features", "linear_probe", "sgd_probe", "sample", "filter_shards", "sweep_lr")
GPU = GPUS["h100-80g"]
EVERYTHING = Full(search_rates=True, web="imagefolder:web", web_keep=0.1)


def experiments(scale: str) -> Scale:
    training = Training(get_recipe("igpt_s_ar_32"), ("--recipe", "igpt_s_ar_32")) if scale == "own" else None
    paper = EVERYTHING if scale == "full" else None
    return get_scale(scale, None if scale == "tiny" else "data", training=training, paper=paper)


def planned(scale: str) -> list[Stage]:
    def machine(recipe: Recipe) -> Flags:
        return machine_flags(trained(recipe, 64, Cluster(GPU)))

    return stages(experiments(scale), Path("out"), machine)


def parts(stage: Stage) -> list[tuple[str, ...]]:
    """The command, and the one that a search completes."""
    if "--" not in stage.words:
        return [stage.words]
    cut = stage.words.index("--")
    return [stage.words[:cut], (*stage.words[cut + 1 :], "--run_dir", "run")]


@pytest.mark.parametrize("scale", SCALES)
def test_flags_exist(scale: str, flags: dict[str, set[str]]) -> None:
    for stage in planned(scale):
        for program, *words in parts(stage):
            unknown = {word for word in words if word.startswith("--")} - flags[program]
            assert not unknown, f"{stage.name}: {program} has no {', '.join(unknown)}"


@pytest.mark.parametrize("scale", SCALES)
def test_parsers_take_the_values(scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "recipes").mkdir(parents=True)
    for system in experiments(scale).systems:
        write_json(tmp_path / "out" / "recipes" / f"{system.recipe.name}.json", recipe_to_dict(system.recipe))
    tools = {f"tools/{name}.py": runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["parse"] for name in PARSED}
    trainings = {"train.py": train_flags.parse, "finetune.py": finetune_flags.parse}
    searched = [Result(0.003, 1.0, None, 0.5, step=7), Result(0.001, 1.0, None, 0.4, step=8)]
    seen = set()
    for stage in planned(scale):
        for program, *words in parts(stage):
            if program in trainings:
                if "--search" in words:
                    write_sweep(Path(words[words.index("--search") + 1]) / "sweep.json", searched)
                assert (ROOT / trainings[program]("", words).ds_config).is_file()
            elif program == "tools/sweep_lr.py":
                tools[program]([*words, "--", "train.py"])
            elif program in tools:
                tools[program](words)
            seen.add(program)
    absent = {"tools/filter_shards.py"} if scale != "full" else set()
    absent |= {"finetune.py", "tools/evaluate.py", "tools/sgd_probe.py"} if scale == "own" else set()
    absent |= {"tools/sweep_lr.py"} if scale in ("own", "cifar") else set()
    assert (set(trainings) | set(tools)) - absent <= seen
