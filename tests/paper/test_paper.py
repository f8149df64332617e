"""The paper in one command: its stages at each scale, what they cost, what is refused; and the whole of it at toy size."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config import RECIPES, get_recipe
from igpt_ds.ds_config import SHIPPED
from igpt_ds.evaluate.report.results import read_all
from igpt_ds.json_files import read_json, write_json, write_json_lines
from igpt_ds.paper import budget
from igpt_ds.paper.full import Full
from igpt_ds.paper.scales import SCALES, get_scale
from igpt_ds.paper.stage import Stage, command_line, unfinished
from igpt_ds.paper.stages import stages
from igpt_ds.paper.system import Images, Training
from igpt_ds.plan.costs import checkpoint_bytes, parameters
from igpt_ds.plan.gpus import GPUS
from igpt_ds.plan.step_time import Cluster

H100S = Cluster(GPUS["h100-80g"])
DATA = {"own": "imagefolder:photos", "tiny": None, "cifar": "cifar10:batches", "full": "data"}
OWN = Training(get_recipe("cifar10_nano_ar_16"), ("--recipe", "cifar10_nano_ar_16"))
each_scale = pytest.mark.parametrize("name", SCALES)


def planned(name: str, out: Path = Path("out")) -> list[Stage]:
    scale = get_scale(name, DATA[name], training=OWN if name == "own" else None)
    return stages(scale, out, lambda recipe: {"ds_config": "ds_configs/zero3_bf16.json"})


@each_scale
def test_each_stage_needs_what_was_made_before(name: str) -> None:
    found = planned(name)
    assert len({stage.name for stage in found}) == len(found)
    assert len({stage.leaves for stage in found}) == len(found)
    before: dict[str, Path] = {}
    for stage in found:
        assert set(stage.needs) <= set(before), f"{stage.name} needs {stage.needs}"
        there = [Path("out/recipes"), stage.leaves, *(before[need] for need in stage.needs)]
        files = [Path(word) for word in stage.words if word.startswith("out/")]
        stray = [file for file in files if not any(file == one or one in file.parents for one in there)]
        assert not stray, f"{stage.name} reads {stray}, which no stage leaves"
        before[stage.name] = stage.leaves
    last = {"report", "tables", "figure-layers", "changes"} | ({"figure-training", "card"} if name == "own" else set())
    unused = set(before) - {need for stage in found for need in stage.needs} - last
    assert not unused, "made and never used"


def test_what_each_scale_is_made_of() -> None:
    kinds = {name: Counter(stage.job for stage in planned(name)) for name in SCALES}
    assert {name: kinds[name]["pretrain"] for name in SCALES} == {"own": 1, "tiny": 4, "cifar": 3, "full": 17}
    assert {name: kinds[name]["finetune"] for name in SCALES} == {"own": 0, "tiny": 6, "cifar": 4, "full": 11}
    assert {name: kinds[name]["sweep_lr"] for name in SCALES} == {"own": 0, "tiny": 1, "cifar": 0, "full": 7}
    full = get_scale("full", "data")
    of_the_paper = {system.recipe.name for system in full.systems if not system.changed}
    assert of_the_paper == {name for name in RECIPES if name.startswith("igpt_")}
    assert full.of_recipe("igpt_l_ar_32").steps == (65_000, 131_000, 262_000, 524_000, 1_000_000)
    crops = {(images.crop, images.views) for images in full.images if images.name == "imagenet"}
    assert crops == {("random", 8), ("center", 1)}
    text = {stage.name: " ".join(stage.words) for stage in planned("full")}
    assert "--crop random" in text["shards-imagenet_64_views"]
    assert "--keep_steps 65000 131000 262000 524000" in text["train-igpt_m_ar_32"]
    assert "--layers 45 46 47 48 " in text["probe-igpt_l_ar_48-1000000-imagenet_48-layers-45-48"], "every layer"
    few = [text[name] for name in ("probe-igpt_l_ar_32-1000000-cifar10_32-low_data", "igpt_l_ar_32-cifar10_32-40_labels")]
    assert "--train_split train " in few[0], "the same few labels for both"
    assert "--train_split" not in few[1], "the same few labels for both"
    assert "--splits train val test " in text["features-igpt_l_ar_32-1000000-cifar10_32"]
    for name in ("tiny", "cifar"):
        text = " ".join(word for stage in planned(name) for word in stage.words)
        for word in (
            "concat",
            "low_data",
            "sgd_probe",
            "--labels 40",
            "mask_vote",
            "--untrained 0",
            "--pixels",
            "neighbours",
            "--paper 1 2 3 4 5",
        ):
            assert word in text, f"{name} without {word}"
    for name, pad in (("cifar", "--augment_pad 2 "), ("full", "--augment_pad 4 ")):  # of 16x16 and of 32x32 pixels
        pads = [" ".join(stage.words) for stage in planned(name) if "--augment_pad" in stage.words]
        assert pads
        assert all(pad in one for one in pads)


def test_a_stage_is_done_when_all_its_rows_are_there(tmp_path: Path) -> None:
    rows = Stage("probe", ("tools/linear_probe.py",), tmp_path / "rows.jsonl", rows=3)
    run = Stage("train", ("train.py",), tmp_path / "run")
    search = Stage("search", ("tools/sweep_lr.py",), tmp_path / "search")
    table = Stage("tables", ("tools/tables.py",), tmp_path / "tables.md", needs=("probe",))
    table.leaves.touch()
    assert unfinished([rows, table]) == [rows, table], "a table of a probe that will run is made again"
    write_json(search.leaves / "sweep.json", {"finished": False})
    assert not search.done
    write_json(search.leaves / "sweep.json", {"finished": True})
    assert search.done
    assert not rows.done
    write_json_lines(rows.leaves, [{}, {}])
    (tmp_path / "run").mkdir()
    assert (rows.done, run.done) == (False, False)
    write_json_lines(rows.leaves, [{}, {}, {}])
    (tmp_path / "run" / "FINISHED").touch()
    assert (rows.done, run.done) == (True, True)
    assert unfinished([rows, table]) == []


def test_a_script_gets_the_words_as_they_are() -> None:
    stage = planned("full", Path("$(touch x) '"))[0]
    assert "$(touch x) '/palette.npy" in command_line(stage, ["a", "b"], "why").split("\x1f")[5:]
    with pytest.raises(ValueError, match=r"'a\\nb/palette.npy' contains a line break"):
        command_line(planned("full", Path("a\nb"))[0], [], "why")


def test_the_full_plan_counts_as_the_cost_model_does() -> None:
    scale = get_scale("full", "data")
    found = budget.costs(scale, 64, H100S)
    training = {cost.what: cost for cost in found if cost.kind == "pre-training"}
    assert len(training) == 8
    for name, cost in training.items():
        recipe, plan = get_recipe(name), budget.trained(get_recipe(name), 64, H100S)
        assert cost.gpu_hours == pytest.approx(plan.gpu_hours)
        assert cost.gpu_hours == pytest.approx(64 * (recipe.steps * plan.step.seconds + plan.validation_seconds) / 3600)
        stages_kept = len(scale.of_recipe(name).steps)
        kept = 2 + 1 + stages_kept - 1
        size = kept * checkpoint_bytes(
            parameters(recipe.model, recipe.objective), plan.layout.stage, plan.layout.weight_bytes
        ) + 4 * stages_kept * parameters(recipe.model, recipe.objective)
        assert cost.disk == pytest.approx(size)
    assert training["igpt_xl_ar_64"].gpu_hours == pytest.approx(16_658, rel=0.001), "as docs/scale.md has it"
    tuned = next(cost for cost in found if cost.what == "igpt_l_ar_48 from_scratch on imagenet_48_views")
    share = 18 * 1_229_920 / 128 / 1_000_000
    assert tuned.gpu_hours == pytest.approx(share * training["igpt_l_ar_48"].gpu_hours, rel=1e-4)
    features = next(cost for cost in found if cost.what == "igpt_l_ar_48 on imagenet_48" and cost.kind == "features")
    assert features.disk == (1_229_920 + 51_247 + 50_000) * 49 * 1536 * 2
    hours = (
        features.gpu_hours
        * 3600
        * H100S.gpu.peak
        / ((1_281_167 + 50_000) * 48 * 48 * 2 * parameters(get_recipe("igpt_l_ar_48").model))
    )
    assert 1.5 < hours < 4, "a forward pass at some 40 % of the printed peak"
    searched = next(cost for cost in found if cost.kind == "rate searches" and "from_scratch" in cost.what)
    assert searched.gpu_hours == pytest.approx(budget.rates_tried(0.001) * tuned.gpu_hours)
    assert [budget.rates_tried(lr) for lr in (0.01, 0.003, 0.0003)] == [2, 3, 5]
    whole = budget.costs(get_scale("full", "data", paper=Full("fp32")), 64, H100S)
    assert sum(cost.gpu_hours for cost in whole) > 5 * sum(cost.gpu_hours for cost in found)
    text = budget.describe_costs(found, 64, H100S)
    total = sum(cost.gpu_hours for cost in found)
    assert f"in total {total:,.0f} GPU-hours (${2.5 * total:,.0f} at $2.5 each)" in text
    assert f"disk {sum(cost.disk for cost in found) / 1e12:.1f} TB" in text
    rows = [line.split() for line in text.split("\n\n")[0].splitlines()]
    learned = {row[0]: row[2:6] for row in rows}
    assert learned["igpt_xl_ar_64"] == ["64", "2,000,000", "19,218", "0.0003"], (
        "images of a step, steps, warm-up, rate: 3.4, Table 5"
    )
    assert learned["igpt_s_bert_32"] == ["128", "1,000,000", "9,609", "0.01"]


def test_shards_are_as_large_as_counted(tiny_dataset: Path) -> None:
    index = read_json(tiny_dataset / "index.json", "index")
    files = [shard["bytes"] - 1024 for split in index["splits"].values() for shard in split["shards"]]
    counts = {split: about["n_images"] for split, about in index["splits"].items()}
    assert budget.shard_bytes(Images("tiny", "x:", 4, counts)) == sum(files)
    assert budget.shard_bytes(Images("tiny", "x:", 4, {"train": 10, "val": 1}, views=8)) == 81 * 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("huge", None), "scale 'huge' is unknown; known: own, tiny, cifar, full"),
        (("cifar", None), r"scale cifar needs --data \(make: DATA=...\): cifar10:DIR or imagefolder:DIR"),
        (("full", ""), "scale full needs --data .*the directory that holds ILSVRC2012"),
        (("tiny", "cifar10:x"), "scale tiny uses scikit-learn's digits, not cifar10:x; leave out --data"),
        (("cifar", "x:", 24), "--n_px 24 must be 16 or 32"),
        (("tiny", None, 16), "--n_px 16 must be .*only scale cifar takes it"),
        (("tiny", None, None, 7), "--steps 7 must be even and at least 2"),
        (("own", None, None, None, OWN), r"scale own needs --data \(make: DATA=...\): cifar10:DIR or imagefolder:DIR"),
        (("own", "x:"), "flags of train.py after -- belong to scale own, which needs them; scale own was given"),
        (("cifar", "x:", None, None, OWN), "flags of train.py after -- belong to scale own, .*; scale cifar was given"),
        (("own", "x:", None, 8, OWN), "--steps 8 of scale own is a flag of train.py; write it after --"),
        (("own", "x:", 16, None, OWN), "--n_px 16 must be .*only scale cifar takes it"),
        (
            ("tiny", None, None, None, None, Full("fp32")),
            "--precision, --search_rates, .* belong to scale full .* for scale tiny",
        ),
    ],
)
def test_what_no_scale_is(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_scale(*arguments)


def test_features_of_the_small_scale_in_bf16(tool: Any) -> None:
    """Where a CPU has bf16, features take half of the time; tools/paper.sh asks for it there."""
    asked = ("paper_plan", "--scale", "cifar", "--data", "cifar10:batches", "--gpu", "cpu", "--dry_run")
    said = {more: tool(*asked, *more)[1] for more in ((), ("--precision", "bf16"))}
    lines = {more: [line for line in text.splitlines() if "extract_features.py --model" in line] for more, text in said.items()}
    assert [all("--precision bf16 --dtype fp16" in line for line in found) for found in lines.values()] == [False, True]
    assert len({len(found) for found in lines.values()}) == 1


def test_what_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match="scale tiny has data sets of unknown size"):
        budget.costs(get_scale("tiny", None), 64, H100S)
    small = Cluster(dataclasses.replace(GPUS["a100-40g"], memory=8e9))
    with pytest.raises(ValueError, match="igpt_xl_ar_64 does not fit 1 a100-40g; give more --gpus, or larger ones by --gpu"):
        budget.trained(get_recipe("igpt_xl_ar_64"), 1, small)


def test_a_rehearsal_has_few_steps_everywhere() -> None:
    scale = get_scale("tiny", None, steps=8)
    assert {system.recipe.steps for system in scale.systems} == {8}
    tuned = [stage for stage in stages(scale, Path("out"), lambda recipe: {}) if stage.job == "finetune"]
    assert all(("--steps", "8") in zip(stage.words, stage.words[1:], strict=False) for stage in tuned)


@pytest.mark.parametrize(("steps", "each"), [(8, 8), (1000, 400)])
def test_a_long_rehearsal_makes_no_fine_tuning_on_few_labels_longer(steps: int, each: int) -> None:
    scale = get_scale("tiny", None, steps=steps)
    (tuning,) = (one for system in scale.systems for one in system.tunings if "labels" in one.knobs)
    assert budget.tuning_steps(tuning, scale, 1, 1) == each * int(str(tuning.knobs["subsets"]))
    (stage,) = (one for one in stages(scale, Path("out"), lambda recipe: {}) if "--labels" in one.words)
    assert stage.words[stage.words.index("--steps") + 1] == str(each)


def test_the_plan_as_a_user_sees_it(tool: Any, tmp_path: Path) -> None:
    status, said, _ = tool("paper_plan", "--scale", "full", "--data", tmp_path, "--gpus", 64, "--out", tmp_path / "out")
    assert status == 0
    assert "the paper at scale full in " in said
    assert "17 models, " in said
    assert "17 pre-trainings, 7 searches of a learning rate, 11 fine-tunings, " in said.splitlines()[1]
    assert "GPU-hours ($" in said.splitlines()[-3]
    assert said.splitlines()[-1].startswith("precision bf16; --precision fp32: ")
    row = next(line for line in said.splitlines() if line.startswith("to do likelihood-igpt_s_ar_32-65000: "))
    assert "; paper 4.2, Figure 3; bf16; about " in row
    assert " ..." not in said, "commands are whole"
    assert not (tmp_path / "out").exists(), "a plan writes nothing"
    assert tool("paper_plan", "--scale", "tiny", "--gpus", 0)[2].endswith("error: --gpus 0 must be at least 1\n")


def test_what_is_not_there_is_told_before_anything_is_written(tool: Any, tmp_path: Path) -> None:
    out, nowhere = tmp_path / "out", tmp_path / "nowhere"
    status, _, said = tool("paper_plan", "--scale", "tiny", "--out", out, "--ds_config", "nosuch.json", "--commands")
    assert (status, said) == (2, "paper_plan.py: error: --ds_config: nosuch.json does not exist\n")
    assert not out.exists()
    status, _, said = tool("paper_plan", "--scale", "full", "--data", nowhere, "--out", out)
    assert (status, f"warning: --data {nowhere} is not a directory on this machine" in said) == (0, True)
    assert tool("paper_plan", "--scale", "full", "--data", tmp_path, "--out", out)[2] == ""


def test_tables_see_every_pre_training_and_the_report_one() -> None:
    found = {stage.name: stage for stage in planned("full")}
    words = found["tables"].words
    first = words.index("--run_dir") + 1
    systems = [system for system in get_scale("full", "data").systems if not system.changed]
    assert words[first:] == tuple(f"out/runs/{system.recipe.name}" for system in systems)
    assert not any("mask_20" in word for word in words), "the variants of A.1 have a table of their own"
    assert "out/results/igpt_s_bert_32_mask_20-1000000-cifar10_32.jsonl" in found["changes"].words
    assert found["report"].words.count("--run_dir") == 1
    assert "out/runs/igpt_s_ar_32" not in found["report"].words, "the main run alone"
    pictures = found["report"].words[found["report"].words.index("--pictures") :]
    assert "out/figures/loss.png" in pictures
    assert "out/figures/layers.png" not in pictures, "the page draws it itself"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tools/paper.sh", "slurm/story_paper.sh"])
def test_a_finished_paper_ends_at_once(launch: Any, tmp_path: Path, script: str) -> None:
    """Standard input stays open, as a terminal's does: what reads from it waits for ever."""
    out = tmp_path / "paper"
    for stage in stages(get_scale("tiny", None), out, lambda recipe: {}):
        if stage.job == "sweep_lr":
            write_json(stage.leaves / "sweep.json", {"finished": True})
        elif stage.job in ("pretrain", "finetune"):
            stage.leaves.mkdir(parents=True)
            (stage.leaves / "FINISHED").touch()
        else:
            write_json_lines(stage.leaves, [{}] * stage.rows)
    (out / "jobs.txt").touch()
    before = sorted(out.rglob("*"))
    data = [""] if "story" in script else []
    arguments = [script, "tiny", out, *data, *(["--ds_config=ds_configs/zero3_fp32.json"] if data else [])]
    held_open = ["bash", "-c", 'exec bash "$@" < <(exec sleep 1000 2>/dev/null)', "bash"]
    done = launch([*held_open, *arguments], env={"SUBMIT": "1", "IGPT_DS_CLUSTER": "none"})
    assert done.returncode == 0, done.stderr
    assert "everything is there already" in done.stdout
    made = {path.name for path in out.rglob("*") if path not in before}
    changed = {f"digits_{name}.json" for name in ("pico_ar_8", "nano_ar_8", "nano_bert_8", "nano_bert_8_mask_25")}
    assert made <= {"log", "paper.json", "recipes"} | changed


def test_the_commands_for_a_script(tool: Any, tmp_path: Path) -> None:
    out, fp32 = tmp_path / "out", SHIPPED / "zero3_fp32.json"
    asked = ["--scale", "tiny", "--out", out, "--ds_config", fp32, "--commands"]
    lines = [line.split("\x1f") for line in tool("paper_plan", *asked)[1].splitlines()]
    assert lines[0][:4] == ["palette", "tool", "", ""]
    assert lines[1][:3] == ["shards-digits_8", "make_shards", "palette"]
    assert next(line for line in lines if line[0] == "tables")[3] == str(out / "tables.md")
    named = read_json(out / "recipes" / "digits_pico_ar_8.json", "recipe")
    assert (named["name"], named["model"]["n_layer"]) == ("digits_pico_ar_8", 4)
    (out / "palette.npy").touch()
    again = [line.split("\x1f") for line in tool("paper_plan", *asked)[1].splitlines()]
    assert again[0][:3] == ["shards-digits_8", "make_shards", ""], "what is there is neither made nor waited for"
    assert again[1:] == lines[2:]
    status, _, said = tool("paper_plan", *asked, "--steps", 8)
    assert (status, f"{out} holds the paper of scale tiny; choose another directory, or remove this one" in said) == (2, True)


def test_own_images_with_one_recipe_go_all_the_way_to_tables(tool: Any, tmp_path: Path) -> None:
    out, flags = tmp_path / "out", ["--recipe", "igpt_xl_ar_64", "--lr", "0.001", "--wandb_is_no_flag"]
    asked = ["--scale", "own", "--data", "imagenet:/data", "--out", out, "--gpus", 64, "--commands", "--"]
    assert "unknown flag --wandb_is_no_flag" in tool("paper_plan", *asked, *flags)[2]
    flags = flags[:-1]
    lines = {line.split("\x1f")[0]: line.split("\x1f")[1:] for line in tool("paper_plan", *asked, *flags)[1].splitlines()}
    train = lines["train-igpt_xl_ar_64"][3:]
    assert train[-4:] == flags
    assert ("--save_every", "5000") in itertools.pairwise(train)
    assert lines["train-igpt_xl_ar_64"][1] == "shards-imagenet_64"
    assert "--kinds normed raw" in " ".join(lines["features-igpt_xl_ar_64-2000000-imagenet_64"])
    assert list(lines)[-3:] == ["tables", "card", "report"]
    assert "--paper" not in lines["tables"]
    assert not {"figure-loss", "figure-datasets", "figure-objectives"} & set(lines)
    assert f"{out} holds the paper of scale own" in tool("paper_plan", *asked, *flags, "--n_px", 32)[2]
    status, said, _ = tool("paper_plan", *asked, *flags, "--clip", 1)  # no checkpoint yet, and the same shards
    assert (status, "--clip\x1f1" in said) == (0, True)
    (out / "runs" / "igpt_xl_ar_64" / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert "(now: training --recipe igpt_xl_ar_64 --lr 0.001 --clip 0.5)" in tool("paper_plan", *asked, *flags, "--clip", 0.5)[2]
    assert "--data after -- is given by the stages themselves" in tool("paper_plan", *asked, *flags, "--data", "x")[2]
    assert "--stop_at_step after -- would end the training" in tool("paper_plan", *asked, *flags, "--stop_at_step=3")[2]
    bert = get_scale("own", "x:", training=Training(get_recipe("igpt_s_bert_32"), ("--recipe", "igpt_s_bert_32")))
    drawn = [stage.name for stage in stages(bert, out, lambda recipe: {})]
    assert "figure-training" in drawn
    assert "samples" not in drawn, "a BERT model makes none"


def planned_words(tool: Any, *flags: object) -> tuple[dict[str, str], str]:
    """The commands of scale own by their names, and what is said beside them."""
    status, lines, said = tool("paper_plan", "--scale", "own", "--commands", *flags, "--", "--recipe", "cifar10_nano_ar_16")
    assert status == 0, said
    return {line.split("\x1f")[0]: " ".join(line.split("\x1f")[4:]) for line in lines.splitlines()}, said


def images_in(directory: Path, *folders: str) -> Path:
    for folder in folders:
        (directory / folder).mkdir(parents=True, exist_ok=True)
        (directory / folder / "0.png").touch()
    return directory


def test_own_images_are_called_as_their_folder(tool: Any, tmp_path: Path) -> None:
    photos = images_in(tmp_path / "my photos|1", "cat", "dog")
    words, said = planned_words(tool, "--data", f"imagefolder:{photos}", "--out", tmp_path / "out", "--gpus", 2)
    assert "--name my photos|1 --out" in words["shards-my_photos_1_16"]
    assert (said, "probe-pixels-my_photos_1_16" in words) == ("", True)
    words, _ = planned_words(tool, "--data", f"imagefolder:{photos}", "--name=-pets", "--out", tmp_path / "pets", "--gpus", 2)
    assert "--name=-pets --out" in words["shards--pets_16"]
    status, _, said = tool("paper_plan", "--scale", "tiny", "--name", "pets")
    assert (status, "--name, --labels and --test_fraction belong to scale own" in said) == (2, True)


@pytest.mark.parametrize("folders", [(".",), ("cat",), ("cat", "dog")])
def test_images_without_labels_are_trained_on_and_not_probed(tool: Any, tmp_path: Path, folders: tuple[str, ...]) -> None:
    photos, flags = images_in(tmp_path / "photos", *folders), ["--labels", "ignore"] if len(folders) > 1 else []
    words, said = planned_words(tool, "--data", f"imagefolder:{photos}", "--out", tmp_path / "out", *flags)
    assert said.startswith("no probes: all images are of class 'cat'" if folders == ("cat",) else "no probes: the images have no")
    assert len(said.splitlines()) == 1
    names = ["palette", "shards-photos_16", "train-cifar10_nano_ar_16", "model-cifar10_nano_ar_16-2400"]
    assert list(words)[: len(names)] == names
    assert {"features-cifar10_nano_ar_16-2400-photos_16", "samples", "figure-training", "card", "report"} <= set(words)
    assert not [name for name in words if name.startswith(("probe", "tables", "figure-layers", "figure-confusion"))]
    assert "--results" not in words["report"]
    assert all(("--labels ignore" in words[name]) == bool(flags) for name in names[:2])


def test_test_images_are_read_by_probes_of_all_others(tool: Any, tmp_path: Path) -> None:
    photos, other = images_in(tmp_path / "photos", "cat", "dog"), images_in(tmp_path / "other", "cat", "dog")
    for number, flags in enumerate((["--test_fraction", 0.1], [])):
        data = f"imagefolder:{photos}" + ("" if flags else f",test={other}")
        words, _ = planned_words(tool, "--data", data, "--out", tmp_path / f"{number}", *flags)
        assert ("--test_fraction 0.1" in words["shards-photos_16"]) == bool(flags)
        assert "--train_split train+val --eval_split test" in words["probe-pixels-photos_16"]
        assert "--splits train+val test" in words["features-cifar10_nano_ar_16-2400-photos_16"]
    again = ["--scale", "own", "--data", f"imagefolder:{photos}", "--out", tmp_path / "0", "--commands"]
    said = tool("paper_plan", *again, "--", "--recipe", "cifar10_nano_ar_16")[2]
    assert "test_fraction 0.1" in said
    assert "(now: test_fraction not given, eval_split not given)" in said


@pytest.mark.slow
def test_the_paper_at_toy_size(launch: Any, run_stages: Any, tmp_path: Path) -> None:
    out = tmp_path / "paper"
    run_stages(["--scale", "tiny", "--out", out, "--ds_config", SHIPPED / "zero3_fp32.json", "--steps", "4"])
    tables = (out / "tables.md").read_text()
    assert [tables.count(f"### Table {number}") for number in range(1, 6)] == [1] * 5
    for ours in ("5 masks vote | val", "none, from scratch | clf", "digits, "):
        assert ours in tables, ours
    assert re.search(r"no labels, step 4 \| \d\.\.\d normed \| val", tables), "five layers side by side"
    names = {"layers", "datasets", "loss", "objectives", "confusion", "neighbours", "confusion_finetuned", "training", "samples"}
    assert {path.stem for path in (out / "figures").glob("*.png")} == names
    assert (out / "report.html").read_text().count("<figure>") == len(names) + 1, (
        "the two curves are the page's own; layers is one of them"
    )
    rows = read_all([*(out / "results").glob("*.jsonl"), *(out / "runs").glob("*/results.jsonl")])
    layers = 1 + 2 * 5 + 5 * 7  # of pixels, of pico, and of nano: two steps, untrained, two BERTs
    others = 1 + 1 + 2 + 1  # five layers side by side by both ways, few labels, votes
    assert Counter(row["kind"] for row in rows) == {"probe": layers + others + 7, "likelihood": 4, "finetune": 6}
    assert {row["step"] for row in rows if row["kind"] == "likelihood"} == {2, 4}
    heads = {row["head_layer"] for row in rows if row["kind"] == "finetune" and row["loss"] == "joint"}
    assert 6 in heads
    assert read_json(out / "searches" / "digits_nano_ar_8-digits_8-from_scratch" / "sweep.json", "sweep")["finished"]
    assert "mask_25" in (out / "changes.md").read_text()

    lost = ["digits_nano_bert_8-digits_8-finetuned", "probe-pixels-digits_8", "figure-layers"]
    shutil.rmtree(out / "runs" / lost[0])
    (out / "results" / "pixels-digits_8.jsonl").unlink()
    (out / "figures" / "layers.png").unlink()
    command = ["bash", "tools/paper.sh", "tiny", out, "--steps", "4"]
    again = launch(command)
    assert again.returncode == 0, again.stdout + again.stderr
    begun = [line.split(": ")[1].split(" (")[0] for line in again.stdout.splitlines() if line.startswith("== ")]
    shown = {"tables", "report", "figure-objectives"}
    assert shown <= set(begun), "what shows a repeated stage is made again"
    assert set(lost) <= set(begun) <= {*lost, *shown}
    other = launch([*command[:-1], "8"])
    assert (other.returncode, "holds the paper of scale tiny, steps 4" in other.stderr) == (2, True)


@pytest.mark.slow
def test_a_stage_that_fails_says_where_its_output_is(launch: Any, tmp_path: Path) -> None:
    out = tmp_path / "paper"
    done = launch(["bash", "tools/paper.sh", "cifar", out, "imagefolder:nothing"])
    assert done.returncode == 2
    assert f"paper.sh: error: palette ended with status 2; its output is in {out}/log/palette.log" in done.stderr
    assert "nothing" in (out / "log" / "palette.log").read_text()
    assert launch(["bash", "tools/paper.sh"]).stderr.startswith("usage: bash tools/paper.sh SCALE OUT [DATA]")


def test_paper_sh_explains_itself(launch: Any) -> None:
    told = launch(["bash", "tools/paper.sh", "--help"])
    assert told.returncode == 0
    assert "    bash tools/paper.sh tiny runs/paper_tiny\n" in told.stdout
    assert "set -euo" not in told.stdout


@pytest.mark.slow
def test_the_full_paper_is_not_submitted_unasked(launch: Any, tmp_path: Path) -> None:
    done = launch(["make", "paper", "SCALE=full", f"DATA={tmp_path}", f"OUT={tmp_path / 'out'}", "SUBMIT="])
    assert done.returncode == 0, done.stderr
    assert "to do train-igpt_xl_ar_64" in done.stdout
    assert "on 64 h100-80g" in done.stdout
    assert done.stdout.endswith("nothing was submitted; to do so: SUBMIT=1 before the same command\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "null", "3", '"paper"', "{"])
def test_a_damaged_paper_json_is_one_clear_error(tool: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "paper.json").write_text(text)
    status, _, error = tool("paper_plan", "--scale", "tiny", "--out", tmp_path, "--commands")
    assert (status, len(error.splitlines())) == (2, 1)
    assert "paper.json" in error
