"""Every command of the paper's stages has flags that its program knows, and values that its own parser takes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from igpt_ds.config import Recipe, get_recipe, recipe_to_dict
from igpt_ds.json_files import write_json
from igpt_ds.paper.budget import machine_flags, trained
from igpt_ds.paper.scales import SCALES, Scale, Training, get_scale
from igpt_ds.paper.stage import Flags, Stage
from igpt_ds.paper.stages import stages
from igpt_ds.plan.step_time import GPUS, Cluster
from igpt_ds.train import finetune_flags
from igpt_ds.train import flags as train_flags

ROOT = Path(__file__).parents[2]
# Tools whose parser does not look for the files that it is given, which are not there yet.
PARSED = ("tables", "figures", "evaluate", "extract_features", "linear_probe", "sgd_probe", "sample")
GPU = GPUS["h200-141g"]  # on which nothing is left out


def experiments(scale: str) -> Scale:
    training = Training(get_recipe("igpt_s_ar_32"), ("--recipe", "igpt_s_ar_32")) if scale == "own" else None
    return get_scale(scale, None if scale == "tiny" else "data", gpu_bytes=GPU.memory, training=training)


def planned(scale: str) -> list[Stage]:
    def machine(recipe: Recipe) -> Flags:
        return machine_flags(trained(recipe, 64, Cluster(GPU)))

    return stages(experiments(scale), Path("out"), machine)


@pytest.mark.parametrize("scale", SCALES)
def test_flags_exist(scale: str, flags: dict[str, set[str]]) -> None:
    for stage in planned(scale):
        unknown = {word for word in stage.words if word.startswith("--")} - flags[stage.words[0]]
        assert not unknown, f"{stage.name}: {stage.words[0]} has no {', '.join(unknown)}"


@pytest.mark.parametrize("scale", SCALES)
def test_parsers_take_the_values(scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "recipes").mkdir(parents=True)
    for system in experiments(scale).systems:
        write_json(tmp_path / "out" / "recipes" / f"{system.recipe.name}.json", recipe_to_dict(system.recipe))
    tools = {f"tools/{name}.py": runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["parse"] for name in PARSED}
    trainings = {"train.py": train_flags.parse, "finetune.py": finetune_flags.parse}
    seen = set()
    for stage in planned(scale):
        program, *words = stage.words
        if program in trainings:
            assert (ROOT / trainings[program]("", words).ds_config).is_file()
        elif program in tools:
            tools[program](words)
        seen.add(program)
    absent = {"tools/sgd_probe.py"} | ({"finetune.py", "tools/evaluate.py"} if scale == "own" else set())
    assert (set(trainings) | set(tools)) - absent <= seen
