"""Extraction: by parts, after a kill, layer by layer from the file, in half precision, through masks; and what is refused."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.layout import Part
from igpt_ds.evaluate.features.extract import Extraction, extract
from igpt_ds.evaluate.features.files import open_features, part_dir
from igpt_ds.evaluate.features.manifest import FeatureManifest
from igpt_ds.evaluate.features.merge import merge_parts
from igpt_ds.evaluate.features.network import Network, open_model
from igpt_ds.json_files import seal
from igpt_ds.model.objectives import draw_masks
from igpt_ds.model.store import load_model


def same_bytes(one, other):
    """Both directories hold the same files with the same bytes."""
    files = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    assert files == sorted(str(file.relative_to(other)) for file in other.rglob("*") if file.is_file())
    match, different, missing = filecmp.cmpfiles(one, other, files, shallow=False)
    assert (sorted(match), different, missing) == (files, [], [])


@pytest.fixture
def bert_dir(tmp_path, make_model_dir):
    return make_model_dir(tmp_path / "bert", objective="bert", mask_prob=0.3)


def test_parts_merge_to_the_bytes_of_one_process(model_dir, both_splits, features_dir, tmp_path):
    out = tmp_path / "features"
    for i in (2, 0, 1):  # in any order; 37 and 11 images in steps of 4
        model, origin = open_model(model_dir, both_splits[0])
        extract(out, both_splits, Network(model, batch=4), origin, Extraction(part=Part(i, 3)))
    assert not out.exists()
    with pytest.raises(ValueError, match=r"part-0-of-3 is a part of features; merge the parts with .*--merge"):
        open_features(part_dir(out, Part(0, 3)), "train")
    manifest = merge_parts(out, 3)
    assert manifest.splits["train"].n_images == 37
    model, origin = open_model(model_dir, both_splits[0])
    extract(tmp_path / "whole", both_splits, Network(model, batch=4), origin)
    same_bytes(out, tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "whole"], "the parts are gone"
    np.testing.assert_allclose(
        open_features(out, "val").layer(2, "raw"), open_features(features_dir, "val").layer(2, "raw"), atol=1e-6
    )


def test_rows_have_the_keys_of_their_images(features_dir, both_splits, tmp_path):
    for shards in both_splits:
        keys = open_features(features_dir, shards.split).keys
        assert list(keys) == shards.keys_of(np.arange(shards.n_images))
        assert len(set(keys)) == shards.n_images
    damaged = shutil.copytree(features_dir, tmp_path / "damaged")
    (damaged / "val" / "keys.jsonl").write_text("")
    features = open_features(damaged, "val")  # keys are read when they are wanted
    with pytest.raises(ValueError, match=r"val/keys\.jsonl is missing or damaged"):
        features.keys[0]
    manifest = json.loads((damaged / "manifest.json").read_text())
    del manifest["files"]["val/keys.jsonl"]
    (damaged / "manifest.json").write_text(json.dumps(seal(manifest)))
    assert open_features(damaged, "val").keys is None, "as in directories of older versions"


def test_parts_that_do_not_make_a_whole(model_dir, both_splits, tmp_path):
    model, origin = open_model(model_dir, both_splits[0])
    out = tmp_path / "f"
    extract(out, both_splits, Network(model, batch=4), origin, Extraction(part=Part(0, 2)))
    with pytest.raises(ValueError, match=r"part .*f\.part-1-of-2 does not exist; extract it with --part"):
        merge_parts(out, 2)
    part_dir(out, Part(1, 2)).with_name("f.part-1-of-2.partial").mkdir()
    with pytest.raises(ValueError, match=r"part .*f\.part-1-of-2 is not finished"):
        merge_parts(out, 2)
    extract(out, both_splits, Network(model, batch=4), origin, Extraction(part=Part(1, 2), kinds=["raw"]))
    with pytest.raises(
        ValueError, match=r"f\.part-1-of-2 and .*f\.part-0-of-2 are not parts of the same features: kinds differs"
    ):
        merge_parts(out, 2)
    manifest = json.loads((out.with_name("f.part-1-of-2") / "manifest.json").read_text())
    (out.with_name("f.part-1-of-2") / "manifest.json").write_text(json.dumps(seal(manifest | {"version": 1})))
    with pytest.raises(ValueError, match=r"manifest\.json is not igpt_ds\.features\.part version 2 or 3: it is version 1"):
        merge_parts(out, 2)
    other = tmp_path / "g"
    extract(other, both_splits, Network(model, batch=4), origin, Extraction(part=Part(0, 2)))
    extract(other, both_splits, Network(model, batch=3), origin, Extraction(part=Part(1, 2)))
    with pytest.raises(ValueError, match=r"the share of images differs"):
        merge_parts(other, 2)
    with pytest.raises(ValueError, match=r"part 2/2 does not exist; the first of n is 0/n"):
        extract(other, both_splits, Network(model, batch=4), origin, Extraction(part=Part(2, 2)))
    with pytest.raises(ValueError, match=r"11 images of val are 3 steps of 4, not 4; use fewer parts"):
        extract(other, both_splits, Network(model, batch=4), origin, Extraction(part=Part(0, 4)))


KILLED = """
import os, signal, sys
from pathlib import Path
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.features import extract
from igpt_ds.evaluate.features.network import Network, open_model

class Mortal(Network):
    calls = 0
    def pooled(self, *args):
        Mortal.calls += 1
        if Mortal.calls == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pooled(*args)

extract._SAVE_SECONDS = 0.0
model_dir, data, out = map(Path, sys.argv[1:])
shard_sets = [ShardSet(data, split) for split in ("train", "val")]
model, origin = open_model(model_dir, shard_sets[0])
extract.extract(out, shard_sets, Mortal(model, batch=4), origin)
"""


def test_a_killed_run_goes_on_where_it_was(model_dir, tiny_dataset, both_splits, tmp_path):
    out = tmp_path / "features"
    killed = subprocess.run([sys.executable, "-c", KILLED, model_dir, tiny_dataset, out], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    partial = tmp_path / "features.partial"
    assert json.loads((partial / "progress.json").read_text())["done"] == {"train": 28, "val": 0}
    torn = np.load(partial / "train" / "layer_01_raw.npy", mmap_mode="r+")
    torn[28:31] = np.nan  # rows that were on their way when it died, and are not among those done
    torn.flush()
    model, origin = open_model(model_dir, both_splits[0])
    with pytest.raises(
        ValueError, match=r"features\.partial holds the beginning of other features: kinds is .*; finish those, or remove .*"
    ):
        extract(out, both_splits, Network(model, batch=4), origin, Extraction(kinds=["raw"]))
    seen = []
    model.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    said = []
    extract(out, both_splits, Network(model, batch=4), origin, report=said.append)
    assert sum(seen) == 9 + 11 + 2 * 4, "9 images of train were left, 11 of val; the trial of one step came twice"
    assert said[1].endswith("28 images are finished already")
    extract(tmp_path / "whole", both_splits, Network(load_model(model_dir)[0], batch=4), origin)
    same_bytes(out, tmp_path / "whole")
    assert not partial.exists()


def test_a_run_killed_between_its_last_row_and_the_new_name(model_dir, both_splits, tmp_path, monkeypatch):
    model, origin = open_model(model_dir, both_splits[0])
    extract(tmp_path / "whole", both_splits, Network(model, batch=4), origin)
    out, write = tmp_path / "features", FeatureManifest.write

    def dies(manifest, directory):
        write(manifest, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureManifest, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        extract(out, both_splits, Network(model, batch=4), origin)
    monkeypatch.setattr(FeatureManifest, "write", write)
    assert (tmp_path / "features.partial" / "progress.json").exists()
    seen = []
    model.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    extract(out, both_splits, Network(model, batch=4), origin)
    assert not seen, "every row was there"
    same_bytes(out, tmp_path / "whole")


def test_a_writer_killed_before_its_first_row(model_dir, both_splits, tmp_path):
    (tmp_path / "f.partial" / "train").mkdir(parents=True)
    model, origin = open_model(model_dir, both_splits[0])
    extract(tmp_path / "f", both_splits, Network(model), origin)
    assert open_features(tmp_path / "f", "train").layers == [0, 1, 2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_from_the_file_equal_those_of_the_model(precision, model_dir, bert_dir, both_splits, tmp_path):
    for path, layers in ((model_dir, None), (model_dir, [1]), (bert_dir, [0, 2])):
        names = [tmp_path / f"{path.name}-{how}-{layers}" for how in ("whole", "streamed")]
        whole, origin = open_model(path, both_splits[0])
        extract(names[0], both_splits, Network(whole, "cpu", precision, batch=4), origin, Extraction(layers=layers))
        hollow, origin = open_model(path, both_splits[0], blocks_elsewhere=True)
        assert all(parameter.is_meta for parameter in hollow.blocks.parameters())
        network = Network(hollow, "cpu", precision, path / "model.safetensors", batch=4)
        extract(names[1], both_splits, network, origin, Extraction(layers=layers, at_once=12))
        same_bytes(*names)
        assert all(parameter.is_meta for parameter in hollow.blocks.parameters())


MEMORY = """
import os, resource, sys
import numpy as np
import torch
from pathlib import Path
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.features.network import Network, open_model

torch.set_num_threads(1)
shards = ShardSet(Path(sys.argv[1]), "train")
for path in map(Path, sys.argv[2:]):
    model, _ = open_model(path, shards, blocks_elsewhere=True)
    network = Network(model, blocks=path / "model.safetensors")
    network.pooled(shards.tokens(np.arange(4)), [model.config.n_layer], ["raw"])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_of_layers_from_the_file_does_not_grow_with_them(launch, make_model_dir, tiny_dataset, tmp_path):
    """A block of width 256 is 3 MiB: 24 more blocks are 72 MiB."""
    paths = [make_model_dir(tmp_path / str(n_layer), n_layer=n_layer, n_embd=256) for n_layer in (2, 26)]
    (tmp_path / "program.py").write_text(MEMORY)
    done = launch([tmp_path / "program.py", tiny_dataset, *paths], by="python")  # the peak of a fork would be its parent's
    assert done.returncode == 0, done.stderr
    few, many = map(float, done.stdout.split())
    assert many < few + 12, f"{few} and {many} MiB"


def test_half_precision_on_disk(features_dir, model_dir, both_splits, tmp_path):
    model, origin = open_model(model_dir, both_splits[0])
    extract(tmp_path / "half", both_splits, Network(model, batch=7), origin, Extraction(dtype="fp16"))
    half, whole = open_features(tmp_path / "half", "train"), open_features(features_dir, "train")
    assert half.layer(1, "raw").dtype == np.float16
    assert np.array_equal(half.layer(1, "raw"), np.asarray(whole.layer(1, "raw")).astype(np.float16))
    with torch.no_grad():
        model.ln_f.weight.fill_(1e7)
    with pytest.raises(ValueError, match=r"layer 2 normed reaches .*e\+\d+, more than float16 holds; use --dtype fp32"):
        extract(tmp_path / "large", both_splits, Network(model), origin, Extraction(dtype="fp16"))
    assert not (tmp_path / "large.partial").exists()


def test_masks_of_a_bert_model(bert_dir, both_splits, tmp_path):
    model, origin = open_model(bert_dir, both_splits[0])
    extract(tmp_path / "f", both_splits, Network(model, batch=7), origin, Extraction(mask_draws=[1, 3], mask_seed=5))
    train, val = (open_features(tmp_path / "f", split) for split in ("train", "val"))
    assert (train.mask_draws, val.mask_draws) == (1, 3)
    assert (val.manifest.origin.mask_prob, val.manifest.origin.mask_seed) == (0.3, 5)
    shards = both_splits[1]
    ids = np.arange(shards.n_images)
    tokens = torch.from_numpy(shards.tokens(ids).reshape(len(ids), -1).astype(np.int64))
    means = []
    for draw in range(3):
        caught = []
        handle = model.blocks[1].register_forward_hook(lambda _, inputs, __, caught=caught: caught.append(inputs[0]))
        mask = draw_masks(5, ids + (draw << 40), 16, 0.3)
        with torch.inference_mode():
            model(tokens, mask)
        handle.remove()
        means.append(caught[0].mean(1).numpy())
        np.testing.assert_allclose(val.layer(1, "raw", draw), means[-1], atol=1e-5)
    assert not np.allclose(means[0], means[1])
    with pytest.raises(ValueError, match=r"mask 3 does not exist; split 'val' of .*f has 3 mask draws"):
        val.layer(1, "raw", 3)


def test_a_bert_model_sees_masked_images_by_default(bert_dir, both_splits, tmp_path, tool, tiny_dataset):
    """Paper 4.6: one mask for images to fit on, five for images to evaluate on."""
    model, origin = open_model(bert_dir, both_splits[0])
    extract(tmp_path / "f", both_splits, Network(model, batch=7), origin, Extraction(layers=[1], kinds=["raw"]))
    train, val = (open_features(tmp_path / "f", split) for split in ("train", "val"))
    assert (train.mask_draws, val.mask_draws, val.manifest.origin.mask_prob) == (1, 5, 0.3)
    asked = ["--model", bert_dir, "--data", tiny_dataset, "--layers", 1, "--kinds", "raw"]
    said = tool("extract_features", *asked, "--out", tmp_path / "same")[1]
    assert "masks of each image: train 1, val 5, " in said
    assert np.array_equal(open_features(tmp_path / "same", "val").layer(1, "raw", 4), val.layer(1, "raw", 4))
    assert tool("extract_features", *asked, "--mask_draws", 0, "--out", tmp_path / "whole")[0] == 0
    whole = open_features(tmp_path / "whole", "val")
    assert (whole.mask_draws, whole.manifest.origin.mask_prob) == (0, None)
    assert not np.allclose(whole.layer(1, "raw"), val.layer(1, "raw", 0))


def test_masks_that_make_no_sense(model_dir, bert_dir, both_splits, tmp_path):
    model, origin = open_model(model_dir, both_splits[0])
    with pytest.raises(ValueError, match=r"--mask_draws 2: this model is 'ar'; only bert models see masked images"):
        extract(tmp_path / "f", both_splits, Network(model), origin, Extraction(mask_draws=[2]))
    bert, origin = open_model(bert_dir, both_splits[0])
    for wrong in ([1, 2, 3], [-1]):
        with pytest.raises(ValueError, match=rf"--mask_draws {wrong[0]}.* must be one number, or one for each split"):
            extract(tmp_path / "f", both_splits, Network(bert), origin, Extraction(mask_draws=wrong))


def test_a_changed_file_is_not_streamed(make_model_dir, both_splits, tmp_path):
    path = make_model_dir(tmp_path / "model")
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that config\.json describes"):
        open_model(path, both_splits[0], blocks_elsewhere=True)


def test_what_is_said_before_anything_is_written(model_dir, tiny_dataset, tmp_path):
    shard_sets = [ShardSet(tiny_dataset, "train")]
    model, origin = open_model(model_dir, shard_sets[0])
    said = []
    extract(tmp_path / "f", shard_sets, Network(model, batch=5), origin, Extraction([0, 2], ["raw"]), said.append)
    assert said[0] == f"{tmp_path}/f: 37 images, layers 0, 2, raw, 16 features, 0.0 MiB in fp32"
    assert f"{tmp_path}/f: about " in said[1]
    assert re.search(r"images/s, \d+ s$", said[1])
