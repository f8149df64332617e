"""Finds the newest checkpoint that is undamaged and loads it into an engine, on all ranks together.

DeepSpeed's `latest` file is not read. A checkpoint of another number of ranks is resharded while it is loaded. save.py writes
checkpoints. Called by train/session.py and train/loop.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.config import recipe_to_dict
from igpt_ds.console import count
from igpt_ds.errors import InputError, error_text
from igpt_ds.train.checkpoint.disk import SLACK
from igpt_ds.train.checkpoint.manifest import Checkpoint, Manifest, RunFacts, of_rank
from igpt_ds.train.checkpoint.newest import damage, newest_state
from igpt_ds.train.checkpoint.removal import remove_together
from igpt_ds.train.checkpoint.reshard import target_layout, write_rank
from igpt_ds.train.checkpoint.restricted import refuse_foreign_names, restricted_reader
from igpt_ds.train.checkpoint.save import agree, make_unfinished
from igpt_ds.train.checkpoint.tiers import Tier, run_tier
from igpt_ds.train.checkpoint.torch_files import read_torch_file
from igpt_ds.train.checkpoint.zero_layout import ZeroCheckpoint
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.rng import restore_rng
from igpt_ds.train.run_dir import recipe_differences


def resume(engine: Engine, tiers: Sequence[Tier], facts: RunFacts) -> Manifest | None:
    """Loads the newest undamaged checkpoint; returns its manifest, or None if none was ever saved.

    Args:
        tiers: where the run saves; the run directory first.

    Raises:
        SharedError: there are checkpoints but none can be used; nothing is changed.
    """
    found = newest_state(tiers)
    if found is None:
        dist.say("nothing to resume: step 0")
        return None
    load_checkpoint(engine, found, facts, tiers[0].directory)
    dist.say(f"resumed from {found.path}: {found.manifest.step} steps, {found.manifest.images_seen:,} images")
    return found.manifest


def load_checkpoint(engine: Engine, checkpoint: Checkpoint, run: RunFacts, verified_for: Path | None = None) -> None:
    """Restores weights, optimizer and random generators of every rank; reshards for other ranks or sub-groups.

    Args:
        run: this run.
        verified_for: the files have just been compared with their sha256. Resharded ones go into this directory of the run, for
            a fast one may be full.

    Raises:
        SharedError: the checkpoint has another run, precision or stage, or a file is damaged.
    """
    path, manifest = checkpoint.path, checkpoint.manifest
    refuse_another_run(checkpoint, run)
    stage = int(engine.zero_optimization_stage())
    if manifest.stage != stage:
        raise SharedError(
            f"{path} was saved at ZeRO stage {manifest.stage} and this run has {stage}; use a ds_config of that stage"
        )
    if verified_for is None and (damaged := damage(checkpoint)):
        raise SharedError(f"{damaged}; remove {path} and resume again")
    if dist.from_rank_0(lambda: _fits(engine, checkpoint)):
        _load(engine, path)
        return
    unfinished = (verified_for or path.parent) / f"{path.name}.{dist.world_size()}-ranks.partial"
    reshard(engine, checkpoint, unfinished)
    _load(engine, unfinished)
    dist.meet()
    remove_together([unfinished])


def refuse_another_run(checkpoint: Checkpoint, run: RunFacts) -> None:
    """Refuses a checkpoint of another run.

    Raises:
        SharedError: its recipe, precision, images or their order differ. The difference is named.
    """
    path, theirs = checkpoint.path, checkpoint.manifest
    differences = recipe_differences(recipe_to_dict(theirs.recipe), recipe_to_dict(run.recipe))
    for name, there, here in [("precision", theirs.precision, run.precision), *differences]:
        if there != here:
            raise SharedError(f"{path} is of another run: {name} is {there} there and {here} here; choose another --run_dir")
    if theirs.data.dataset_hash != run.data.dataset_hash:
        raise SharedError(f"{path} was trained on other images than {run.data.path}; name the shards and weights of that run")
    if theirs.data.order != run.data.order:
        raise SharedError(
            f"{path} has its images in order {theirs.data.order} and this run in {run.data.order}; "
            "use the code and the reader (--stream or not) of that run, or choose another --run_dir"
        )


def _fits(engine: Engine, checkpoint: Checkpoint) -> bool:
    """Whether DeepSpeed can load the files as they are. Its loader checks the number of ranks, but not the sub-groups."""
    model_files = sorted(checkpoint.path.glob("*mp_rank_00_model_states.pt"))
    if not model_files:
        raise InputError(f"{checkpoint.path} has no file *mp_rank_00_model_states.pt; remove it and resume again")
    saved = [list(group.items()) for group in read_torch_file(model_files[0])["param_shapes"]]
    ours = [list(group.items()) for group in engine._get_zero_param_shapes()]
    return checkpoint.manifest.world_size == dist.world_size() and saved == ours


def reshard(engine: Engine, checkpoint: Checkpoint, unfinished: Path) -> None:
    """Writes the checkpoint's state into `unfinished` for the engine's ranks; each rank writes its own files.

    Raises:
        SharedError: no space, or a rank could not write. `unfinished` is removed.
    """
    path, manifest, ranks = checkpoint.path, checkpoint.manifest, dist.world_size()
    dist.from_rank_0(lambda: make_unfinished(unfinished, int(SLACK * manifest.bytes)))
    error = ""
    try:
        source = ZeroCheckpoint(path, manifest.world_size, manifest.stage)
        write_rank(source, target_layout(source, ranks, engine.zero_sub_group_size()), dist.rank(), unfinished)
    except (OSError, InputError) as caught:
        error = error_text(caught)
    dist.meet()
    what = f"{path} of {count(manifest.world_size, 'rank')} could not be resharded for {ranks}"
    agree(dist.gather_objects(error), unfinished, what, run_tier(unfinished.parent.parent))
    dist.say(f"{path} of {count(manifest.world_size, 'rank')} was resharded for {ranks}")


def _load(engine: Engine, checkpoint: Path) -> None:
    """Restores the engine. Each rank checks its files first: a rank that stops during the load leaves the others waiting."""
    error, mine = "", [(kind, dist.rank()) for kind in ("model", "optim")]
    try:
        paths = [path for path in sorted(checkpoint.glob("*.pt")) if of_rank(path.name) in (None, *mine)]
        refuse_foreign_names(paths)
    except (OSError, InputError) as caught:
        error = error_text(caught)
    if errors := [error for error in dist.gather_objects(error) if error]:
        raise SharedError(errors[0])
    with restricted_reader(engine):
        _, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    states = client_state["igpt_ds/rng"]
    restore_rng(states[dist.rank() % len(states)])
