"""Run on several ranks by test_bert_launch.py: writes down the weights of a new engine, before any step.

fresh_weights.py DS_CONFIG RECIPE OUT
"""

import sys
from pathlib import Path

import deepspeed
from safetensors.torch import save_file

from igpt_ds import cli, dist
from igpt_ds.ds_config import join, load_ds_config
from igpt_ds.train.engine import build_engine, start_ranks
from igpt_ds.train.run_dir import read_recipe


def main(_: object) -> None:
    ds_config, recipe_file, out = (Path(word) for word in sys.argv[-3:])
    recipe = read_recipe(recipe_file)
    start_ranks()
    engine = build_engine(join(recipe, load_ds_config(ds_config), dist.world_size()))
    weights = {}
    for name, weight in engine.module.named_parameters():
        assert weight.numel() < weight.ds_numel, f"{name} is whole on one rank"
        with deepspeed.zero.GatheredParameters([weight]):
            weights[name] = weight.detach().clone()
    if dist.rank() == 0:
        save_file(weights, out)
    dist.barrier()


cli.run(main, ranks=True)
