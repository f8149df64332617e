"""The stages that show results: figures, tables, the model's card and the report.

In: a maker that has made all other stages, so that it knows their results files. Out: `Stage`s. Called by stages.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from igpt_ds.paper.maker import Maker
from igpt_ds.paper.stage import Flags, Stage, words
from igpt_ds.paper.system import System

TABLES = (1, 2, 3, 4, 5)


def pictures(maker: Maker) -> Iterator[Stage]:
    """Figures of the main model on its first probed data set, and Figures 2, 3 and 4 if there are other models."""
    scale, main = maker.scale, maker.scale.of_recipe(maker.scale.main)
    images, model = scale.of(main.probed[0]), maker.model(main)
    own = [maker.results(f"{one}-{images.id}") for one in (model.name, f"{main.recipe.name}-untrained", "pixels")]
    if images.probes:
        yield maker.figure("layers", "layers", {"results": own}, "4.1")
    systems = [system for system in scale.systems if not system.changed]
    readers = [system for system in systems if system.recipe.objective == "ar"]
    if len(systems) > 1:
        yield from _comparisons(maker, main, readers)
    if images.probes:
        look: Flags = {"results": own[:1], "features": maker.features(model.name, images)}
        yield maker.figure("confusion", "confusion", look, "")
        yield maker.figure("neighbours", "neighbours", look | {"data": maker.shards(images.id)}, "")
    for tuning in main.tunings[:1]:
        about = scale.of(tuning.images)
        counts = maker.tuned(main, tuning) / "confusion.json"
        title = f"{main.recipe.name} fine-tuned on {about.name}, {about.eval_split}"
        yield maker.figure("confusion_finetuned", "confusion", {"counts": counts, "title": title}, "")
    like = [system for system in readers or systems if system.recipe.model.n_px == main.recipe.model.n_px]
    runs = [maker.run_dir(system.recipe.name) for system in like]
    yield maker.figure("training", "training", {}, "3.4", *runs)
    if main not in readers:
        return
    samples = maker.out / "figures" / "samples.png"
    maker.figures.append(samples)
    flags: Flags = {"model": model, "data": maker.shards(main.data[0]), "out": samples}
    yield maker.stage("samples", words("tools/sample.py", flags), samples, "")


def _comparisons(maker: Maker, main: System, readers: Sequence[System]) -> Iterator[Stage]:
    """Figures 2, 3 and 4."""
    images = maker.scale.of(main.probed[0])
    shown = [main] if len(main.probed) > 1 else readers
    last = [f"{maker.model(system).name}-{id}" for system in shown for id in system.probed]
    yield maker.figure("datasets", "datasets", {"results": [file for file in maker.rows if file.stem in last]}, "4.1, Figure 2")
    points = [maker.model(system, step).name for system in readers if system.points for step in system.steps]
    both = [maker.results(f"{point}-{what}") for point in points for what in ("likelihood", images.id)]
    yield maker.figure("loss", "loss", {"results": both, "dataset": images.name}, "4.2, Figure 3")
    yield maker.figure("objectives", "objectives", {"results": _of_tables(maker, maker.rows)}, "4.6, Figure 4")


def _of_tables(maker: Maker, rows: Sequence[Path]) -> list[Path]:
    """The results of the paper's tables and figures: without the variants of A.1."""
    changed = tuple(f"{system.recipe.name}-" for system in maker.scale.systems if system.changed)
    return [file for file in rows if not (changed and file.stem.startswith(changed))]


def pages(maker: Maker) -> Iterator[Stage]:
    """Tables with all models at their last step (the paper's if there are several), and the report of the main run."""
    scale = maker.scale
    main, tables = scale.of_recipe(scale.main), maker.out / "tables.md"
    images = scale.of(main.data[0])
    name, last = main.recipe.name, f"{maker.model(main).name}-"
    early = tuple(f"{maker.model(system, step).name}-" for system in scale.systems for step in system.points)
    rows = [file for file in _of_tables(maker, maker.rows) if not (early and file.stem.startswith(early))]
    runs = [maker.run_dir(system.recipe.name) for system in scale.systems if not system.changed]
    paper = TABLES if len(runs) > 1 else None
    if rows:
        flags: Flags = {"results": rows, "paper": paper, "run_dir": runs}
        yield maker.stage("tables", words("tools/tables.py", flags), tables, "A.1, Tables 1 to 5" if paper else "", printed=True)
    yield from _changes(maker)
    own = (last, f"{name}-untrained-", "pixels-")
    shown = [file for file in rows if file.stem.startswith(own) or file.parent.name.startswith(f"{name}-")]
    if scale.name == "own":
        measured = [file for file in rows if file.stem.startswith(last)]
        asked: Flags = {"model": maker.model(main), "run_dir": maker.run_dir(name), "results": measured or None}
        yield maker.stage("card", words("tools/model_card.py", asked), maker.out / "card.md", "", printed=True)
    drawn = ("layers",) if paper else ("layers", "training")  # the report draws these itself
    flags = {"results": shown or None, "run_dir": maker.run_dir(name)}
    flags |= {"pictures": tuple(path for path in maker.figures if path.stem not in drawn)}
    flags |= {"title": f"The paper at scale {scale.name}" if paper else f"{images.name}: {name}"}
    report = maker.out / "report.html"
    yield maker.stage("report", words("tools/report.py", flags | {"out": report}), report, "")


def _changes(maker: Maker) -> Iterator[Stage]:
    """A table of what is only compared: the variants of A.1 beside the systems that they vary, and ways of fine-tuning."""
    changed = [system for system in maker.scale.systems if system.changed]
    varied = [system for system in maker.scale.systems if any(_varies(one, system) for one in changed)]
    probes = [maker.results(f"{maker.model(system).name}-{changed[0].probed[0]}") for system in (*varied, *changed)]
    if not probes and not maker.compared:
        return
    flags: Flags = {"results": [*probes, *maker.compared], "by_file": True}
    yield maker.stage("changes", words("tools/tables.py", flags), maker.out / "changes.md", "2.3, 4.5, A.1", printed=True)


def _varies(one: System, system: System) -> bool:
    """Whether `one` is a variant of the system."""
    return not system.changed and one.recipe.name.startswith(f"{system.recipe.name}_")
