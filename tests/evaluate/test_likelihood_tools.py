"""tools/evaluate.py and tools/sample.py as a user runs them; bad input is one line and exit status 2."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_ds.data.grids import BACKGROUND
from igpt_ds.data.images import square
from igpt_ds.data.palette import Palette, load_palette
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.likelihood import Likelihood, LikelihoodSettings, shard_nats, summarise
from igpt_ds.evaluate.report.results import read_results
from igpt_ds.model.sampling import Filter, sample
from igpt_ds.model.store import fresh_model, load_model, save_model

TOOLS = Path(__file__).parents[2] / "tools"
BAR, LINE = 1, 16  # screen pixels between the images of a grid of scale 1, and of a line of captions


@pytest.fixture(scope="module")
def make_speaking(tmp_path_factory, tiny_config, tiny_dataset):
    """make_speaking(objective="ar", ...) -> a model dir whose model prefers some colours."""

    def make(objective="ar", **changes):
        model = fresh_model(tiny_config, seed=1, objective=objective)
        with torch.no_grad():
            model.head.weight.normal_(generator=torch.Generator().manual_seed(2))
        info = {"config": model.config, "objective": objective, "palette_hash": ShardSet(tiny_dataset, "val").palette_hash}
        path = tmp_path_factory.mktemp("speaking") / "model"
        save_model(path, model.state_dict(), info | {"step": 7, "images_seen": 56} | changes, tiny_dataset / "palette.npy")
        return path

    return make


@pytest.fixture(scope="module")
def speaking_dir(make_speaking):
    return make_speaking()


def cells(path, columns, captioned=(), n_px=4):
    """The images of a grid PNG of scale 1: uint8 [rows, columns, n_px, n_px, 3]. Left of them are the labels of the rows."""
    canvas = np.asarray(Image.open(path).convert("RGB"))
    left, top, rows = canvas.shape[1] - columns * (n_px + BAR), BAR, []
    while top < len(canvas):
        places = [left + column * (n_px + BAR) for column in range(columns)]
        rows.append([canvas[top : top + n_px, place : place + n_px] for place in places])
        assert (canvas[top : top + n_px, : left - BAR] < BACKGROUND).any()  # a label
        top += n_px + BAR + LINE * (len(rows) - 1 in captioned)
    return np.array(rows)


# ------------------------------------------------------------------------------------------------ evaluate.py


def test_evaluate_prints_and_writes(tool, speaking_dir, tiny_dataset, tmp_path):
    out = tmp_path / "likelihood.json"
    status, said, _ = tool("evaluate", "--model", speaking_dir, "--data", tiny_dataset, "--limit", 6, "--batch", 4, "--out", out)
    assert status == 0
    model, info = load_model(speaking_dir)
    val = ShardSet(tiny_dataset, "val")
    measured = summarise(shard_nats(model, val, np.arange(6) * val.n_images // 6, LikelihoodSettings(batch=4)))
    found = json.loads(out.read_text())
    expected = dataclasses.asdict(measured)
    assert {unit: found[unit] for unit in expected} == expected
    assert (found["model_hash"], found["dataset_hash"], found["split"]) == (info.model_hash, val.dataset_hash, "val")
    assert (found["n_images"], found["masks"], found["published"]) == (6, None, None)
    assert len(found["published_does_not_apply"]) == 9
    nats = expected["nats_per_token"]
    assert f"nats per token     {nats['mean']:.4f} +- {nats['standard_error']:.4f}\n" in said
    assert f"bits per sub-pixel {nats['mean'] / math.log(8):.4f} +- " in said
    assert "(step 7)" in said
    last = said.splitlines()[-1]
    assert last.startswith(
        "published: 2.0895 / 2.0614 / 2.0466 nats per token for S / M / L do not apply: "
        "2 layers, 2 heads, width 16 are none of S, M, L; n_px is 4, not 32; "
    )
    assert "; the filter is 'bicubic', and" in last


def test_the_published_nats_stand_beside_those_measured(capsys):
    about = dict.fromkeys(field.name for field in dataclasses.fields(Likelihood))
    found = Likelihood(**about | {"objective": "ar", "summary": summarise(np.array([2.05, 2.06]))})
    runpy.run_path(str(TOOLS / "evaluate.py"))["print_published"](found, [], "L")
    assert capsys.readouterr().out == (
        "published: 2.0466 nats per token for iGPT-L after 1M steps (OpenAI's README); here +0.0084\n"
    )


def test_the_row_is_there_when_nobody_reads_the_output(speaking_dir, tiny_dataset, tmp_path, monkeypatch):
    main = runpy.run_path(str(TOOLS / "evaluate.py"))["main"]
    monkeypatch.setattr("builtins.print", Mock(side_effect=BrokenPipeError))  # evaluate.py ... | head -1
    files = [str(tmp_path / "results.jsonl"), str(tmp_path / "likelihood.json")]
    with pytest.raises(BrokenPipeError):
        main(
            ["--model", str(speaking_dir), "--data", str(tiny_dataset), "--limit", "2", "--results", files[0], "--out", files[1]]
        )
    assert len(read_results(Path(files[0]))) == 1
    assert Path(files[1]).exists()


def test_evaluate_bert(tool, make_speaking, tiny_dataset, tmp_path):
    model_dir, out = make_speaking("bert", mask_prob=0.4), tmp_path / "likelihood.json"
    words = ["--model", model_dir, "--data", tiny_dataset, "--mask_draws", 3, "--seed", 2, "--out", out]
    status, said, _ = tool("evaluate", *words)
    assert status == 0
    assert "11 images, 3 masks of 0.4, fp32" in said
    assert "published" not in said  # those are of auto-regressive models
    first = json.loads(out.read_text())
    assert first["masks"] == {"mask_draws": 3, "mask_prob": 0.4, "seed": 2}
    assert tool("evaluate", *words, "--mask_prob", 0.2)[0] == 0
    second = json.loads(out.read_text())
    assert second["masks"]["mask_prob"] == 0.2
    assert second["nats_per_token"] != first["nats_per_token"]


# ------------------------------------------------------------------------------------------------ sample.py


def test_grid_of_samples_and_completions(tool, speaking_dir, tiny_dataset, tmp_path):
    out = tmp_path / "samples.png"
    words = ["--model", speaking_dir, "--rows", 2, "--columns", 3, "--scale", 1, "--out", out, "--seed", 5, "--top_p", 0.9]
    given = ["--data", tiny_dataset, "--ids", 2, 7, 3, 0, "--prefix_rows", 3, "--completions", 2]
    status, said, _ = tool("sample", *words, *given, "--batch", 4)
    assert (status, said) == (0, f"{out}: 6 samples, 2 completions of 4 images\n")
    grid = cells(out, 3, captioned=(2, 6))
    assert grid.shape[:2] == (2 + 2 * 4, 3)
    palette, val = load_palette(speaking_dir / "palette.npy"), ShardSet(tiny_dataset, "val")
    model, _ = load_model(speaking_dir)

    def drawn(prefix):
        tokens = sample(model, prefix, torch.Generator().manual_seed(5), Filter(top_p=0.9))
        return palette.decode(tokens.numpy().reshape(-1, 4, 4))

    assert np.array_equal(grid[:2].reshape(6, 4, 4, 3), drawn(torch.zeros(6, 0, dtype=torch.int64)))
    tokens = val.tokens(np.array([2, 7, 3, 0]))
    completed = drawn(torch.from_numpy(tokens.reshape(4, 16)[:, :12].astype(np.int64)).repeat(2, 1)).reshape(2, 4, 4, 4, 3)
    originals = palette.decode(tokens)
    for band, column, number in ((2, 0, 0), (2, 2, 2), (6, 0, 3)):
        assert np.array_equal(grid[band, column], originals[number])
        assert np.array_equal(grid[band + 1, column, :3], originals[number, :3])
        assert (grid[band + 1, column, 3:] == 200).all()
        assert np.array_equal(grid[band + 2, column], completed[0, number])
        assert np.array_equal(grid[band + 3, column], completed[1, number])
        assert np.array_equal(grid[band + 3, column, :3], originals[number, :3])
    assert (grid[6:, 1:] == BACKGROUND).all()  # the fourth image has two empty places beside it


def test_drawing_flags_reach_their_place(tool, speaking_dir, tmp_path):
    words = ["--model", speaking_dir, "--rows", 1, "--columns", 6, "--scale", 1, "--device", "cpu"]
    made = {}
    for name, more in {
        "plain": [],
        "seed": ["--seed", 1],
        "cold": ["--temperature", 1e-4],
        "top_k": ["--top_k", 1],
        "top_p": ["--top_p", 1e-3],
        "bf16": ["--top_k", 1, "--precision", "bf16"],
    }.items():
        assert tool("sample", *words, *more, "--out", tmp_path / f"{name}.png")[0] == 0
        made[name] = cells(tmp_path / f"{name}.png", 6)[0]
    likeliest = made["top_k"]
    assert all(np.array_equal(likeliest[0], image) for name in ("top_k", "top_p", "cold", "bf16") for image in made[name])
    for name in ("plain", "seed"):
        assert len({image.tobytes() for image in made[name]}) > 1
    assert not np.array_equal(made["plain"], made["seed"])


def test_image_files_are_prepared_as_shards_are(tool, speaking_dir, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (23, 41, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    Image.fromarray(pixels[::-1].copy()).save(tmp_path / "two.jpg", quality=95)
    out, heat = tmp_path / "out.png", tmp_path / "heat.png"
    words = ["--rows", 0, "--columns", 2, "--scale", 1, "--images", tmp_path / "one.png", tmp_path / "two.jpg"]
    status, said, _ = tool("sample", "--model", speaking_dir, *words, "--out", out, "--heat_map", heat)
    assert status == 0
    palette = load_palette(speaking_dir / "palette.npy")
    assert np.array_equal(cells(out, 2, captioned=(0,))[0, 0], palette.decode(palette.encode(square(pixels, 4))))
    assert cells(out, 2, captioned=(0,)).shape[:2] == (4, 2)
    assert f"{heat}: 2 images, " in said
    assert heat.read_bytes().startswith(b"\x89PNG")


def test_heat_map_alone_says_the_likelihood(tool, speaking_dir, tiny_dataset, tmp_path):
    words = ["--model", speaking_dir, "--data", tiny_dataset, "--ids", 0, 4, 5, "--heat_map", tmp_path / "h.png"]
    status, said, _ = tool("sample", *words)
    model, _ = load_model(speaking_dir)
    nats = shard_nats(model, ShardSet(tiny_dataset, "val"), np.array([0, 4, 5]), LikelihoodSettings())
    assert (status, said) == (0, f"{tmp_path / 'h.png'}: 3 images, {nats.mean():.4f} nats per token\n")


def test_gif_ends_in_the_grid_and_begins_with_what_was_given(tool, speaking_dir, tiny_dataset, tmp_path):
    out, gif = tmp_path / "out.png", tmp_path / "out.gif"
    words = ["--model", speaking_dir, "--data", tiny_dataset, "--rows", 1, "--columns", 2, "--scale", 1, "--out", out]
    words += ["--ids", 0, 5, 9]  # the third has an empty place beside it
    status, said, _ = tool("sample", *words, "--gif", gif)
    assert status == 0
    assert f"{gif}: 2 samples and completions drawn" in said
    with Image.open(gif) as picture:
        assert picture.n_frames == 17  # of 65 those that differ: one for each pixel of the samples, and the first
        assert picture.info["loop"] == 0
        first = np.asarray(picture.convert("RGB")).astype(int)
        picture.seek(picture.n_frames - 1)
        last = np.asarray(picture.convert("RGB")).astype(int)
    drawn = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert np.abs(last - drawn).max() <= 8
    left, top = drawn.shape[1] - 10, 1 + 3 * 5 + LINE  # of the first completions
    assert np.abs(first[1:5, left : left + 4] - 200).max() <= 8
    assert np.abs(first[top : top + 2] - drawn[top : top + 2]).max() <= 8
    assert np.abs(first[top + 2 : top + 4, left : left + 4] - 200).max() <= 8
    assert np.abs(first[:, : left - 1] - drawn[:, : left - 1]).max() <= 8  # the labels of all frames
    assert np.abs(first[-4 * 5 :, left + 5 :] - BACKGROUND).max() <= 8  # no pixels come to an empty place


def test_the_palette_of_the_model_dir_is_checked(tool, make_speaking, tmp_path):
    model_dir = make_speaking()
    with open(model_dir / "palette.npy", "wb") as file:
        np.save(file, Palette(np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)).colors)
    status, _, said = tool("sample", "--model", model_dir, "--out", tmp_path / "out.png")
    assert status == 2
    assert f"{model_dir}/palette.npy is not the palette" in said


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("evaluate", ["--data", "SHARDS", "--split", "test"], "has no split 'test'; it has train, val"),
        ("evaluate", ["--data", "SHARDS", "--limit", 0], "--limit 0 must be at least 1"),
        ("evaluate", ["--data", "SHARDS", "--batch", 0], "--batch 0 must be at least 1"),
        ("evaluate", ["--data", "SHARDS", "--device", "cuda"], "torch sees no GPU"),
        ("evaluate", ["--model", "LARGER", "--data", "SHARDS"], "make shards with --n_px 5"),
        ("evaluate", ["--model", "OTHER", "--data", "SHARDS"], "palette 000000000000, "),
        ("evaluate", ["--data", "SHARDS", "--mask_prob", 0.5], "--mask_prob is for BERT models, and "),
        ("evaluate", ["--data", "SHARDS", "--seed", 1], "was trained with objective 'ar'; omit it"),
        (
            "evaluate",
            ["--model", "STRANGE", "--data", "SHARDS"],
            "palette.npy is not the palette that the model was trained with",
        ),
        ("sample", ["--out", "OUT", "--seed", 2**63], "--seed 9223372036854775808 must be below 2^63"),
        ("sample", [], "there is nothing to write"),
        ("sample", ["--out", "x.jpg"], "--out x.jpg has another suffix than its format; use .png"),
        ("sample", ["--gif", "x.png"], "--gif x.png has another suffix than its format; use .gif"),
        ("sample", ["--out", "OUT", "--rows", -1], "--rows -1 must be at least 0"),
        ("sample", ["--out", "OUT", "--columns", 0], "--columns 0 must be at least 1"),
        ("sample", ["--out", "OUT", "--data", "SHARDS", "--images", "x"], "--data and --images both give images"),
        ("sample", ["--out", "OUT", "--ids", 1], "--ids needs --data"),
        ("sample", ["--out", "OUT", "--rows", 0], "--rows 0 needs images; give --data or --images"),
        ("sample", ["--heat_map", "OUT"], "--heat_map needs images; give --data or --images"),
        ("sample", ["--out", "OUT", "--data", "SHARDS", "--ids", 11, 2], "--ids 11 not in "),
        ("sample", ["--out", "OUT", "--data", "SHARDS", "--columns", 12], "has 11 images; --columns 12 needs more"),
        ("sample", ["--out", "OUT", "--prefix_rows", 4], "--prefix_rows 4 must lie between 1 and 3"),
        ("sample", ["--out", "OUT", "--temperature", 0], "temperature=0.0 must be"),
        ("sample", ["--out", "OUT", "--images", "none.png"], "No such file or directory"),
        ("sample", ["--out", "OUT", "--images", "README.md"], "README.md cannot be read as an image"),
        ("sample", ["--model", "BERT", "--out", "OUT"], "was trained with objective 'bert', and this needs 'ar'"),
        ("sample", ["--model", "LARGER", "--data", "SHARDS", "--out", "OUT"], "does not fit the model"),
    ],
)
def test_bad_input(
    tool, make_speaking, make_model_dir, speaking_dir, tiny_dataset, tmp_path, monkeypatch, name, arguments, complaint
):
    monkeypatch.chdir(TOOLS.parent)
    real = {"SHARDS": tiny_dataset, "OUT": tmp_path / "out.png"}
    if "BERT" in arguments:
        real["BERT"] = make_speaking("bert")
    if "LARGER" in arguments:
        real["LARGER"] = make_model_dir(tmp_path / "larger", n_px=5)
    if "STRANGE" in arguments:
        real["STRANGE"] = make_speaking()
        np.save(real["STRANGE"] / "palette.npy", -load_palette(tiny_dataset / "palette.npy").colors)
    if "OTHER" in arguments:
        real["OTHER"] = make_model_dir(tmp_path / "other", palette_hash="0" * 64)
    model = [] if "--model" in arguments else ["--model", speaking_dir]
    status, _, said = tool(name, *model, *(real.get(word, word) for word in arguments))
    assert status == 2
    last = said.splitlines()[-1]
    assert last.startswith(f"{name}.py: error: ")
    assert complaint in last
    assert not (tmp_path / "out.png").exists()
