"""Real launches of the shipped ds_configs: they train, take effect as they stand, and hold the bytes that costs.py counts.

fp16 is missing, because DeepSpeed supports it only on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.ds_config import join, load_ds_config
from igpt_ds.json_files import read_json
from igpt_ds.plan.costs import memory, parameters
from igpt_ds.plan.estimate import rank_layout
from igpt_ds.train.checkpoint.restricted import RestrictedReader, refuse_foreign_names

pytestmark = pytest.mark.slow
DIRECTORY = Path(__file__).parents[2] / "ds_configs"
PERSISTED = 100_000  # weights: DeepSpeed keeps smaller tensors whole on each rank (stage3_param_persistence_threshold)


def for_two_ranks(name: str, path: Path) -> Path:
    """A shipped ds_config, its groups of eight GPUs made groups of two."""
    values = read_json(DIRECTORY / f"{name}.json", "ds_config")
    if "zero_hpz_partition_size" in values["zero_optimization"]:
        values["zero_optimization"]["zero_hpz_partition_size"] = 2
    path.write_text(json.dumps(values))
    return path


def layer_norms(run_dir: Path, step: int) -> dict[str, float]:
    """The gradient norms of the layers in TensorBoard's files, at the one step that has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    found = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"] if tag.startswith("grad_norm/")}
    assert {point.step for points in found.values() for point in points} == {step}
    return {tag.partition("/")[2]: points[0].value for tag, points in found.items()}


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_hpz_bf16", "zero3_bf16_offload_optimizer"])
def test_a_shipped_ds_config_trains_as_it_stands(
    launch: Any, command: Callable[..., list[str]], curves: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    asked = for_two_ranks(name, tmp_path / f"{name}.json")
    done = launch(command("run", "--ds_config", str(asked), "--micro_batch", "3", "--replay_every", "6"), ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    losses = [row["loss"] for row in curves("run") if "loss" in row]
    assert losses[0] == pytest.approx(np.log(8), abs=1e-3)
    assert losses[-1] < losses[0]
    norms = layer_norms(tmp_path / "run", step=12)
    assert {layer for layer in norms if "." in layer} == {"blocks.00", "blocks.01"}
    last = next(row for row in reversed(curves("run")) if "loss" in row)
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(last["grad_norm"], rel=1e-3)
    effective = read_json(tmp_path / "run" / "ds_config.effective.json", "effective ds_config")
    assert effective["zero_optimization"]["stage"] == int(name[4])
    assert effective["engine"]["weights"] == "bf16"
    assert effective["data_types"]["grad_accum_dtype"] == ("bf16" if name == "zero1_bf16" else "fp32")
    assert (effective["train_batch_size"], effective["gradient_accumulation_steps"]) == (12, 2)
    saved = list((tmp_path / "run" / "checkpoints").rglob("*.pt"))
    refuse_foreign_names(saved)
    assert all(RestrictedReader(None).load(str(path)) for path in saved)


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (1, "zero3_bf16"),
        (2, "zero3_bf16_bf16_accumulation"),
        (2, "zero3_fp32"),
        (2, "zero3_bf16_kept_weights"),
        (4, "zero3_bf16"),
    ],
)
def test_each_rank_holds_the_bytes_that_are_predicted(launch: Any, tmp_path: Path, ranks: int, name: str) -> None:
    recipe = Recipe("wide", ModelConfig(n_layer=3, n_head=4, n_embd=256, n_px=8, n_vocab=64), 8, 10, 0.001, 2)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_to_dict(recipe)))
    path, out = DIRECTORY / f"{name}.json", tmp_path / "held.json"
    done = launch([Path(__file__).with_name("engine_memory.py"), tmp_path / "recipe.json", path, out], ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    config, run = recipe.model, join(recipe, load_ds_config(path), ranks)
    predicted = memory(config, rank_layout(run))
    C = config.n_embd
    # Of a block only qkv (3 C C) and the two products of the MLP (4 C C each) are large enough to be sharded.
    kept_whole = parameters(config) - config.n_layer * 11 * C * C if ranks > 1 else 0  # one rank's weights are whole as they lie
    assert 4 * C * C > 3 * C * C > PERSISTED > C * C
    measured = read_json(out, "held")
    if "kept" in name:
        assert measured["losses"] == measured["losses_again"]
        assert (measured["rounds"], measured["rounds_again"]) == (pytest.approx(1, abs=0.05), pytest.approx(2, abs=0.15))
    held = measured["ranks"]
    assert len(held) == ranks
    for found in held:
        for kind in ("weights", "gradients", "optimizer"):
            assert found[kind] == pytest.approx(getattr(predicted, kind), rel=0.02), kind
        assert found["kept_whole"] == kept_whole * rank_layout(run).weight_bytes
    total = sum(found[kind] for found in held for kind in ("weights", "gradients", "optimizer"))
    assert total == pytest.approx(ranks * predicted.states, rel=0.02)
