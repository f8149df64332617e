"""Likelihood: against plain float64 arithmetic, for any batch and any ranks; and when the published numbers stand beside it."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_ds.config import RECIPES, ModelConfig
from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import read_index, write_index
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import open_source, openai_arrays
from igpt_ds.evaluate import likelihood
from igpt_ds.evaluate.likelihood import LikelihoodSettings, choose_ids, compare_published, pixel_nats, shard_nats, summarise
from igpt_ds.evaluate.report.row_types import MeanWithError
from igpt_ds.model.objectives import draw_masks, image_nats
from igpt_ds.model.store import fresh_model, save_model
from igpt_ds.paper.published import FIGURE_3_NATS


@pytest.fixture
def speaking(tiny_config):
    """speaking("ar") -> a tiny model whose head prefers some colours."""

    def make(objective="ar"):
        model = fresh_model(tiny_config, seed=1, objective=objective)
        with torch.no_grad():
            model.head.weight.normal_(generator=torch.Generator().manual_seed(2))
        return model

    return make


@pytest.fixture
def val(tiny_dataset):
    return ShardSet(tiny_dataset, "train")


def all_tokens(shards):
    return torch.from_numpy(shards.tokens(np.arange(shards.n_images)).reshape(shards.n_images, -1).astype(np.int64))


def test_nats_equal_float64_arithmetic(speaking, val):
    tokens = all_tokens(val)
    logits = speaking().double()(tokens)
    expected = -logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).mean(1)
    found = shard_nats(speaking(), val, np.arange(val.n_images), LikelihoodSettings(batch=5))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_any_batch_gives_the_same(speaking, val, objective, batch):
    ids = choose_ids(val.n_images, 20)
    one, other = (shard_nats(speaking(objective), val, ids, LikelihoodSettings(b, mask_draws=2)) for b in (4, batch))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_an_image_has_its_masks_whatever_else_is_measured(speaking, val):
    """The masks of an image follow from (seed, draw, id, pixel), and its nats are those of the masked tokens alone."""
    model = speaking("bert")
    settings = LikelihoodSettings(batch=6, mask_draws=3, seed=5, mask_prob=0.3)
    few, ids = np.array([4, 9]), np.arange(val.n_images)
    everyone = shard_nats(model, val, ids, settings)
    np.testing.assert_allclose(shard_nats(model, val, few, settings), everyone[few], rtol=1e-6)
    tokens, total = all_tokens(val), 0.0
    for seed in likelihood._seeds(5, 3):
        mask = draw_masks(seed, ids, 16, 0.3)
        with torch.no_grad():
            cost = -model(tokens, mask).double().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        total = total + (cost * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(everyone, (total / 3).numpy(), rtol=1e-5)
    assert not np.allclose(shard_nats(model, val, ids, LikelihoodSettings(seed=6, mask_prob=0.3, mask_draws=3)), everyone)


def test_draws_of_neighbouring_seeds_have_no_mask_in_common():
    seeds = [seed for start in range(4) for seed in likelihood._seeds(start, 5)]
    assert len(set(seeds)) == 20


def test_bfloat16_is_near(speaking, val):
    ids = np.arange(val.n_images)
    exact, near = (shard_nats(speaking(), val, ids, LikelihoodSettings(precision=precision)) for precision in ("fp32", "bf16"))
    assert 0 < np.abs(exact - near).max() < 0.05


def test_pixel_nats_sum_to_image_nats(speaking, val):
    model, tokens = speaking(), all_tokens(val)
    pixels = pixel_nats(model, tokens)
    assert pixels.shape == (val.n_images, 16)
    with torch.no_grad():
        np.testing.assert_allclose(pixels.mean(1), image_nats(model(tokens), tokens).numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"objective 'bert' gives an image no likelihood pixel by pixel"):
        pixel_nats(speaking("bert"), tokens)


def test_a_broken_model_is_named(speaking, val):
    model = speaking()
    with torch.no_grad():
        model.wpe[3] = float("nan")
    with pytest.raises(ValueError, match=r"likelihood of image 7 of .*shards is not finite; check the model, or use fp32"):
        shard_nats(model, val, np.array([7, 8]), LikelihoodSettings())


def test_summary():
    nats = np.array([1.0, 2.0, 4.0, 5.0])
    found = summarise(nats)
    error = nats.std(ddof=1) / 2
    for unit, scale in {"nats_per_token": 1, "bits_per_token": 1 / math.log(2), "bits_per_sub_pixel": 1 / math.log(8)}.items():
        assert getattr(found, unit) == MeanWithError(pytest.approx(3 * scale), pytest.approx(error * scale))
    assert summarise(nats[:1]).nats_per_token == MeanWithError(1.0, None)


def test_limits_spread_over_the_split():
    assert choose_ids(10, None).tolist() == list(range(10))
    assert choose_ids(10, 99).tolist() == list(range(10))
    assert choose_ids(10, 4).tolist() == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="--limit 0 must be at least 1"):
        choose_ids(10, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "--batch 0 must be at least 1"),
        ({"mask_draws": 0}, "--mask_draws 0 must be at least 1"),
        ({"seed": -1}, r"--seed -1 must lie between 0 and 2\^63 - 1"),
        ({"seed": 2**63}, "--seed 9223372036854775808 must lie"),
        ({"mask_prob": 1.0}, "--mask_prob 1.0 must lie between 0 and 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LikelihoodSettings(**settings)


# ------------------------------------------------------------------------------------------------ published numbers


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Shards of a toy ImageNet or of arrays like the released ones, with a palette of the test's own in OpenAI's place."""
    random = np.random.default_rng(0)
    for split, name in (("train", "a"), ("train", "b"), ("val", "c"), ("val", "d")):
        file = tmp_path / "ilsvrc" / split / "n01440764" / f"{name}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file)
    palette = Palette(random.uniform(-1, 1, (512, 3)).astype(np.float32))
    for part, n in (("tr", 1), ("te", 2)):
        np.save(tmp_path / f"imagenet_{part}X.npy", random.integers(0, 512, (n, 1024)))
    for module in (likelihood, openai_arrays):
        monkeypatch.setattr(module, "OPENAI_PALETTE_HASH", palette.hash)
    monkeypatch.setattr(likelihood, "N_TEST", 2)

    def make(n_px=32, crop="center", source=f"imagenet:{tmp_path / 'ilsvrc'}"):
        path = tmp_path / f"shards_{len(list(tmp_path.glob('shards_*')))}"
        write_dataset(path, open_source(source, "ignore"), palette, ShardOptions(n_px, crop=crop, val_fraction=0.0))
        return path

    return make


def test_published_numbers_stand_beside_the_released_arrays(imagenet, tmp_path):
    released = ShardSet(imagenet(crop="none", source=f"openai:{tmp_path}"), "test")
    for size, nats in (("S", 2.0895), ("M", 2.0614), ("L", 2.0466)):
        config = RECIPES[f"igpt_{size.lower()}_ar_32"].model
        assert compare_published(config, "ar", released, 2) == (size, [])
        assert FIGURE_3_NATS[size] == nats
    (tmp_path / "imagenet_teX.npy").rename(tmp_path / "cifar10_teX.npy")
    source = f"openai:{tmp_path / 'cifar10'}"
    (tmp_path / "imagenet_trX.npy").unlink()
    other = ShardSet(imagenet(crop="none", source=source), "test")
    words = [f"the images come from {source}, not from ImageNet", "the crop is 'none', not 'center'"]
    assert compare_published(config, "ar", other, 2) == (None, words)


def test_each_condition_that_fails_is_said(imagenet, monkeypatch, tmp_path):
    s, path = RECIPES["igpt_s_ar_32"].model, imagenet()
    test = ShardSet(path, "test")
    other = ModelConfig(n_layer=24, n_head=16, n_embd=512)
    large = RECIPES["igpt_l_ar_48"].model
    resized = (
        "the filter is 'bicubic', and that of the published arrays is not known (make_shards.py --source openai: reads them)"
    )
    for config, objective, shards, n_images, words in (
        (s, "bert", test, 2, ["the objective is 'bert', not 'ar'", resized]),
        (other, "ar", test, 2, ["24 layers, 16 heads, width 512 are none of S, M, L", resized]),
        (large, "ar", ShardSet(imagenet(48), "test"), 2, ["n_px is 48, not 32", resized]),
        (s, "ar", ShardSet(path, "train"), 2, ["the split is 'train', not 'test'", resized]),
        (s, "ar", ShardSet(imagenet(crop="none"), "test"), 2, ["the crop is 'none', not 'center'", resized]),
        (s, "ar", ShardSet(imagenet(crop="random"), "test"), 2, [resized]),
        (s, "ar", test, 1, [resized, "measured on 1 of 2 images"]),
    ):
        assert compare_published(config, objective, shards, n_images) == (None, words)
    folder = f"imagefolder:{tmp_path / 'ilsvrc' / 'val'}"
    train = ShardSet(imagenet(source=folder), "train")
    words = [f"the images come from {folder}, not from ImageNet", "the split is 'train', not 'test'", resized]
    assert compare_published(s, "ar", train, 2) == (None, words)
    for name, value in (("filter", None), ("crop", None)):  # as an index of an earlier version
        write_index(path, replace(read_index(path), **{name: value}))
    unknown = ["the crop is 'unknown', not 'center'", resized.replace("bicubic", "unknown")]
    assert compare_published(s, "ar", test, 2) == (None, unknown)
    monkeypatch.setattr(likelihood, "OPENAI_PALETTE_HASH", "0")
    monkeypatch.setattr(likelihood, "N_TEST", 50_000)
    palette = f"the palette is {test.palette.name}, not OpenAI's"
    assert compare_published(s, "ar", test, 2) == (None, [palette, *unknown, "the split has 2 images, not 50,000"])


def test_a_broken_model_costs_no_pixel_anything(speaking, val):
    broken = speaking("ar")
    with torch.no_grad():
        broken.ln_f.weight[0] = float("inf")
    with pytest.raises(ValueError, match="the likelihood of a pixel is not finite; check the model's weights"):
        pixel_nats(broken, torch.from_numpy(val.tokens(np.arange(2)).reshape(2, -1).astype(np.int64)))


# ------------------------------------------------------------------------------------------------ real launches


@pytest.mark.slow
def test_damage_that_one_rank_meets_is_one_line(launch, free_port, speaking, tiny_dataset, val, tmp_path):
    model = speaking("ar")
    info = {"config": model.config, "objective": "ar", "palette_hash": val.palette_hash, "step": 7, "images_seen": 56}
    save_model(tmp_path / "model", model.state_dict(), info, tiny_dataset / "palette.npy")
    shutil.copytree(tiny_dataset, tmp_path / "shards")
    (shard,) = (tmp_path / "shards").glob("val-*.tar")
    with open(shard, "r+b") as file:  # the last image, which the second rank reads
        file.seek(-(1024 + 512 + 40), 2)
        file.write(b"\xff" * 600)
    words = ["tools/evaluate.py", "--model", tmp_path / "model", "--data", tmp_path / "shards", "--batch", 6]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master_port", free_port, "--nproc_per_node", 2]
    done = launch([*launcher, *words])
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "evaluate.py: error: " in line]
    assert "damaged" in line
    assert "evaluate/likelihood.py" not in done.stderr  # no traceback of ours, only the launcher's own


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "batch", "launchers"), [("ar", 7, ("torchrun", "deepspeed")), ("bert", 30, ("torchrun",))])
def test_ranks_change_no_bit(launch, free_port, speaking, tiny_dataset, val, tmp_path, objective, batch, launchers):
    """The whole result file is the same from plain Python and from launchers, also where there are fewer batches than ranks."""
    model = speaking(objective)
    info = {"config": model.config, "objective": objective, "palette_hash": val.palette_hash, "step": 7, "images_seen": 56}
    save_model(tmp_path / "model", model.state_dict(), info, tiny_dataset / "palette.npy")
    words = ["tools/evaluate.py", "--model", tmp_path / "model", "--data", tiny_dataset, "--split", "train"]
    written = []
    for launcher in (None, *launchers):
        out = tmp_path / f"{launcher}.json"
        masks = ["--mask_draws", "2"] if objective == "bert" else []
        command = [*words, *masks, "--batch", batch, "--out", out]
        if launcher == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--master_port", free_port, "--nproc_per_node", 3, *command]
        done = launch(command, ranks=2 if launcher == "deepspeed" else None, by="deepspeed")
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("bits per sub-pixel") == 1
        written.append(out.read_bytes())
    assert set(written) == {written[0]}
    found = json.loads(written[0])
    assert found["nats_per_token"]["mean"] != pytest.approx(math.log(8), abs=1e-3)
    assert found["n_images"] == val.n_images


def test_the_page_quotes_the_published_numbers():
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    s, m, large = FIGURE_3_NATS.values()
    assert f"published {s}, {m} and {large} nats per token for S, M and L" in page.replace("\n", " ")
    assert f"more than the {m - large:.3f} that lie between M and L" in page.replace("\n", " ")
