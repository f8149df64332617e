"""A checkpoint in OpenAI's format gives the logits of OpenAI's code, written here a second time in numpy and float64."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import killed
import numpy as np
import pytest
import torch

from igpt_ds.config import ModelConfig
from igpt_ds.data.palette import Palette, save_palette
from igpt_ds.files import sha256_file
from igpt_ds.model.interchange.openai import read_openai
from igpt_ds.model.store import load_model
from igpt_ds.model.transformer import Transformer

TOOL = Path(__file__).parents[3] / "tools" / "import_openai.py"
SHAPES = {"odd": (2, 3, 24, 5, 7), "one head": (1, 1, 8, 3, 20), "twelve layers": (12, 2, 16, 4, 9)}
Tensors = dict[str, np.ndarray]


def released_forward(tensors: Tensors, X: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """Logits [B, T, V] of tokens [B, T], as openai/image-gpt src/model.py has them; `hidden` [B, T] are BERT's masked pixels."""
    w = {name.removeprefix("model/"): value.astype(np.float64) for name, value in tensors.items()}

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain

    h = w["wte"][X]
    if hidden is None:
        h = np.concatenate([np.broadcast_to(w["sos"], (len(X), 1, h.shape[2])), h[:, :-1]], axis=1)
    else:
        h = h * (1.0 - hidden)[:, :, None]
    h = h + w["wpe"][None, : X.shape[1]]
    for i in range(sum(name.endswith("ln_1/g") for name in w)):
        b = {name.removeprefix(f"h{i}/"): value for name, value in w.items() if name.startswith(f"h{i}/")}
        x = norm(h, b["ln_1/g"])
        q, k, v = (np.einsum("bsf,hef->bhse", x, b[f"attn/{part}_proj"]) for part in "qkv")
        scores = np.einsum("bhse,bhte->bhst", q, k) / np.sqrt(v.shape[-1])
        if hidden is None:
            seen = np.tri(scores.shape[-1])
            scores = scores * seen - 1e10 * (1 - seen)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        a = np.einsum("bhst,bhte->bhse", scores / scores.sum(axis=-1, keepdims=True), v)
        h = h + np.einsum("bhse,hef->bsf", a, b["attn/c_proj"])
        m = np.matmul(norm(h, b["ln_2/g"]), b["mlp/c_fc/w"])
        h = h + np.matmul(m / (1 + np.exp(-1.702 * m)), b["mlp/c_proj/w"])
    return norm(h, w["ln_f/g"]) @ w["wtet"].T


def write_palette(path: Path, n_colors: int, seed: int = 0) -> Palette:
    palette = Palette(np.random.default_rng(seed).uniform(-1, 1, (n_colors, 3)).astype(np.float32))
    save_palette(path, palette)
    return palette


@pytest.fixture
def run(tool):
    """run(*arguments) -> (exit status, stdout, stderr) of tools/import_openai.py."""
    return partial(tool, "import_openai")


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_logits_are_those_of_the_released_code(write_bundle, released, tmp_path: Path, shape, objective: str) -> None:
    tensors = released(*shape, sos=objective == "ar")
    foreign = read_openai(write_bundle(tmp_path / "model.ckpt-131000", tensors, n_shards=32))
    n_layer, n_head, n_embd, n_px, n_vocab = shape
    assert foreign.config == ModelConfig(n_layer, n_head, n_embd, n_px, n_vocab)
    assert (foreign.objective, foreign.step, foreign.images_seen) == (objective, 131000, 131000 * 128)
    model = Transformer(foreign.config, objective=objective)
    model.load_state_dict(foreign.weights, strict=True)

    rng = np.random.default_rng(3)
    X = rng.integers(0, n_vocab, (3, n_px**2))
    hidden = rng.uniform(size=X.shape) < 0.3 if objective == "bert" else None
    expected = torch.from_numpy(released_forward(tensors, X, hidden))
    tokens = torch.from_numpy(X)
    logits = model(tokens) if hidden is None else model(tokens, torch.from_numpy(hidden))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=1e-5)


def test_the_tool_makes_a_model_dir(write_bundle, released, run, tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "model.ckpt-1000", released(2, 3, 24, 5, 7), n_shards=2)
    palette = write_palette(tmp_path / "p.npy", 7)
    status, said, error = run("--checkpoint", prefix, "--palette", tmp_path / "p.npy", "--out", tmp_path / "model")
    assert (status, error) == (0, "")
    model, info = load_model(tmp_path / "model")
    size = sum(weight.numel() for weight in model.parameters())
    assert said == (
        f"{tmp_path / 'model'}: objective ar, step 1000, {size:,} parameters, {palette.name}, sha256 {info.model_hash[:16]}\n"
    )
    assert (info.objective, info.step, info.images_seen, info.palette_hash) == ("ar", 1000, 128000, palette.hash)
    assert info.mask_prob is None
    files = [f"model.ckpt-1000.{end}" for end in ("index", "data-00000-of-00002", "data-00001-of-00002")]
    source = json.loads((tmp_path / "model" / "config.json").read_text())["source"]
    assert source == {name: sha256_file(tmp_path / name) for name in files}


def test_a_killed_import_finishes_when_it_is_run_again(write_bundle, released, tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "model.ckpt-1000", released(2, 3, 24, 5, 7), n_shards=2)
    write_palette(tmp_path / "p.npy", 7)
    given = ["--checkpoint", prefix, "--palette", tmp_path / "p.npy"]
    (tmp_path / "world").mkdir()
    with killed.Tools() as tools:
        killed.Case(tools, "tools/import_openai.py", lambda out: [*given, "--out", out / "m"], tmp_path / "world").kills(3)


def test_a_bert_model_dir_says_so(write_bundle, released, run, tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "model.ckpt", released(1, 2, 8, 3, 7, sos=False))
    write_palette(tmp_path / "p.npy", 7)
    status, said, _ = run("--checkpoint", prefix, "--palette", tmp_path / "p.npy", "--out", tmp_path / "model")
    assert status == 0
    assert "objective bert, step 0," in said
    model, info = load_model(tmp_path / "model")
    assert (info.objective, model.objective, info.step, info.mask_prob) == ("bert", "bert", 0, 0.15)


def test_wrong_palettes_are_refused(write_bundle, released, run, tmp_path: Path) -> None:
    path = tmp_path / "p.npy"
    write_palette(path, 8)
    for n_vocab, complaint in (
        (7, f"--palette {path} has 8 colours; {tmp_path / 'm'} has 7"),
        (512, f"--palette {path} is not OpenAI's; give kmeans_centers.npy of the image-gpt release"),
    ):
        prefix = write_bundle(tmp_path / "m", released(1, 1, 2, 1, n_vocab))
        if n_vocab == 512:
            write_palette(path, 512)
        status, said, error = run("--checkpoint", prefix, "--palette", path, "--out", tmp_path / "model")
        assert (status, said, error) == (2, "", f"import_openai.py: error: {complaint}\n")
    np.save(path, np.random.default_rng(0).uniform(0, 1, (512, 3)).astype(np.float32))  # of the same size, in [0, 1]
    status, _, error = run("--checkpoint", prefix, "--palette", path, "--out", tmp_path / "model")
    assert (status, error.count("\n")) == (2, 1)
    assert f"palette {path} has no negative value" in error
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("model/wte", None, "'model/wte' is missing; this is no checkpoint of OpenAI's image-gpt"),
        ("model/wpe", np.zeros(25), r"'model/wpe' is \[25\]; this is no checkpoint of OpenAI's"),
        ("model/h0/attn/q_proj", np.zeros((24, 24)), r"'model/h0/attn/q_proj' is \[24, 24\]; this is no checkpoint"),
        ("model/wpe", np.zeros((24, 24)), "m.index: 24 positions are no square image"),
        ("model/h0/attn/q_proj", np.zeros((5, 5, 24)), "m.index: n_embd=24 is not a multiple of n_head=5"),
        ("model/h0/attn/q_proj", np.zeros((3, 4, 24)), r"'model/h0/attn/q_proj' is \[3, 4, 24\]; .* must be \[3, 8, 24\]"),
        ("model/h1/attn/q_proj", np.zeros((2, 12, 24)), r"'model/h1/attn/q_proj' is \[2, 12, 24\]; .* must be \[3, 8, 24\]"),
        ("model/h1/mlp/c_fc/w", None, r"'model/h1/mlp/c_fc/w' is missing; with the other tensors it must be \[24, 96\]"),
        ("model/wtet", np.zeros((8, 24)), r"'model/wtet' is \[8, 24\]; with the other tensors it must be \[7, 24\]"),
        ("model/sos", np.zeros((1, 24)), r"'model/sos' is \[1, 24\]; with the other tensors it must be \[24\]"),
        ("model/h3/ln_1/g", np.zeros(24), "'model/h2/ln_1/g' is missing"),
        ("model/ln_f/b", np.zeros(24), "'model/ln_f/b' is a tensor that this project's model does not have"),
    ],
)
def test_checkpoints_of_other_models_are_refused(write_bundle, released, tmp_path: Path, name, value, complaint) -> None:
    tensors = released(2, 3, 24, 5, 7)
    assert read_openai(write_bundle(tmp_path / "m", tensors)).step == 0
    tensors |= {name: value if value is None else value.astype(np.float32)}
    prefix = write_bundle(tmp_path / "m", {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(ValueError, match=complaint):
        read_openai(prefix)


def test_a_missing_shard_is_one_line(write_bundle, released, run, tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "model.ckpt-5", released(1, 2, 8, 3, 7), n_shards=4)
    write_palette(tmp_path / "p.npy", 7)
    missing = tmp_path / "model.ckpt-5.data-00002-of-00004"
    missing.unlink()
    command = ["--palette", tmp_path / "p.npy", "--out", tmp_path / "model"]
    assert run("--checkpoint", prefix, *command) == (
        2,
        "",
        f"import_openai.py: error: {missing} cannot be read: No such file or directory; "
        "download all 4 data files beside model.ckpt-5.index\n",
    )
    status, _, error = run("--checkpoint", f"{prefix}.index", *command)
    assert (status, error.count("\n")) == (2, 1)
    assert "give the path without .index, as in model.ckpt-1000000" in error
    assert not (tmp_path / "model").exists()
