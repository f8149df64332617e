"""A probe through HF: the hidden states of an exported model, behind sos, are our features, and a probe of them is the same."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "USE_TORCH_XLA": "0"}
from transformers import ImageGPTForCausalImageModeling

from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.probes.linear import ProbeSettings, linear_probe
from igpt_ds.model.interchange.hf import write_hf
from igpt_ds.model.store import load_model


@pytest.fixture(scope="module")
def hf(model_dir, both_splits, tmp_path_factory):
    """The exported model as HF's users load it."""
    model, info = load_model(model_dir)
    path = tmp_path_factory.mktemp("hf") / "exported"
    write_hf(path, info.config, model.state_dict(), both_splits[0].palette.colors)
    return ImageGPTForCausalImageModeling.from_pretrained(path).eval()


def hf_features(hf, shards, shift=True) -> dict[tuple[int, str], np.ndarray]:
    """Means over positions: HF's hidden state l enters block l, and its last one has been through ln_f."""
    tokens = torch.from_numpy(shards.tokens(np.arange(shards.n_images)).reshape(shards.n_images, -1).astype(np.int64))
    if shift:
        sos = torch.full((len(tokens), 1), hf.config.vocab_size - 1)
        tokens = torch.cat([sos, tokens[:, :-1]], dim=1)
    with torch.no_grad():
        states = hf(tokens, output_hidden_states=True).hidden_states
        blocks = hf.transformer.h
        assert len(states) == len(blocks) + 1
        found = {(layer, "raw"): states[layer].mean(1).numpy() for layer in range(len(blocks))}
        found |= {(layer, "normed"): block.ln_1(states[layer]).mean(1).numpy() for layer, block in enumerate(blocks)}
        return found | {(len(blocks), "normed"): states[-1].mean(1).numpy()}


def test_hidden_states_behind_sos_are_our_features(hf, features_dir, both_splits):
    for shards in both_splits:
        ours = open_features(features_dir, shards.split)
        for (layer, kind), theirs in hf_features(hf, shards).items():
            np.testing.assert_allclose(ours.layer(layer, kind), theirs, rtol=1e-4, atol=1e-5, err_msg=f"layer {layer} {kind}")


def test_without_the_shift_they_are_others(hf, features_dir, both_splits):
    """What HF's users get when they feed the pixels alone: each position has seen itself, and none has seen sos."""
    ours = open_features(features_dir, "train")
    for (layer, kind), theirs in hf_features(hf, both_splits[0], shift=False).items():
        assert np.abs(ours.layer(layer, kind) - theirs).max() > 1e-3, f"layer {layer} {kind}"


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_probe_of_hidden_states_is_our_probe(hf, features_dir, both_splits, made_features, layer):
    settings = ProbeSettings.of([0.01, 1.0, 100.0])
    ours = [open_features(features_dir, shards.split) for shards in both_splits]
    arrays = {
        features.split: (hf_features(hf, shards)[layer, "normed"], features.labels)
        for features, shards in zip(ours, both_splits, strict=True)
    }
    path = made_features(arrays, classes=len(ours[0].classes))
    expected = linear_probe(*ours, layer, "normed", settings)
    found = linear_probe(*(open_features(path, split) for split in arrays), 0, "normed", settings)
    assert (found.C, found.accuracy, found.held_out_accuracy) == (expected.C, expected.accuracy, expected.held_out_accuracy)
    assert found.objective == pytest.approx(expected.objective, rel=1e-5)
