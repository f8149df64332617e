"""Rank 0 of a contender of tools/bench/host.py. In: a line for each step. Out: the seconds of processor of that step.

python tools/bench/host_rank.py --kind ours --stage 3 --mode none --ranks 64 --blocks 60
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.config import CHECKPOINTING, ModelConfig, Recipe
from igpt_ds.ds_config import DsConfig, join

with lazy.imports():
    import torch

    from igpt_ds.data.loader import Batch
    from igpt_ds.model.objectives import autoregressive_loss
    from igpt_ds.model.transformer import Transformer
    from igpt_ds.train import ds_patches
    from igpt_ds.train.engine import build_engine, start_ranks, take_step
    from igpt_ds.train.loop import collect_garbage


WIDTH, WARM_UP = 16, 4  # the first steps record and check the order of the modules
BLOCK = 12 * WIDTH**2  # weights


def main(argv: Sequence[str] | None = None) -> None:
    """Builds the contender, and takes a step for each line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--kind", choices=["ours", "stock", "fsdp2", "torch"], required=True, help="who takes the steps")
    parser.add_argument("--stage", type=int, choices=[2, 3], required=True, help="of ZeRO")
    parser.add_argument("--mode", choices=CHECKPOINTING, required=True, help="of activation checkpointing")
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks, of which this is the first")
    parser.add_argument("--blocks", type=int, required=True, help="blocks of the network")
    args = parser.parse_args(argv)
    lazy.load()
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        step = prepare(args.kind, args.stage, args.mode, args.ranks, args.blocks)
        for _ in range(WARM_UP):
            step()
    for _ in sys.stdin:
        collect_garbage()
        start = time.process_time()
        step()
        print(time.process_time() - start, flush=True)


def prepare(kind: str, stage: int, mode: str, ranks: int, blocks: int) -> Callable[[], object]:
    """A function that takes a step of that contender."""
    if kind != "torch":
        join_nobody(ranks)
    model = ModelConfig(n_layer=blocks, n_head=2, n_embd=WIDTH, n_px=4, n_vocab=16)
    tokens = torch.randint(16, (1, 16))
    if kind in ("fsdp2", "torch"):
        return torch_step(Transformer(model, activation_checkpointing=mode), tokens, ranks if kind == "fsdp2" else 0, stage)
    start_ranks()
    if kind == "stock":
        ds_patches.apply = lambda: None
    recipe = Recipe("host", model, ranks, 1000, 1e-4, 0)
    engine = build_engine(join(recipe, ds_config(stage, mode, kind == "stock"), ranks, 1))
    batch = Batch(tokens, tokens[:, 0], 0)
    return lambda: take_step(
        engine, [batch], lambda network, batch: autoregressive_loss(network(batch.tokens), batch.tokens), 1e-4
    )


def join_nobody(ranks: int) -> None:
    """Joins torch's fake process group of that size: its collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ.update(place)
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


def ds_config(stage: int, mode: str, stock: bool) -> DsConfig:
    """A shipped ds_config whose limits stand to a block of this width as they stand to a block of iGPT-XL."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": int(1.77 * BLOCK)}
    if stage == 3:
        live = int(8.8 * BLOCK)
        zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
        zero |= {"stage3_prefetch_bucket_size": int(1.06 * BLOCK), "stage3_param_persistence_threshold": WIDTH + 1}
        zero |= {"leaf_module": {"classes": []}} if stock else {}
    values: dict[str, Any] = {"igpt_ds": {"activation_checkpointing": mode}, "bf16": {"enabled": True}, "zero_optimization": zero}
    values |= {"data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 10**9, "disable_python_gc": True}
    return values  # type: ignore[return-value]


def torch_step(network: Any, tokens: Any, ranks: int, stage: int) -> Callable[[], object]:
    """A step of FSDP2 with a unit a block; with no ranks one of the plain network. Stage 2 keeps gathered weights."""
    if ranks:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (ranks,))
        how: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
        for block in network.blocks:
            fully_shard(block, reshard_after_forward=stage == 3, **how)
        fully_shard(network, reshard_after_forward=stage == 3, **how)
    else:
        network.bfloat16()
    adam = torch.optim.Adam(network.parameters(), fused=True)

    def step() -> None:
        autoregressive_loss(network(tokens), tokens).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


if __name__ == "__main__":
    cli.run(main)
