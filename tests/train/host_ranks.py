"""Run on two ranks by test_host_launch.py: takes steps under ZeRO-3 as DeepSpeed comes and as `ds_patches` makes it, and counts.

host_ranks.py OUT
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from igpt_ds import cli, dist
from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.data.loader import Batch
from igpt_ds.ds_config import DsConfig, join
from igpt_ds.json_files import write_json
from igpt_ds.train import ds_patches
from igpt_ds.train.engine import build_engine, start_ranks, take_step
from igpt_ds.train.loop import collect_garbage, pretraining_loss

WIDTH, BLOCKS = 32, 6
RECIPE = Recipe("host", ModelConfig(n_layer=BLOCKS, n_head=2, n_embd=WIDTH, n_px=4, n_vocab=15), 4, 10, 0.001, 2)
MODES = ("none", "selective", "full")


class Training:
    """An engine and its steps."""

    def __init__(self, mode: str, precision: str = "fp32", **zero: Any) -> None:
        values: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": WIDTH + 1} | zero}
        values |= {
            "igpt_ds": {"activation_checkpointing": mode},
            "disable_python_gc": True,
            "bf16": {"enabled": precision == "bf16"},
        }
        ds_config: DsConfig = values  # type: ignore[assignment]
        self.engine = build_engine(join(RECIPE, ds_config, dist.world_size()))
        self.loss, self.random = pretraining_loss(RECIPE), torch.Generator().manual_seed(dist.rank())

    def batch(self) -> Batch:
        tokens = torch.randint(15, (2, 16), generator=self.random)
        return Batch(tokens, tokens[:, 0], 0)

    def steps(self, count: int) -> list[float]:
        return [float(take_step(self.engine, [self.batch()], self.loss, 0.001)) for _ in range(count)]

    def validate(self) -> None:
        self.engine.eval()
        with torch.no_grad():
            for _ in range(3):
                self.loss(self.engine, self.batch())
        self.engine.train()

    def weights(self) -> list[list[float]]:
        """This rank's parts of all weights."""
        return [weight.ds_tensor.float().tolist() for weight in self.engine.module.parameters()]  # type: ignore[attr-defined]


def bits() -> dict[str, bool]:
    """Whether losses and weights of the patched engine are those of DeepSpeed's own, for each mode and precision."""
    kinds = [(mode, "fp32") for mode in MODES] + [("none", "bf16")]
    own = {}
    patch, ds_patches.apply = ds_patches.apply, lambda: None
    for kind in kinds:
        training = Training(*kind, leaf_module={"classes": []})
        own[kind] = training.steps(4), training.weights()
        training.engine.destroy()
    ds_patches.apply = patch
    same = {}
    for kind in kinds:
        training = Training(*kind)
        same["/".join(kind)] = own[kind] == (training.steps(4), training.weights())
        training.engine.destroy()
    return same


def gathers(validate_first: bool) -> list[float]:
    """Messages of gathering in a training step: after a validation, or none; after one more; and their numbers / weights."""
    import deepspeed.comm as comm

    block = 12 * WIDTH**2
    limits = {"stage3_max_live_parameters": 3 * block, "stage3_max_reuse_distance": 3 * block}
    training = Training("none", stage3_prefetch_bucket_size=block, **limits)
    sizes: list[int] = []
    theirs: Callable[..., Any] = comm.all_gather_into_tensor

    def counted(out: torch.Tensor, *more: Any, **named: Any) -> Any:
        sizes.append(out.numel())
        return theirs(out, *more, **named)

    comm.comm.all_gather_into_tensor = counted
    found = []
    for validates in (validate_first, True):
        if validates:
            training.validate()
        training.steps(4)
        sizes.clear()
        training.steps(1)
        found += [len(sizes), sum(sizes)]
    comm.comm.all_gather_into_tensor = theirs
    training.engine.destroy()
    return found


def growth(mode: str) -> dict[str, int]:
    """Python objects and running modules more than ten steps before, without collection and with it."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    def objects() -> int:
        return len(gc.get_objects()) + len(FWD_MODULE_STACK)

    training = Training(mode)
    assert not gc.isenabled()
    training.steps(4)
    collect_garbage()
    start = objects()
    training.steps(10)
    without = objects()
    collect_garbage(whole=False)
    found = {"without": without - start, "with": objects() - start}
    training.engine.destroy()
    return found


def main(_: object) -> None:
    """Counts on every rank."""
    start_ranks()
    mine = {
        "bits": bits(),
        "gathers": [gathers(False), gathers(True)],
        "growth": {mode: growth(mode) for mode in MODES},
    }
    ranks = dist.gather_objects(mine)
    if dist.rank() == 0:
        write_json(Path(sys.argv[-1]), ranks)
    dist.barrier()


cli.run(main, ranks=True)
