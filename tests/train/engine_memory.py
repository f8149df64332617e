"""Counts the bytes that each rank of an engine holds and the weights that it gathers: recipe and ds_config enter, JSON leaves.

If the ds_config keeps the weights after the forward pass, a second engine that keeps none takes the same steps.

deepspeed --num_gpus 2 tests/train/engine_memory.py recipe.json ds_config.json out.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from igpt_ds import dist
from igpt_ds.data.loader import Batch
from igpt_ds.ds_config import Run, join, load_ds_config
from igpt_ds.json_files import write_json
from igpt_ds.train.ds_effective import check_effective, effective_config
from igpt_ds.train.engine import build_engine, check_ds_config, start_ranks, take_step
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.loop import pretraining_loss
from igpt_ds.train.run_dir import read_recipe


def size(tensors: Any) -> int:
    """Bytes of the distinct storages of some tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor.numel()}
    return sum(storages.values())


def held(engine: Engine) -> dict[str, int]:
    """Bytes by kind after a step of ZeRO-3, as costs.memory names them; and what it leaves out."""
    optimizer, weights = engine.optimizer, list(engine.module.parameters())
    parts = [weight.ds_tensor for weight in weights]
    whole = [weight.data for weight in weights if weight.ds_persist]
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    return {
        "weights": size(parts),
        "gradients": size([optimizer.grad_partitions_flat_buffer]),
        "optimizer": size(optimizer.fp32_partitioned_groups_flat) + size(moments),
        "kept_whole": size(parts + whole) - size(parts),  # one rank's parts are whole already
    }


def count_gathers() -> list[int]:
    """A list that grows by the elements of every all-gather."""
    from deepspeed.comm import comm

    found, gather = [], comm.cdb.all_gather_into_tensor

    def counted(*more: Any, **words: Any) -> Any:
        found.append(words["output_tensor"].numel())
        return gather(*more, **words)

    comm.cdb.all_gather_into_tensor = counted
    return found


def trained(engine: Engine, run: Run, gathered: list[int]) -> tuple[list[float], float]:
    """Takes three steps: the losses, and how often the last one gathers the sharded weights."""
    losses, loss = [], pretraining_loss(run.recipe)
    torch.manual_seed(0)
    for _ in range(3):
        gathered.clear()
        tokens = torch.randint(run.recipe.model.n_vocab, (run.micro_batch, run.recipe.model.n_ctx))
        batch = Batch(tokens, tokens[:, 0], 0)
        losses.append(float(take_step(engine, [batch] * run.accumulation, loss, run.recipe.lr)))
    sizes = [(weight.ds_persist, weight.ds_numel) for weight in engine.module.parameters()]
    whole, sharded = (sum(size for persists, size in sizes if persists is kept) for kept in (True, False))
    return losses, (sum(gathered) - whole) / sharded / run.accumulation  # what is kept whole is gathered after the update


def main() -> None:
    """Takes three steps and counts."""
    recipe_path, ds_path, out = (Path(word) for word in sys.argv[-3:])
    start_ranks()
    recipe, ds_config = read_recipe(recipe_path), load_ds_config(ds_path)
    check_ds_config(ds_config, ds_path)
    run = join(recipe, ds_config, dist.world_size())
    engine = build_engine(run)
    effective = effective_config(engine)
    check_effective(run, effective)
    gathered = count_gathers()
    losses, rounds = trained(engine, run, gathered)
    ranks = dist.gather_objects(held(engine))
    found = {"ranks": ranks, "losses": losses, "rounds": rounds, "effective": effective}
    if "stage3_max_live_parameters" in ds_config["zero_optimization"]:
        ds_config["zero_optimization"] |= {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 1}
        run = join(recipe, ds_config, dist.world_size())
        found |= dict(zip(("losses_again", "rounds_again"), trained(build_engine(run), run, gathered), strict=True))
    if dist.rank() == 0:
        write_json(out, found)
    dist.barrier()


if __name__ == "__main__":
    main()
