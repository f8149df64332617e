"""What a plan recommends, says, and refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.config import RECIPES, get_recipe, override
from igpt_ds.ds_config import SHIPPED, join, load_ds_config
from igpt_ds.plan.command import dry_run, main, network
from igpt_ds.plan.costs import GIB, memory
from igpt_ds.plan.estimate import Price, estimate, rank_layout
from igpt_ds.plan.gpus import GPUS
from igpt_ds.plan.options import Request, options
from igpt_ds.plan.step_time import Cluster
from igpt_ds.train import flags as train_flags

XL = get_recipe("igpt_xl_ar_64")
H100S = Cluster(GPUS["h100-80g"])


def best(recipe, gpus, cluster=H100S):
    return options(Request(recipe, gpus, cluster))[0]


def test_a_layout_is_read_from_the_ds_config():
    runs = {path.stem: join(XL, load_ds_config(path), 64) for path in SHIPPED.glob("*.json")}
    layouts = {name: rank_layout(run) for name, run in runs.items()}
    assert {name: one.stage for name, one in layouts.items() if one.stage != 3} == {"zero1_bf16": 1, "zero2_bf16": 2}
    assert {name for name, one in layouts.items() if one.hpz > 1} == {"zero3_hpz_bf16"}
    assert {name for name, one in layouts.items() if one.offload_optimizer} == {"zero3_bf16_offload_optimizer"}
    assert {name for name, one in layouts.items() if one.accumulation_bytes == 2} == {
        "zero1_bf16",
        "zero3_bf16_bf16_accumulation",
    }
    assert {name for name, one in layouts.items() if not one.overlap} == {"zero1_bf16", "zero2_bf16"}
    assert layouts["zero3_bf16_sequence_parallel"].sequence_parallel == 2
    assert all(one.images == 64 for one in layouts.values())


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(RECIPES)), gpus=st.integers(1, 300), gpu=st.sampled_from(sorted(GPUS)))
def test_what_is_chosen_multiplies_out(name, gpus, gpu):
    recipe = RECIPES[name]
    try:
        found = options(Request(recipe, gpus, Cluster(GPUS[gpu])))
    except ValueError:
        with pytest.raises(ValueError, match=f"a batch of {recipe.batch_images} images does not divide over {gpus} GPUs"):
            options(Request(recipe, gpus, Cluster(GPUS[gpu])))
        return
    for one in found:
        groups, left = divmod(gpus, one.run.sequence_parallel)
        assert left == 0
        assert one.run.micro_batch * one.run.accumulation * groups == recipe.batch_images
        parts, n_ctx = one.run.sequence_parallel, recipe.model.n_ctx
        assert recipe.model.n_head % parts == 0
        assert (parts - 1) * math.ceil(n_ctx / parts) < n_ctx, "the last of them may have fewer tokens, but some"
        again = join(recipe, load_ds_config(SHIPPED / one.ds_config), gpus, one.run.micro_batch, one.run.sequence_parallel)
        assert one.memory.total == memory(recipe.model, rank_layout(again)).total


@given(batch_images=st.integers(1, 512), gpus=st.integers(1, 512))
@settings(deadline=None, max_examples=60)
def test_the_numbers_of_gpus_that_are_named_do_divide(batch_images, gpus):
    recipe = dataclasses.replace(XL, batch_images=batch_images)
    few = {"zero3_bf16.json": load_ds_config(SHIPPED / "zero3_bf16.json")}
    try:
        options(Request(recipe, gpus, H100S, few))
    except ValueError as error:
        named = [int(word) for word in str(error).partition("numbers that do: ")[2].split(" or ")]
        assert named
        assert gpus not in named
        for number in named:
            assert options(Request(recipe, number, H100S, few))


@pytest.mark.parametrize(
    ("gpus", "gpu", "name", "split"),
    [
        (8, "h100-80g", "zero3_bf16.json", (2, 4, 1)),
        (64, "h100-80g", "zero3_bf16.json", (1, 1, 1)),
        (128, "h100-80g", "zero3_bf16_kept_weights.json", (1, 1, 2)),
        (256, "h100-80g", "zero3_bf16_kept_weights.json", (1, 1, 4)),
        (512, "h100-80g", "zero2_bf16.json", (1, 1, 8)),
        (8, "a100-40g", "zero3_bf16_selective_checkpointing.json", (1, 8, 1)),
        (1, "h200-141g", "zero3_bf16_full_checkpointing.json", (1, 64, 1)),
        (1, "b200", "zero3_bf16.json", (1, 64, 1)),
    ],
)
def test_what_is_recommended_for_xl(gpus, gpu, name, split):
    one = best(XL, gpus, Cluster(GPUS[gpu]))
    assert one.fits
    assert one.ds_config == name
    assert (one.run.micro_batch, one.run.accumulation, one.run.sequence_parallel) == split


def test_a_slow_network_asks_for_kept_weights_or_where_memory_is_short_for_hpz():
    slow = Cluster(GPUS["h100-80g"], node_network=network("8x100"))
    short = dataclasses.replace(slow, gpu=dataclasses.replace(slow.gpu, memory=40e9))
    found = [best(XL, 64, cluster).ds_config for cluster in (slow, short)]
    assert found == ["zero3_bf16_kept_weights.json", "zero3_hpz_bf16.json"]


def test_where_nothing_fits_the_nearest_comes_first_and_says_so(capsys):
    assert not best(XL, 1).fits or best(XL, 1).ds_config == "zero3_bf16_offload_optimizer.json"
    main(["--recipe", "igpt_xl_ar_64", "--gpus", "1", "--gpu_memory", "8"])
    assert "DOES NOT FIT: 7.1 GiB are usable on one h100-80g of 8 GB" in capsys.readouterr().out


def test_money_days_and_disk():
    run = join(XL, load_ds_config(SHIPPED / "zero3_bf16.json"), 64)
    one = estimate(run, "zero3_bf16.json", H100S, Price(2.0, keep_last=3, keep_every=500_000))
    assert one.days == pytest.approx((one.step.seconds * 2_000_000 + 2001 * one.validation) / 86400)
    assert one.validation == pytest.approx(11.4, abs=0.5)
    assert one.validation_share == pytest.approx(one.validation / (one.validation + 1000 * one.step.seconds), rel=0.01)
    seldom = estimate(run, "zero3_bf16.json", H100S, Price(val_images=51_247, val_every=0))
    assert seldom.validation_seconds == 2 * seldom.validation
    assert seldom.validation / one.validation == pytest.approx(51_247 / 5000, rel=0.03)
    assert one.gpu_hours == pytest.approx(64 * 24 * one.days)
    assert one.dollars == pytest.approx(2 * one.gpu_hours)
    assert one.checkpoints_kept == 3 + 4
    assert one.disk_bytes == 8 * 12 * 6_810_875_904
    assert (one.flops, one.wire_bytes) == (pytest.approx(2.613e22, rel=1e-3), pytest.approx(40.2e9, rel=1e-2))
    assert one.days == pytest.approx(10.85, abs=0.05)


def test_the_text_names_what_matters(capsys):
    main(["--recipe", "igpt_xl_ar_64", "--gpus", "64", "--gpu", "h100-80g", "--nodes_nic", "8x400"])
    text = capsys.readouterr().out
    for words in (
        "6,810,875,904",
        "49.838 G a token (full attention), 45.308 G (causal half); 2.613e+22 in total",
        "64 images = 64 ranks x micro batch 1 x accumulation 1",
        "--ds_config zero3_bf16.json --micro_batch 1",
        "29.01 GiB = weights 0.20 + gradients 0.40 + optimizer 1.19 + activations 22.75 + workspace",
        "fits: 70.8 GiB are usable",
        "40.2 GB a GPU and step",
        "45.1 % (full attention), 41.0 % (causal)",
        "what leads      the GPU; GPU 0.435 s, network 0.168 s, Python of the host ",
        "5,000 images in batches of 8 a rank: 11.4 s each, 2.4 % of the run",
        "10.8 days on 64 h100-80g: 16,",
        "at $2.5 a GPU-hour",
        "81.73 GB a checkpoint; 2 kept and one being written: 245.2 GB",
    ):
        assert words in text
    names = [path.name for path in SHIPPED.glob("*.json") if "bf16" in path.name and "sequence" not in path.name]
    assert all(text.count(name) >= 1 for name in names)
    assert "recommended" in text


def test_shared_images_and_rough_sums_are_told(capsys):
    main(["--recipe", "igpt_xl_ar_64", "--gpus", "256"])
    text = capsys.readouterr().out
    assert "64 groups of 4 ranks that share an image x micro batch 1" in text
    assert "--sequence_parallel 4" in text
    run = join(XL, load_ds_config(SHIPPED / "zero1_bf16.json"), 8, micro_batch=1)
    words = ["--recipe", "igpt_xl_ar_64", "--ds_config", "zero1_bf16", "--dry_run"]
    said = dry_run(run, train_flags.parse("", [*words, "--fast_dir", "/dev/shm", "--save", "sync"]))
    assert "accumulation 8 (gradients summed in half precision: choose another ds_config)" in said
    assert "2 states and one being written: 286.1 GB a node" in said
    assert "--save async" not in said


def test_bert_has_one_convention(capsys):
    main(["--recipe", "igpt_l_bert_32", "--gpus", "8"])
    assert "(causal half)" not in capsys.readouterr().out


def test_the_table(capsys):
    main(["--recipe", "igpt_xl_ar_64", "--table"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "igpt_xl_ar_64 on h100-80g, 3,200 Gbit/s a node"
    assert [line.split()[0] for line in lines[2:]] == ["8", "16", "32", "64", "128", "256", "512", "1024", "2048"]
    assert "a batch of 64 images does not divide over 2048 GPUs; numbers that do: 512" in lines[-1]


def test_the_table_says_where_nothing_fits(capsys):
    main(["--recipe", "igpt_xl_ar_64", "--table", "--gpu_memory", "4"])
    assert "nothing fits; " in capsys.readouterr().out.splitlines()[2]


def test_another_batch_goes_further(capsys):
    main(["--recipe", "igpt_xl_ar_64", "--batch_images", "512", "--gpus", "512", "--json"])
    one = json.loads(capsys.readouterr().out)[0]
    assert (one["batch_images"], one["steps"], one["sequence_parallel"]) == (512, 250_000, 1)
    assert one["flops"] == pytest.approx(2.613e22, rel=1e-3)
    assert one["mfu"] > 0.3


def test_numbers_for_programs(capsys):
    main(["--recipe", "igpt_s_ar_32", "--gpus", "8", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found[0]["parameters"] == 76_571_648
    main(["--recipe", "igpt_xl_ar_64", "--table", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows[-1] == {"gpus": 2048, "reason": rows[-1]["reason"]}
    assert rows[3]["days"] == pytest.approx(10.85, abs=0.05)
    assert (rows[3]["leads"], rows[3]["waiting_seconds"], rows[3]["validation_batch"]) == ("GPU", 0.0, 8)
    assert rows[3]["validation_share"] == pytest.approx(0.024, abs=0.001)


def test_what_is_asked_for_is_taken(capsys, tmp_path):
    main(["--recipe", "igpt_xl_ar_64", "--gpus", "64", "--activation_checkpointing", "full", "--json"])
    assert {one["activation_checkpointing"] for one in json.loads(capsys.readouterr().out)} == {"full"}
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3}, "igpt_ds": {"activation_checkpointing": "selective"}}))
    words = ["--ds_config", str(own), "--micro_batch", "2", "--sequence_parallel", "2", "--json"]
    main(["--recipe", "igpt_xl_ar_64", "--gpus", "8", *words])
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["ds_config"], one["precision"], one["micro_batch"], one["accumulation"]) == ("own.json", "fp32", 2, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], r"^gpus=0 must be at least 1$"),
        (["--node_gpus", "0"], r"^node_gpus=0 must be at least 1$"),
        (["--micro_batch", "0"], r"^micro_batch=0 must be at least 1$"),
        (["--sequence_parallel", "-1"], r"^sequence_parallel=-1 must be at least 1$"),
        (["--batch_images", "0"], r"^batch_images=0 must be at least 1$"),
        (["--keep_last", "0"], r"^keep_last=0 must be at least 1$"),
        (["--gpu_memory", "0"], r"^gpu_memory=0 must be a positive number of GB$"),
        (["--dollars_per_gpu_hour", "nan"], r"^dollars_per_gpu_hour=nan must be a positive number of dollars$"),
        (["--nodes_nic", "400"], r"^nodes_nic=400 must be cards times Gbit/s of one, like 8x400$"),
        (["--nodes_nic", "0x400"], r"^nodes_nic=0x400 must be cards times Gbit/s of one, like 8x400$"),
        (["--gpus", "48"], r"^a batch of 128 images does not divide over 48 GPUs; numbers that do: 32 or 64$"),
        (["--gpus", "8", "--micro_batch", "3"], r"^batch_images=128 does not divide into 8 ranks x micro batch 3; "),
        (
            ["--gpus", "8", "--sequence_parallel", "3"],
            r"^sequence_parallel=3 does not divide ranks=8; here it may be 1, 2, 4, 8$",
        ),
        (["--ds_config", "nowhere.json"], r"^--ds_config: nowhere\.json does not exist$"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        main(["--recipe", "igpt_s_ar_32", *words])


def test_network_cards():
    assert network("8x400") == 400e9
    assert network("1x200") == 25e9
    assert network("4x12.5") * 8 == 50e9


def test_the_command_in_the_first_lines_works(capsys):
    command = next(
        line for line in (Path(main.__code__.co_filename)).read_text().splitlines() if line.startswith("    python -m")
    )
    main(command.split()[3:])
    assert "10.8 days" in capsys.readouterr().out


def test_a_recipe_with_other_knobs_is_planned_by_them():
    half = override(XL, n_layer=30)
    assert best(half, 64).memory.activations < 0.6 * 22.75 * GIB


def test_what_is_offloaded_lies_in_the_hosts_memory(capsys):
    file = SHIPPED / "zero3_bf16_offload_optimizer.json"
    main(["--recipe", "igpt_xl_ar_64", "--gpus", "16", "--ds_config", str(file), "--json"])
    (one,) = json.loads(capsys.readouterr().out)
    assert one["host_bytes_a_node"] == pytest.approx(16 * 6_810_875_904 / 2)
    main(["--recipe", "igpt_xl_ar_64", "--ds_config", str(file)])
    said = capsys.readouterr().out
    assert "and 101.5 GiB of host memory a node" in said
    assert one["copied_bytes_a_node"] == 6 * 6_810_875_904
    assert "and 76.1 GiB of host memory a node for --save async" in said


def test_a_table_takes_no_number_of_gpus():
    with pytest.raises(ValueError, match=r"--table plans for 8 to 2048 GPUs; give --gpus 7 or --table"):
        main(["--recipe", "igpt_xl_ar_64", "--table", "--gpus", "7"])
