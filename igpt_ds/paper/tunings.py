"""The stages that train classifiers: searches of learning rates, fine-tuning, and training from fresh weights (paper 3.4, 4.5).

In: a maker and a system. Out: `Stage`s. Called by stages.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from igpt_ds.paper.budget import label_steps
from igpt_ds.paper.maker import Maker, chosen
from igpt_ds.paper.stage import Flags, Stage, words
from igpt_ds.paper.system import System, Tuning


def search(maker: Maker, name: str, program: str, flags: Flags, section: str) -> Stage:
    """The search of a learning rate for a training with these flags."""
    out = maker.search(name)
    own = words("tools/sweep_lr.py", {"out": out, "max_rates": maker.scale.max_rates})
    return maker.stage(f"search-{name}", (*own, "--", *words(program, flags)), out, section)


def tunings(maker: Maker, system: System) -> Iterator[Stage]:
    """All classifiers of a system, a search before the first that uses it."""
    for tuning in system.tunings:
        run_dir = maker.tuned(system, tuning)
        flags = _flags(maker, system, tuning)
        if tuning.searched == tuning.name:
            yield search(maker, run_dir.name, "finetune.py", flags | _lasts(maker, tuning), f"3.4, {tuning.section}")
        flags |= {"run_dir": run_dir, "resume": "auto"}
        if tuning.searched:
            flags["search"] = maker.search(f"{system.recipe.name}-{tuning.images}-{tuning.searched}")
        if tuning.fold:
            flags["train_split"] = "train+val"
        else:
            flags |= _lasts(maker, tuning)
        file = run_dir / "results.jsonl"
        flags |= {"eval_split": maker.scale.of(tuning.images).eval_split, "results": file}
        if tuning.compares:
            first = maker.tuned(system, system.tunings[0]) / "results.jsonl"
            maker.compared += [file] if first in maker.compared else [first, file]
        else:
            maker.rows.append(file)
        yield maker.stage(run_dir.name, words("finetune.py", flags), run_dir, tuning.section)


def _lasts(maker: Maker, tuning: Tuning) -> Flags:
    """How long a training lasts at most."""
    scale = maker.scale
    if "labels" in tuning.knobs:
        return {"steps": label_steps(tuning, scale)}
    return {"steps": scale.finetune_steps} if scale.finetune_steps else {"epochs": tuning.epochs or scale.epochs}


def _flags(maker: Maker, system: System, tuning: Tuning) -> Flags:
    """What a search and its training have in common."""
    recipe, images = system.recipe, maker.scale.of(tuning.images)
    flags: Flags = chosen(recipe, maker.out) | {"untrained": 0} if tuning.fresh else {"model": maker.model(system)}
    flags |= {"data": maker.shards(images.id), "lr": tuning.lr, "batch_images": recipe.batch_images}
    if tuning.best_layer:
        flags["layer_from"] = maker.results(f"{maker.model(system).name}-{images.id}")
    if images.augment and "labels" not in tuning.knobs:  # an eighth of the side: 4 at 32x32 (paper 3.1); few labels: none (4.7)
        flags |= {"augment_pad": images.n_px // 8, "augment_flip": True}
    return flags | tuning.knobs | maker.machine(system)
