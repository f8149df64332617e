"""Run on one rank or several by test_layers.py: the norms by layer of one step, of each stage and precision, and of plain torch.

It also takes three steps with and without the replay and compares their bits.

layer_ranks.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from igpt_ds import cli, dist
from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.data.loader import Batch
from igpt_ds.ds_config import DsConfig, join
from igpt_ds.json_files import write_json
from igpt_ds.model.transformer import Transformer
from igpt_ds.train.cadence import Cadence
from igpt_ds.train.engine import build_engine, start_ranks, take_step
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.health.layers import LayerScales
from igpt_ds.train.health.layers import weights as parts_of_weights
from igpt_ds.train.health.replay import Replay, bits
from igpt_ds.train.loop import pretraining_loss

# Odd sizes, so that the parts of two ranks need padding.
RECIPE = Recipe("layers", ModelConfig(n_layer=2, n_head=1, n_embd=9, n_px=4, n_vocab=15), 12, 10, 0.001, 2, head_std=0.02)
CADENCE = Cadence(0, 0, 0, 1, 0, last_step=9, norms_every=1, replay_every=1)
KINDS: dict[str, dict[str, Any]] = {
    "zero3/fp32": {"stage": 3},
    "zero3/fp32/none persistent": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero2/fp32": {"stage": 2},
    "zero1/fp32": {"stage": 1},
    "zero3/bf16": {"stage": 3},
    "zero2/bf16": {"stage": 2},
    "zero1/bf16": {"stage": 1},
    "zero3/bf16/bf16 sums": {"stage": 3},
}


REPLAYED: list[tuple[str, dict[str, Any], str]] = [
    ("zero3/bf16", {"stage": 3, "stage3_param_persistence_threshold": 0}, "none"),
    ("zero3/fp32", {"stage": 3}, "selective"),
    ("zero3/fp32", {"stage": 3, "leaf_module": {"classes": []}}, "full"),
    ("zero2/fp32", {"stage": 2}, "none"),
]


def images() -> torch.Tensor:
    """The tokens of the step's 12 images."""
    return torch.randint(15, (12, 16), generator=torch.Generator().manual_seed(1))


def engine_of(kind: str, zero: dict[str, Any], mode: str) -> Engine:
    """A new engine."""
    bf16 = "bf16" in kind
    values: dict[str, Any] = {"zero_optimization": zero, "bf16": {"enabled": bf16}, "igpt_ds": {"activation_checkpointing": mode}}
    if bf16 and zero["stage"] != 1 and not kind.endswith("sums"):
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    ds_config: DsConfig = values  # type: ignore[assignment]
    run = join(RECIPE, ds_config, dist.world_size(), micro_batch=6 // dist.world_size())
    return build_engine(run)


def batches() -> list[Batch]:
    """The two micro batches of this rank."""
    mine = images().chunk(2 * dist.world_size())[dist.rank() :: dist.world_size()]
    return [Batch(tokens, tokens[:, 0], 0) for tokens in mine]


def measured(kind: str, zero: dict[str, Any], mode: str = "none") -> dict[str, dict[str, float]]:
    """Of a step of two micro batches on each rank: by layer, of plain torch, and DeepSpeed's own norm of all gradients."""
    import deepspeed

    engine = engine_of(kind, zero, mode)
    layers = LayerScales(engine, CADENCE)
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=zero["stage"] == 3):
        weights = {name: weight.detach().float().clone() for name, weight in parameters.items()}
    with layers.watching(1):
        take_step(engine, batches(), pretraining_loss(RECIPE), 0.001, layers.before_update)
    found = {"layers": layers.values(), "global": {"norm": float(engine.get_global_grad_norm())}, "plain": plain(weights)}
    engine.destroy()
    return found


def three_steps(replays: bool, *kind: Any) -> list[object]:
    """The losses of three steps, of which the replay checks each, and the sums of all weights' bits on this rank."""
    engine = engine_of(*kind)
    replay, loss, found = Replay(engine, CADENCE), pretraining_loss(RECIPE), []
    for step in (1, 2, 3):
        if replays:
            replay.check(step, batches()[0], loss)
        found.append(float(take_step(engine, batches(), loss, 0.001)))
    parts = [int(bits(part).sum(dtype=torch.int64)) for _, part in parts_of_weights(engine)]
    engine.destroy()
    return [found, parts]


def plain(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of all images at once, by torch alone in float32."""
    model = Transformer(RECIPE.model)
    model.load_state_dict(weights)
    tokens = images()
    logits = model(tokens)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    found: dict[str, float] = {}
    names = {name: [] for name in ("blocks.00", "blocks.01", "wte", "wpe", "sos", "ln_f", "head")}  # type: dict[str, list[Any]]
    for name, weight in model.named_parameters():
        names[name.replace("blocks.", "blocks.0")[:9] if name.startswith("blocks") else name.split(".")[0]].append(weight)
    for layer, parts in names.items():
        found[f"weight_norm/{layer}"] = float(torch.cat([part.detach().flatten() for part in parts]).norm())
        found[f"grad_norm/{layer}"] = float(torch.cat([part.grad.flatten() for part in parts]).norm())
    with torch.no_grad():
        for number, (residual, _) in enumerate(model.residuals(torch.cat([tokens, tokens[:, :1]], 1)[:, :16])):
            if number:
                found[f"activation_rms/blocks.{number - 1:02}"] = float(residual.square().mean().sqrt())
    return found


def main(_: object) -> None:
    """Measures on every rank; the values are the same there."""
    start_ranks()
    found = {kind: measured(kind, zero) for kind, zero in KINDS.items()}
    found |= {f"zero3/fp32/{mode}": measured("zero3/fp32", {"stage": 3}, mode) for mode in ("full", "selective")}
    assert len(set(map(str, dist.gather_objects(found)))) == 1
    for kind in REPLAYED:
        assert three_steps(True, *kind) == three_steps(False, *kind), kind
    if dist.rank() == 0:
        write_json(Path(sys.argv[-1]), found)
    dist.barrier()


cli.run(main, ranks=True)
