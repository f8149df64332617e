"""The class head: zero at first, on the layer asked for, beside a transformer that does not change; losses as in plain torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from igpt_ds.config import Finetune, ModelConfig
from igpt_ds.json_files import seal
from igpt_ds.model.classifier import CLASS_HEAD, Classifier, class_loss, total
from igpt_ds.model.objectives import draw_masks
from igpt_ds.model.store import load_classifier, load_model, read_info, save_model, verified_info

K = 3


def classifier(config: ModelConfig, layer: int | None = None, objective: str = "ar", head: float = 1.0) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(config, K, config.n_layer if layer is None else layer, objective=objective)
    with torch.no_grad():
        model.head.weight.normal_()
        model.class_head.weight.normal_(std=head) if head else None
    return model


@pytest.fixture
def images(tiny_config: ModelConfig) -> torch.Tensor:
    return torch.randint(tiny_config.n_vocab, (4, tiny_config.n_ctx), generator=torch.Generator().manual_seed(1))


def test_at_the_start_every_class_is_as_likely(tiny_config: ModelConfig, images: torch.Tensor) -> None:
    model = classifier(tiny_config, head=0.0)
    finetune = Finetune(K, 2, "")
    gen, clf, logits = class_loss(finetune, tiny_config, "ar", 0, 0.15)(model, images, torch.arange(4) % K, torch.arange(4))
    assert torch.equal(logits, torch.zeros(4, K))
    torch.testing.assert_close(clf, torch.full((4,), math.log(K)))
    assert gen is not None
    torch.testing.assert_close(total(finetune, gen, clf), gen + math.log(K))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_head_reads_the_mean_of_the_normed_layer(tiny_config: ModelConfig, images: torch.Tensor, layer: int, mode: str) -> None:
    model = classifier(tiny_config, layer)
    model.activation_checkpointing = mode
    normed = [n for _, n in model.residuals(images)][layer]
    expected = normed.mean(1) @ model.class_head.weight.T
    pixels, classes = model(images)
    torch.testing.assert_close(classes, expected)
    torch.testing.assert_close(pixels, super(Classifier, model).forward(images))
    nothing, alone = model(images, with_pixels=False)
    assert nothing is None
    torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("gen_scale", ["mean", "sum"])
def test_joint_loss_equals_plain_torch(tiny_config: ModelConfig, images: torch.Tensor, gen_scale: str) -> None:
    model, labels = classifier(tiny_config), torch.tensor([0, 1, 2, 1])
    finetune = Finetune(K, 2, "", gen_scale=gen_scale)
    gen, clf, _ = class_loss(finetune, tiny_config, "ar", 0, 0.15)(model, images, labels, torch.arange(4))
    pixels, classes = model(images)
    nats = -F.log_softmax(pixels, -1).gather(2, images[..., None])[..., 0]
    ours = total(finetune, gen, clf).mean()
    theirs = (nats.mean(1) if gen_scale == "mean" else nats.sum(1)).mean() + F.cross_entropy(classes, labels)
    torch.testing.assert_close(ours, theirs)


def test_bert_hides_the_same_pixels_for_both_losses(tiny_config: ModelConfig, images: torch.Tensor) -> None:
    model, labels, numbers = classifier(tiny_config, objective="bert"), torch.tensor([0, 1, 2, 1]), torch.arange(4)
    mask = draw_masks(5, numbers.numpy(), tiny_config.n_ctx, 0.3)
    pixels, classes = model(images, mask)
    nats = -F.log_softmax(pixels, -1).gather(2, images[..., None])[..., 0]
    gen_expected = (nats * mask).sum(1) / mask.sum(1)
    for loss in ("joint", "clf", "gen"):
        gen, clf, logits = class_loss(Finetune(K, 2, "", loss), tiny_config, "bert", 5, 0.3)(model, images, labels, numbers)
        torch.testing.assert_close(logits, classes)
        torch.testing.assert_close(clf, F.cross_entropy(classes, labels, reduction="none"))
        assert (gen is None) == (loss == "clf")
        if gen is not None:
            torch.testing.assert_close(gen, gen_expected)
    summed, _, _ = class_loss(Finetune(K, 2, "", gen_scale="sum"), tiny_config, "bert", 5, 0.3)(model, images, labels, numbers)
    assert summed is not None
    torch.testing.assert_close(summed, gen_expected * 0.3 * tiny_config.n_ctx)


def test_a_loss_alone_moves_its_own_weights(tiny_config: ModelConfig, images: torch.Tensor) -> None:
    for loss, still in (("clf", "head"), ("gen", "class_head")):
        model, finetune = classifier(tiny_config), Finetune(K, 2, "", loss)
        gen, clf, _ = class_loss(finetune, tiny_config, "ar", 0, 0.15)(
            model, images, torch.zeros(4, dtype=torch.long), torch.arange(4)
        )
        total(finetune, gen, clf).mean().backward()
        moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        assert {name for name, _ in model.named_parameters()} - moved == {f"{still}.weight"}


@pytest.fixture
def model_dir(tiny_config: ModelConfig, tmp_path: Path) -> Path:
    np.save(tmp_path / "palette.npy", np.zeros((8, 3), np.float32))
    head = {"class_head": {"classes": ["a", "b", "c"], "layer": 1}}
    info = {"config": tiny_config, "objective": "ar", "palette_hash": "abc", "step": 7, "images_seen": 70}
    save_model(tmp_path / "model", classifier(tiny_config, 1).state_dict(), info | head, tmp_path / "palette.npy")
    return tmp_path / "model"


def test_a_model_dir_keeps_the_head_in_a_file_of_its_own(model_dir: Path, tiny_config: ModelConfig, images: torch.Tensor) -> None:
    model = classifier(tiny_config, 1)
    loaded, info = load_classifier(model_dir)
    for one, other in zip(loaded(images), model(images), strict=True):
        assert torch.equal(one, other)
    assert info.class_head is not None
    assert (info.class_head.classes, loaded.layer) == (["a", "b", "c"], 1)
    plain, _ = load_model(model_dir)  # a reader of transformers sees none of it
    assert CLASS_HEAD not in plain.state_dict()
    assert torch.equal(plain(images), model(images)[0])
    assert verified_info(model_dir) == read_info(model_dir) == info


def test_a_changed_or_missing_head_is_refused(model_dir: Path) -> None:
    path = model_dir / "class_head.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"class_head.safetensors is not the file that config.json describes"):
        load_classifier(model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(seal(config | {"class_head": None})))
    with pytest.raises(ValueError, match=r"has no class head; fine-tune it with finetune.py first"):
        load_classifier(model_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "gan"}, "loss='gan' is unknown; known: joint, clf, gen"),
        ({"gen_scale": "max"}, "gen_scale='max' is unknown; known: mean, sum"),
        ({"n_classes": 1}, "n_classes=1 must be at least 2; fine-tuning needs labelled shards"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Finetune(**({"n_classes": 3, "layer": 1, "start": ""} | changes))  # type: ignore[arg-type]
