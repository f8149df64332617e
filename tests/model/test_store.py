"""What is saved is what is loaded; what was changed on the way is refused."""

import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_ds.json_files import seal
from igpt_ds.model.store import WeightStream, fresh_model, load_model, read_info, save_model
from igpt_ds.model.transformer import Transformer


@pytest.fixture
def model_dir(model: Transformer, tmp_path: Path) -> Path:
    palette = tmp_path / "palette.npy"
    np.save(palette, np.zeros((8, 3), np.float32))
    info = {"config": model.config, "objective": "ar", "palette_hash": "abc", "step": 7, "images_seen": 70, "recipe": "x"}
    save_model(tmp_path / "model", model.state_dict(), info, palette)
    return tmp_path / "model"


def test_load_gives_what_was_saved(model: Transformer, model_dir: Path, tokens: torch.Tensor) -> None:
    loaded, info = load_model(model_dir)
    assert torch.equal(loaded(tokens), model(tokens))
    assert (info.config, info.objective, info.palette_hash, info.step, info.images_seen) == (model.config, "ar", "abc", 7, 70)
    assert sorted(path.name for path in model_dir.iterdir()) == ["README.md", "config.json", "model.safetensors", "palette.npy"]


def test_weights_that_come_in_blocks_make_the_same_file(model: Transformer, model_dir: Path, tmp_path: Path) -> None:
    weights = model.state_dict()

    def blocks(name: str) -> list[bytes]:
        content = weights[name].numpy().tobytes()
        return [content[:4], content[4:]]

    stream = WeightStream({name: tuple(tensor.shape) for name, tensor in weights.items()}, blocks)
    info = {"config": model.config, "objective": "ar", "palette_hash": "abc", "step": 7, "images_seen": 70, "recipe": "x"}
    save_model(tmp_path / "streamed", stream, info, tmp_path / "palette.npy")
    files = [path / "model.safetensors" for path in (model_dir, tmp_path / "streamed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def change_config(model_dir: Path, **changes: object) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps(seal(json.loads(path.read_text()) | changes)))


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model config .*config.json does not exist"):
        read_info(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not igpt_ds.model version 1 or 2: it is version 2 of 'other'"),
        ({"version": 9}, ": it is version 9 of"),
    ],
)
def test_foreign_configs_are_refused(model_dir: Path, changes: dict[str, object], message: str) -> None:
    change_config(model_dir, **changes)
    with pytest.raises(ValueError, match=message):
        read_info(model_dir)


def test_a_reader_of_one_objective_refuses_the_other(model: Transformer, model_dir: Path, tmp_path: Path) -> None:
    masked = fresh_model(model.config, seed=1, objective="bert")
    info = {"config": model.config, "objective": "bert", "palette_hash": "abc", "step": 7, "images_seen": 70}
    save_model(
        tmp_path / "bert",
        masked.state_dict(),
        info | {"mask_prob": 0.2, "init": "sparse_transformer"},
        model_dir / "palette.npy",
    )
    for reader in (read_info, load_model):
        with pytest.raises(ValueError, match=r"bert was trained with objective 'bert', and this needs 'ar'; name another model"):
            reader(tmp_path / "bert", "ar")
        with pytest.raises(ValueError, match=r"model was trained with objective 'ar', and this needs 'bert'"):
            reader(model_dir, "bert")
    loaded, told = load_model(tmp_path / "bert", "bert")
    assert (told.objective, told.mask_prob, told.init, loaded.objective) == ("bert", 0.2, "sparse_transformer", "bert")
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in masked.state_dict().items())
    assert (read_info(model_dir, "ar").mask_prob, read_info(model_dir, "ar").init) == (None, "released")


def test_weights_of_the_other_objective_are_refused(model_dir: Path) -> None:
    change_config(model_dir, objective="bert")
    with pytest.raises(ValueError, match=r"does not fit .*config.json.*sos"):
        load_model(model_dir)
    change_config(model_dir, objective="bart")
    with pytest.raises(ValueError, match=r"config.json has objective 'bart'; known: ar, bert; read it with the code that"):
        load_model(model_dir)


def test_a_config_without_a_field_is_refused(model_dir: Path) -> None:
    path = model_dir / "config.json"
    values = json.loads(path.read_text())
    del values["palette_hash"]
    path.write_text(json.dumps(seal(values)))
    with pytest.raises(ValueError, match="has no 'palette_hash'"):
        read_info(model_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_prob": "x"}, r"config.json has mask_prob 'x', which is not a number or null"),
        ({"palette_hash": None}, r"config.json has palette_hash None"),
        ({"step": "abc"}, r"config.json has step 'abc'"),
        (
            {"config": {"n_layer": "6", "n_head": 1, "n_embd": 4}},
            r"config.json has config.n_layer '6', which is not a whole number",
        ),
    ],
)
def test_a_config_of_other_kinds_of_values_is_refused(model_dir: Path, changes: dict[str, object], message: str) -> None:
    change_config(model_dir, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(model_dir)


def test_weights_that_are_not_finite_are_not_written(model: Transformer, model_dir: Path, tmp_path: Path) -> None:
    weights = model.state_dict() | {"wpe": torch.full_like(model.wpe, float("nan"))}
    info = {"config": model.config, "objective": "ar", "palette_hash": "abc", "step": 7, "images_seen": 70}
    with pytest.raises(ValueError, match="not finite: 'wpe'; nothing was written"):
        save_model(tmp_path / "broken", weights, info, model_dir / "palette.npy")
    assert not (tmp_path / "broken").exists()


def test_a_limit_of_file_size_is_an_error_with_the_files_name(model: Transformer, model_dir: Path, tmp_path: Path) -> None:
    info = {"config": model.config, "objective": "ar", "palette_hash": "abc", "step": 7, "images_seen": 70}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model.safetensors"):
            save_model(tmp_path / "full", model.state_dict(), info, model_dir / "palette.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "palette.npy"]


def test_files_of_a_model_dir_have_the_mode_that_the_umask_says(model: Transformer, model_dir: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        info = {"config": model.config, "objective": "ar", "palette_hash": "p", "step": 1, "images_seen": 2}
        save_model(tmp_path / "other", model.state_dict(), info, model_dir / "palette.npy")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "other").iterdir()} == {0o640}


def test_changed_weights_are_refused(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not the file that config.json describes"):
        load_model(model_dir)
    path.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors does not exist"):
        load_model(model_dir)


def test_weights_of_another_shape_are_refused(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())["config"]
    change_config(model_dir, config=config | {"n_layer": 2})
    with pytest.raises(ValueError, match=r"does not fit .*config.json"):
        load_model(model_dir)


def test_an_existing_model_dir_is_not_overwritten(model: Transformer, model_dir: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        save_model(model_dir, model.state_dict(), {"config": model.config}, model_dir / "palette.npy")


def test_fresh_models_depend_on_the_seed_alone(model: Transformer) -> None:
    torch.manual_seed(1)
    one = fresh_model(model.config, seed=5)
    torch.manual_seed(2)
    same, other = fresh_model(model.config, seed=5), fresh_model(model.config, seed=6)
    assert torch.equal(one.wte.weight, same.wte.weight)
    assert not torch.equal(one.wte.weight, other.wte.weight)
    sparse, masked = fresh_model(model.config, 5, init="sparse_transformer"), fresh_model(model.config, 5, objective="bert")
    torch.testing.assert_close(sparse.wte.weight, one.wte.weight / 2)
    assert (masked.objective, hasattr(masked, "sos")) == ("bert", False)
