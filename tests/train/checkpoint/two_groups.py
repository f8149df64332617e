"""Run under a launcher by test_reshard.py: engines with two parameter groups train, save and go on, one ds_config after another.

two_groups.py RECIPE OUT LAST_STEP DS_CONFIG...: goes on from the newest checkpoint in OUT/NAME, NAME being that of the ds_config,
trains to LAST_STEP and saves after every second step; OUT/NAME/losses.jsonl gets a row for each step. Weight matrices decay,
biases and norms do not. The images depend on the step alone.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

from igpt_ds import cli, dist
from igpt_ds.data.facts import DataFacts
from igpt_ds.ds_config import join, load_ds_config
from igpt_ds.model.objectives import autoregressive_loss
from igpt_ds.model.transformer import Transformer
from igpt_ds.train.checkpoint.load import resume
from igpt_ds.train.checkpoint.manifest import Progress, RunFacts
from igpt_ds.train.checkpoint.save import Kept, save_checkpoint
from igpt_ds.train.checkpoint.tiers import run_tier
from igpt_ds.train.engine import seed_everything, start_ranks
from igpt_ds.train.run_dir import read_recipe


def build(run):
    seed_everything(run.recipe.seed)
    with deepspeed.zero.Init(config_dict_or_path=run.ds_config, enabled=run.stage == 3):
        model = Transformer(run.recipe.model, "none", run.recipe.objective, run.recipe.init)
    decays = [len(getattr(weight, "ds_shape", weight.shape)) > 1 for weight in model.parameters()]
    groups = [
        {"params": [weight for weight, yes in zip(model.parameters(), decays, strict=True) if yes], "weight_decay": 0.1},
        {"params": [weight for weight, yes in zip(model.parameters(), decays, strict=True) if not yes], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=run.ds_config)[0]


def train(recipe, ds_config, out, last_step):
    run = join(recipe, load_ds_config(ds_config), dist.world_size())
    engine = build(run)
    facts = RunFacts(recipe=recipe, data=DataFacts("random", "", ""), precision=run.precision)
    found = resume(engine, [run_tier(out)], facts)
    step = found.step if found else 0
    while step < last_step:
        shape = (recipe.batch_images, recipe.model.n_ctx)
        tokens = torch.randint(recipe.model.n_vocab, shape, generator=torch.Generator().manual_seed(step))
        mine = tokens[dist.rank() * run.micro_batch :][: run.micro_batch]
        loss = autoregressive_loss(engine(mine), mine)
        engine.backward(loss)
        engine.step()
        step += 1
        mean = float(dist.sum_over_ranks(loss.detach().float())) / dist.world_size()
        if dist.rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            with open(out / "losses.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "loss": mean, "norm": float(engine.get_global_grad_norm())}) + "\n")
        if step % 2 == 0:
            save_checkpoint(engine, out / "checkpoints", facts, Progress(step=step, images_seen=step), Kept(9))
    engine.destroy()


def main(_: object) -> None:
    recipe_file, out, last_step, *ds_configs = sys.argv[2:]
    start_ranks()
    for ds_config in map(Path, ds_configs):
        train(read_recipe(Path(recipe_file)), ds_config, Path(out) / ds_config.stem, int(last_step))


cli.run(main, ranks=True)
