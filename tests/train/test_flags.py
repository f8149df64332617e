"""The command line teaches: recipes listed, their values in the help, ds_configs by name, plans for other machines."""

from __future__ import annotations

import re

import pytest

from igpt_ds.config import RECIPES
from igpt_ds.ds_config import SHIPPED
from igpt_ds.plan import command
from igpt_ds.plan.shipped import ds_config_names, find_ds_config
from igpt_ds.train import finetune_flags, flags

DRY = ["--recipe", "igpt_s_ar_32", "--dry_run"]
GROUPS = ("data:", "this run:", "checkpoints:", "safety:", "machines:")


def help_of(parse, *words):
    with pytest.raises(SystemExit) as end:
        parse("", [*words, "--help"]) if parse is not command.parse else parse([*words, "--help"])
    assert end.value.code == 0


def test_the_recipes_are_listed_with_the_plans_times(capsys):
    for parse in (flags.parse, finetune_flags.parse):
        with pytest.raises(SystemExit):
            parse("", ["--list_recipes"])
    with pytest.raises(SystemExit):
        command.main(["--list_recipes"])
    first, second, third = (part for part in capsys.readouterr().out.split("recipe  ") if part)
    assert first == second == third
    assert all(name in first for name in RECIPES)
    row = next(line for line in first.splitlines() if line.startswith("igpt_l_ar_32"))
    command.main(["--recipe", "igpt_l_ar_32"])
    time = re.search(r"^time +(.*) on 1 h100", capsys.readouterr().out, re.MULTILINE)
    assert time
    assert row.endswith(f"0.001   {time[1]}")


def test_help_shows_the_values_of_the_recipe(capsys):
    help_of(flags.parse)
    plain = capsys.readouterr().out
    assert all(f"\n{group}\n" in plain for group in GROUPS)
    assert "what is learned (default: the recipe's value; --recipe NAME --help shows it):" in plain
    assert "igpt_s_ar_32: 0.003" not in plain
    for words in (["--recipe", "igpt_s_ar_32"], ["--recipe=igpt_s_ar_32"]):
        help_of(flags.parse, *words)
        text = " ".join(capsys.readouterr().out.split())
        assert "peak learning rate of Adam (igpt_s_ar_32: 0.003)" in text
        assert "mirror a random half of the images (igpt_s_ar_32: no)" in text
        assert "Adam (igpt_s_ar_32: 0.9 0.95)" in text
        assert "bert hides a pixel, between 0 and 1 (igpt_s_ar_32: has none)" in text
        assert text.count("(igpt_s_ar_32: ") == len(flags.KNOBS)
    help_of(finetune_flags.parse)
    tuning = capsys.readouterr().out
    assert all(f"\n{group}\n" in tuning for group in GROUPS)


def test_a_ds_config_has_a_name(tmp_path, monkeypatch):
    assert flags.parse("", [*DRY, "--ds_config", "zero3_fp32"]).ds_config == SHIPPED / "zero3_fp32.json"
    assert find_ds_config("ds_configs/zero3_fp32.json").name == "zero3_fp32.json"
    monkeypatch.chdir(tmp_path)
    assert find_ds_config("ds_configs/zero3_fp32.json") == SHIPPED / "zero3_fp32.json"
    (tmp_path / "zero3_fp32.json").write_text("{}")
    assert find_ds_config("zero3_fp32.json").resolve() == tmp_path / "zero3_fp32.json"
    assert set(ds_config_names()) == {path.stem for path in SHIPPED.glob("*.json")}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--ds_config", "zero3_bf"], r"^--ds_config: 'zero3_bf' is unknown; did you mean zero3_bf16 or .*known: zero1"),
        (["--ds_config", "zero3_bf15.json"], r"^--ds_config: zero3_bf15\.json does not exist; did you mean zero3_bf16"),
        (["--gpu", "h100"], r"^--gpu 'h100' is unknown; did you mean h100-80g or h100-pcie or h100-nvl\? known: a100-40g"),
        (["--lr", "-1"], r"^lr=-1\.0 must be a positive number"),
        (["--gpus", "0"], r"^gpus=0 must be at least 1"),
    ],
)
def test_a_wrong_value_is_refused_at_once(words, line):
    with pytest.raises(ValueError, match=line):
        flags.parse("", [*DRY, *words])


def test_a_cluster_is_for_dry_run():
    args = flags.parse("", [*DRY, "--gpu", "h200-141g", "--gpus", "64", "--nodes_nic", "4x200"])
    cluster = command.read_cluster(args)
    assert (cluster.gpu.name, cluster.node_gpus, cluster.node_network) == ("h200-141g", 8, 100e9)
    with pytest.raises(ValueError, match=r"^--gpus 8 is only for --dry_run; deepspeed --num_gpus 8 "):
        flags.parse("", ["--recipe", "igpt_s_ar_32", "--data", "d", "--run_dir", "r", "--gpus", "8"])
