"""Run on several ranks by test_launch.py: trains a few steps, saves, and writes down the engine's own logits.

engine_logits.py DATA DS_CONFIG RECIPE OUT
"""

import sys
from pathlib import Path

import numpy as np
import torch

from igpt_ds import cli, dist
from igpt_ds.data.facts import DataFacts
from igpt_ds.data.loader import BatchLayout, Loader
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.ds_config import join, load_ds_config
from igpt_ds.model.cpu_kernels import used
from igpt_ds.train.checkpoint.manifest import Progress, RunFacts
from igpt_ds.train.checkpoint.save import Kept, save_checkpoint
from igpt_ds.train.engine import build_engine, start_ranks, take_step
from igpt_ds.train.loop import pretraining_loss
from igpt_ds.train.run_dir import read_recipe, record


def main(_: object) -> None:
    data, ds_config, recipe_file, out = (Path(word) for word in sys.argv[-4:])
    recipe, shards = read_recipe(recipe_file), ShardSet(data, "train")
    start_ranks()
    run = join(recipe, load_ds_config(ds_config), dist.world_size())
    engine = build_engine(run)
    loader = Loader(shards, BatchLayout(recipe.batch_images, run.micro_batch, dist.rank(), run.world_size), recipe.seed)
    stream = loader.stream(0)
    for _step in range(3):
        take_step(engine, [next(stream).to(engine.device)], pretraining_loss(recipe), lr=0.01)
    facts = DataFacts(str(data), shards.dataset_hash, shards.palette_hash)
    if dist.rank() == 0:
        record(out, run, facts, data / "palette.npy", used())
    dist.barrier()
    about = RunFacts(recipe=recipe, data=facts, precision=run.precision)
    save_checkpoint(engine, out / "checkpoints", about, Progress(step=3, images_seen=36), Kept(1))
    with torch.no_grad():
        logits = engine(torch.from_numpy(shards.tokens(np.arange(4)).reshape(4, -1)).long())
    if dist.rank() == 0:
        np.save(out / "logits.npy", logits.numpy())


cli.run(main, ranks=True)
