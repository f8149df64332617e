"""HF's ImageGPT, an implementation that we did not write, computes our logits from our export, and we compute its logits."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

os.environ |= {"HF_HUB_OFFLINE": "1", "USE_TORCH_XLA": "0"}
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForImageClassification
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil
from transformers.utils import torch_float

from igpt_ds.config import SIZES, ModelConfig
from igpt_ds.data.images import square
from igpt_ds.data.palette import Palette, save_palette
from igpt_ds.model.interchange.hf import ImportedModel, read_hf, write_hf
from igpt_ds.model.store import load_model, read_info, save_model
from igpt_ds.model.transformer import Transformer

TOOLS = Path(__file__).parents[3] / "tools"
ODD = ModelConfig(n_layer=2, n_head=3, n_embd=24, n_px=5, n_vocab=7)
SHAPES = {
    "odd": ODD,
    "one pixel": ModelConfig(n_layer=1, n_head=1, n_embd=4, n_px=1, n_vocab=2),
    "tied": replace(ODD, tied_embeddings=True),
    "wide heads": ModelConfig(n_layer=3, n_head=2, n_embd=96, n_px=6, n_vocab=300),
    "S": ModelConfig(**SIZES["s"]),
}


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every weight drawn anew, on a scale that keeps logits near 1, gains around 1; HF's biases stay zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "ln_" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            elif not name.endswith(".bias"):
                weight.normal_(std=0.5 * weight.size(-1) ** -0.5, generator=generator)
    return module.eval()


def our_model(config: ModelConfig, objective: str = "ar") -> Transformer:
    model = randomise(Transformer(config, objective=objective), 1)
    assert isinstance(model, Transformer)
    return model


def hf_model(config: ModelConfig, **more: object) -> ImageGPTForCausalImageModeling:
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    foreign = ImageGPTConfig(**sizes, n_positions=config.n_ctx, vocab_size=config.n_vocab + 1, **more)
    return randomise(ImageGPTForCausalImageModeling(foreign), 2)


def some_tokens(config: ModelConfig) -> torch.Tensor:
    """Two images; of large ones only the first pixels, which is what causality allows."""
    tokens = torch.randint(0, config.n_vocab, (2, config.n_ctx), generator=torch.Generator().manual_seed(3))
    return tokens[:, :150]


def with_sos(tokens: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """[sos, x_0 .. x_{n-2}], what HF's user has to make."""
    return torch.cat([torch.full((len(tokens), 1), config.n_vocab), tokens[:, :-1]], dim=1)


def colors_of(config: ModelConfig) -> np.ndarray:
    colors = np.random.default_rng(4).uniform(-1, 1, (config.n_vocab, 3)).astype(np.float32)
    colors[0] = -1
    return colors


def rebuilt(foreign: ImportedModel) -> Transformer:
    model = Transformer(foreign.config, objective=foreign.objective)
    model.load_state_dict(foreign.weights, strict=True)
    return model.eval()


def loaded_by_hf(directory: Path) -> ImageGPTForCausalImageModeling:
    model, report = ImageGPTForCausalImageModeling.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    assert model.dtype == torch.float32
    return model


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """What HF itself writes for a random model of an odd shape, its processor included."""
    directory = tmp_path / "hf"
    hf_model(ODD).save_pretrained(directory)
    ImageGPTImageProcessorPil(clusters=colors_of(ODD).tolist(), size={"height": 5, "width": 5}).save_pretrained(directory)
    return directory


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    palette = Palette(colors_of(ODD))
    save_palette(tmp_path / "palette.npy", palette)
    info = {"config": ODD, "objective": "ar", "palette_hash": palette.hash, "step": 7, "images_seen": 70}
    save_model(tmp_path / "model", our_model(ODD).state_dict(), info, tmp_path / "palette.npy")
    return tmp_path / "model"


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Sets tensors of model.safetensors, `/` for the dots of the name; None takes one away."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | {name.replace("/", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


# --------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_hf_computes_our_logits_from_our_export(config: ModelConfig, tmp_path: Path) -> None:
    ours, tokens = our_model(config), some_tokens(config)
    write_hf(tmp_path / "hf", config, ours.state_dict(), colors_of(config))
    theirs = loaded_by_hf(tmp_path / "hf").eval()
    expected = ours(tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(theirs(with_sos(tokens, config)).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "upcast"),
    [("odd", False), ("odd", True), ("one pixel", False), ("wide heads", False), ("wide heads", True), ("S", False)],
)
@torch.no_grad()
def test_we_compute_hfs_logits_from_its_files(name: str, upcast: bool, tmp_path: Path) -> None:
    config = SHAPES[name]
    if not upcast and torch_float(2.5) != 2.5 and name in ("odd", "wide heads"):
        pytest.skip("this transformers (5.20.2 or older) rounds sqrt(head dim) down unless reorder_and_upcast_attn is set")
    theirs, tokens = hf_model(config, reorder_and_upcast_attn=upcast), some_tokens(config)
    theirs.save_pretrained(tmp_path)
    foreign = read_hf(tmp_path)
    assert (foreign.config, foreign.objective, foreign.colors) == (config, "ar", None)
    torch.testing.assert_close(rebuilt(foreign)(tokens), theirs(with_sos(tokens, config)).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_sos_hfs_logits_are_others(tmp_path: Path) -> None:
    """The trap of HF's processor, which returns pixels alone: each logit is then off by one position."""
    ours, tokens = our_model(ODD), some_tokens(ODD)
    write_hf(tmp_path / "hf", ODD, ours.state_dict(), colors_of(ODD))
    theirs = loaded_by_hf(tmp_path / "hf")
    assert (theirs(tokens).logits - ours(tokens)).abs().amax() > 0.1
    assert (theirs(tokens[:, :-1]).logits - ours(tokens)[:, 1:]).abs().amax() > 0.1


def test_our_export_has_the_recipes_dropout_and_without_it_stays_equal_in_train_mode(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", ODD, our_model(ODD).state_dict(), colors_of(ODD))
    theirs, tokens = loaded_by_hf(tmp_path / "hf"), some_tokens(ODD)
    assert torch.equal(theirs.train()(tokens).logits, theirs.eval()(tokens).logits)
    write_hf(tmp_path / "dropped", ODD, our_model(ODD).state_dict(), colors_of(ODD), dropout=0.3)
    found = loaded_by_hf(tmp_path / "dropped")
    assert [found.config.embd_pdrop, found.config.resid_pdrop, found.config.attn_pdrop] == [0.3, 0.3, 0.0]
    assert found.transformer.drop.p == found.transformer.h[0].attn.resid_dropout.p == found.transformer.h[0].mlp.dropout.p == 0.3


@pytest.mark.parametrize(("n_head", "asked"), [(8, True), (4, False), (2, True), (1, False)])
def test_the_export_asks_for_the_attention_that_every_version_scales_rightly(n_head: int, asked: bool, tmp_path: Path) -> None:
    """Old versions divide by int(sqrt(D)): right for head dimensions 4 and 16, wrong for 2 and 8."""
    config = ModelConfig(n_layer=1, n_head=n_head, n_embd=16, n_px=2, n_vocab=4)
    write_hf(tmp_path / "hf", config, our_model(config).state_dict(), colors_of(config))
    assert loaded_by_hf(tmp_path / "hf").config.reorder_and_upcast_attn is asked


def test_hfs_processor_gives_our_tokens(model_dir: Path, tool, tmp_path: Path) -> None:
    assert tool("export_hf", "--model", model_dir, "--out", tmp_path / "out")[0] == 0
    processor = ImageGPTImageProcessorPil.from_pretrained(tmp_path / "out")
    image = np.random.default_rng(5).integers(0, 256, (ODD.n_px, ODD.n_px, 3), dtype=np.uint8)
    tokens = processor(image, return_tensors="np")["input_ids"][0]
    assert tokens.tolist() == Palette(colors_of(ODD)).encode(image).ravel().tolist()


@pytest.mark.parametrize("size", [(90, 61), (50, 151)])
def test_hfs_processor_gives_our_tokens_of_an_image_that_the_documented_lines_crop(size, model_dir, tool, tmp_path) -> None:
    assert tool("export_hf", "--model", model_dir, "--out", tmp_path / "out")[0] == 0
    processor, n = ImageGPTImageProcessorPil.from_pretrained(tmp_path / "out"), ODD.n_px
    small = np.random.default_rng(6).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    ours = Palette(colors_of(ODD)).encode(square(np.asarray(image), n)).ravel()
    squashed = np.ravel(processor(image, return_tensors="np")["input_ids"])
    page = (Path(__file__).parents[3] / "docs" / "interchange.md").read_text()
    names = {"n": n, "image": image, "Image": Image}
    lines = [line for line in page.splitlines() if line.startswith(("w, h = ", "image = image."))]
    exec("\n".join(lines), names)
    cropped = np.ravel(processor(names["image"], return_tensors="np")["input_ids"])
    assert len(lines) == 3
    assert (squashed != ours).mean() > 0.1
    assert (cropped != ours).sum() <= 1, "the two bicubic filters round a few colours differently"


# --------------------------------------------------------------------------------------------------- the two tools


def test_round_trip_is_the_same_model(model_dir: Path, tool, tmp_path: Path) -> None:
    status, said, _ = tool("export_hf", "--model", model_dir, "--out", tmp_path / "out")
    crop = "crop images to 5x5 before HF's processor, which squashes them: three lines in tools/export_hf.py --help\n"
    assert (status, said) == (0, f"{tmp_path / 'out'}: vocab_size 8; start every image with token 7 (sos)\n{crop}")
    status, said, _ = tool("import_hf", "--hf", tmp_path / "out", "--out", tmp_path / "again")
    before, after = read_info(model_dir), read_info(tmp_path / "again")
    assert status == 0
    assert after.model_hash[:16] in said
    assert "palette" in said
    assert (after.model_hash, after.palette_hash, after.config) == (before.model_hash, before.palette_hash, before.config)
    assert (after.objective, after.step, after.images_seen) == ("ar", 0, 0)
    assert (tmp_path / "again" / "palette.npy").read_bytes() == (model_dir / "palette.npy").read_bytes()
    for one, other in zip(load_model(model_dir)[0].parameters(), load_model(tmp_path / "again")[0].parameters(), strict=True):
        assert torch.equal(one, other)
    source = json.loads((tmp_path / "again" / "config.json").read_text())["source"]
    assert list(source) == ["model.safetensors"]


def test_a_palette_can_be_given_where_the_directory_has_none(hf_dir: Path, tool, tmp_path: Path) -> None:
    (hf_dir / "preprocessor_config.json").unlink()
    palette = tmp_path / "p.npy"
    save_palette(palette, Palette(colors_of(ODD)))
    command = ["import_hf", "--hf", hf_dir, "--out", tmp_path / "model"]
    status, _, error = tool(*command)
    assert (status, error.count("\n")) == (2, 1)
    assert "preprocessor_config.json has no 'clusters'" in error
    assert tool(*command, "--palette", palette)[0] == 0
    assert load_model(tmp_path / "model")[1].palette_hash == Palette(colors_of(ODD)).hash
    save_palette(palette, Palette(colors_of(ODD)[:6]))
    assert f"--palette {palette} has 6 colours; the model in {hf_dir} has 7" in tool(*command, "--palette", palette)[2]


def test_the_wrong_palette_is_refused(hf_dir: Path, model_dir: Path, tool, tmp_path: Path) -> None:
    other = tmp_path / "other.npy"
    save_palette(other, Palette(-colors_of(ODD)))
    status, _, error = tool("import_hf", "--hf", hf_dir, "--palette", other, "--out", tmp_path / "new")
    assert (status, error.count("\n")) == (2, 1)
    assert f"--palette {other} differs from the palette in {hf_dir / 'preprocessor_config.json'}" in error
    (model_dir / "palette.npy").write_bytes(other.read_bytes())
    status, _, error = tool("export_hf", "--model", model_dir, "--out", tmp_path / "new")
    assert (status, error.count("\n")) == (2, 1)
    assert f"{model_dir / 'palette.npy'} is not the palette that the model was trained with" in error
    assert not (tmp_path / "new").exists()


def test_a_bert_model_cannot_be_exported(tool, tmp_path: Path) -> None:
    palette, weights = Palette(colors_of(ODD)), our_model(ODD, "bert").state_dict()
    save_palette(tmp_path / "palette.npy", palette)
    info = {"config": ODD, "objective": "bert", "palette_hash": palette.hash, "step": 7, "images_seen": 70}
    save_model(tmp_path / "model", weights, info, tmp_path / "palette.npy")
    status, _, error = tool("export_hf", "--model", tmp_path / "model", "--out", tmp_path / "hf")
    assert (status, error.count("\n")) == (2, 1)
    assert f"{tmp_path / 'model'} has objective 'bert'; HF's ImageGPT is auto-regressive only" in error
    with pytest.raises(ValueError, match=r"a BERT model has no sos .*cannot represent it"):
        write_hf(tmp_path / "hf", ODD, weights, palette.colors)
    assert not (tmp_path / "hf").exists()


# --------------------------------------------------------------------------------------------------- files


def same_weights(one: ImportedModel, other: ImportedModel) -> bool:
    return one.weights.keys() == other.weights.keys() and all(torch.equal(one.weights[n], other.weights[n]) for n in one.weights)


def test_shards_and_pickles_hold_the_same_weights(hf_dir: Path, tmp_path: Path) -> None:
    """One file, HF's own shards, and .bin files new and old, whole and in shards, with what else such files carry."""
    expected = read_hf(hf_dir)
    assert np.array_equal(expected.colors, colors_of(ODD))
    model, sharded = ImageGPTForCausalImageModeling.from_pretrained(hf_dir), tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    assert same_weights(read_hf(sharded), expected)
    assert len(read_hf(sharded).files) == len(list(sharded.glob("model-*.safetensors")))

    state = load_file(hf_dir / "model.safetensors")
    for i in range(ODD.n_layer):  # as the released .bin files have them
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, ODD.n_ctx, ODD.n_ctx, dtype=torch.uint8).tril()
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    for zipped in (True, False):
        (tmp_path / f"bin{zipped}").mkdir()
        (tmp_path / f"bin{zipped}" / "config.json").write_bytes((hf_dir / "config.json").read_bytes())
        torch.save(state, tmp_path / f"bin{zipped}" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert same_weights(read_hf(tmp_path / f"bin{zipped}"), expected)
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    (pieces / "config.json").write_bytes((hf_dir / "config.json").read_bytes())
    places = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({name: state[name] for name in state if places[name] == file}, pieces / file)
    (pieces / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert same_weights(read_hf(pieces), expected)


def test_half_precision_is_read_as_the_float32_it_means(hf_dir: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in load_file(hf_dir / "model.safetensors").items()}
    save_file(half, hf_dir / "model.safetensors")
    foreign = read_hf(hf_dir)
    assert {tensor.dtype for tensor in foreign.weights.values()} == {torch.float32}
    assert torch.equal(foreign.weights["head.weight"], half["lm_head.weight"].float())


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def as_bin(hf_dir: Path, value: object) -> Path:
    (hf_dir / "model.safetensors").unlink(missing_ok=True)
    torch.save(value, hf_dir / "pytorch_model.bin")
    return hf_dir / "pytorch_model.bin"


def test_a_pickle_that_would_run_code_is_refused(hf_dir: Path, tool, tmp_path: Path) -> None:
    path = as_bin(hf_dir, {"transformer.wte.weight": Malicious(tmp_path / "owned")})
    status, _, error = tool("import_hf", "--hf", hf_dir, "--out", tmp_path / "model")
    assert (status, error) == (
        2,
        f"import_hf.py: error: {path} is damaged, or would run code when opened; only plain tensors are read\n",
    )
    assert not (tmp_path / "owned").exists()


def test_damaged_files_are_refused(hf_dir: Path) -> None:
    path = hf_dir / "model.safetensors"
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 20, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short: .*download it again"):
            read_hf(hf_dir)
    (hf_dir / "whole.safetensors").write_bytes(whole)
    pickled = as_bin(hf_dir, {})
    for zipped in (True, False):
        torch.save(load_file(hf_dir / "whole.safetensors"), pickled, _use_new_zipfile_serialization=zipped)
        content = pickled.read_bytes()
        for length in (len(content) - 1, len(content) // 2, 400, 0):
            pickled.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged"):
                read_hf(hf_dir)
        pickled.write_bytes(content.replace(b"lm_head", b"lm_h\xffad"))
        with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged or cut short: .+; download it again"):
            read_hf(hf_dir)
    for value in ([torch.zeros(1)], {"a": 1}, {1: torch.zeros(1)}):
        as_bin(hf_dir, value)
        with pytest.raises(ValueError, match=r"pytorch_model.bin is not a state dict of tensors"):
            read_hf(hf_dir)


def test_missing_files_are_named(hf_dir: Path) -> None:
    path = hf_dir / "model.safetensors"
    name = "transformer.wte.weight"
    index = hf_dir / "model.safetensors.index.json"
    path.rename(hf_dir / "one.safetensors")
    with pytest.raises(ValueError, match=r"hf holds neither model.safetensors nor pytorch_model.bin"):
        read_hf(hf_dir)
    for content, message in (
        ({}, "index.json has no 'weight_map'"),
        ({"weight_map": {name: "../one.safetensors"}}, r"index.json names '../one.safetensors', which is not a file beside it"),
        ({"weight_map": {name: "two.safetensors"}}, r"two.safetensors is missing or not a file; download it again"),
        (
            {"weight_map": {"none": "one.safetensors"}},
            r"one.safetensors does not hold 'none', as model.safetensors.index.json says",
        ),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_hf(hf_dir)
    (hf_dir / "config.json").unlink()
    with pytest.raises(ValueError, match=r"HF config .*config.json does not exist"):
        read_hf(hf_dir)


# --------------------------------------------------------------------------------------------------- what we cannot represent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'; only HF's 'imagegpt'"),
        (
            {"activation_function": "gelu"},
            "activation_function='gelu' is not what this project's model computes; it needs 'quick_gelu'",
        ),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not"),
        ({"n_inner": 50}, "n_inner=50; this project's MLP is 4 x n_embd = 96 wide"),
        ({"n_layer": "2"}, "n_layer='2' must be a whole number"),
        ({"n_layer": True}, "n_layer=True must be a whole number"),
        ({"n_head": 5}, "config.json: n_embd=24 is not a multiple of n_head=5"),
        ({"n_positions": 24}, "24 positions are no square image"),
        ({"n_positions": 16}, r"'transformer.wpe.weight' is float32 \[25, 24\]; by config.json it must .* shape \[16, 24\]"),
        ({"vocab_size": 1}, "config.json: n_vocab=0"),
        ({"n_layer": 3}, "has no tensor 'transformer.h.2.ln_1.weight'"),
        ({"n_layer": 1}, "'transformer.h.1.attn.c_attn.bias' is a tensor that this project's model does not have"),
    ],
)
def test_configs_of_other_models_are_refused(hf_dir: Path, change: dict[str, object], message: str) -> None:
    assert read_hf(hf_dir).config == ODD
    change_config(hf_dir, **change)
    with pytest.raises(ValueError, match=message):
        read_hf(hf_dir)


def test_a_config_that_is_no_object_is_refused(hf_dir: Path) -> None:
    (hf_dir / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: model_type=None"):
        read_hf(hf_dir)


def test_a_config_may_leave_out_what_hf_takes_by_default(tmp_path: Path) -> None:
    """The released sizes are HF's defaults; HF's own file leaves none out, so compare with its class."""
    values = ImageGPTConfig().to_dict()
    for silent in ({"model_type": "imagegpt"}, values | {"model_type": "imagegpt"}):
        (tmp_path / "config.json").write_text(json.dumps(silent))
        with pytest.raises(ValueError, match=r"holds neither model.safetensors"):  # so the config was taken
            read_hf(tmp_path)


MASK = torch.ones(1, 1, 25, 25, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer/wte/weight": torch.zeros(7, 24)}, r"'transformer.wte.weight' is float32 \[7, 24\]; .* \[8, 24\]"),
        ({"lm_head/weight": torch.zeros(8, 24)}, r"'lm_head.weight' is float32 \[8, 24\]; .* \[7, 24\]"),
        (
            {"lm_head/weight": None, "score/weight": torch.zeros(2, 24)},
            "has no tensor 'lm_head.weight'; only a whole ImageGPTFor",
        ),
        ({"transformer/ln_f/weight": torch.zeros(24, dtype=torch.int8)}, r"'transformer.ln_f.weight' is int8 \[24\]"),
        (
            {"transformer/ln_f/bias": torch.zeros(24)},
            "'transformer.ln_f.bias' is a tensor that this project's model does not have",
        ),
        ({"transformer/h/0/attn/c_attn/bias": torch.ones(72)}, "'transformer.h.0.attn.c_attn.bias' is not zero"),
        ({"transformer/h/1/attn/c_proj/bias": torch.ones(24)}, "'transformer.h.1.attn.c_proj.bias' is not zero"),
        ({"transformer/h/1/mlp/c_fc/bias": torch.full((96,), 1e-30)}, "'transformer.h.1.mlp.c_fc.bias' is not zero"),
        ({"transformer/h/0/mlp/c_proj/bias": torch.full((24,), float("nan"))}, "'transformer.h.0.mlp.c_proj.bias' is not zero"),
        ({"transformer/h/0/attn/bias": torch.zeros(24)}, "'transformer.h.0.attn.bias' is no causal mask"),
        ({"transformer/h/0/attn/bias": MASK.float()}, "'transformer.h.0.attn.bias' is no causal mask"),
        ({"transformer/h/1/attn/bias": ~MASK}, "'transformer.h.1.attn.bias' is no causal mask"),
    ],
)
def test_tensors_of_other_models_are_refused(hf_dir: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    change_tensors(hf_dir, **{"transformer/h/0/attn/bias": MASK, "transformer/h/0/attn/c_attn/bias": None})
    assert read_hf(hf_dir).config == ODD  # a mask is dropped, and a zero bias may be left out
    change_tensors(hf_dir, **change)
    with pytest.raises(ValueError, match=message):
        read_hf(hf_dir)


def test_a_classifier_of_hf_is_refused(tmp_path: Path) -> None:
    config = ImageGPTConfig(n_layer=1, n_head=3, n_embd=24, n_positions=25, vocab_size=8)
    ImageGPTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tensor 'lm_head.weight'; only a whole ImageGPTForCausalImageModeling"):
        read_hf(tmp_path)


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        (colors_of(ODD)[:6].tolist(), r"'clusters' has shape \[6, 3\]; config.json's vocab_size asks for \[7, 3\]"),
        ([*colors_of(ODD)[:6].tolist(), [0.5]], "'clusters' is not a list of colours"),
        ("palette.npy", "'clusters' is not a list of colours"),
        ((colors_of(ODD) / 2 + 0.5).tolist(), r"'clusters' lies in \[0, .*not in \[-1, 1\]"),
        ((colors_of(ODD) * 127.5).tolist(), r"'clusters' lies in \[-127.5, "),
        (np.full((7, 3), np.nan).tolist(), r"is not valid JSON: NaN is not a finite number"),
    ],
)
def test_clusters_that_are_no_palette_are_refused(hf_dir: Path, clusters: object, message: str) -> None:
    path = hf_dir / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clusters": clusters}))
    with pytest.raises(ValueError, match=message):
        read_hf(hf_dir)
