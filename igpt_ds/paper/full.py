"""The paper itself: its data sets, the models of Table 5, and the measurements of sections 3, 4 and A.1.

In: the directory of the images and what the user chooses. Out: a `Scale`. experiments.py lists the statements of the paper that
it covers. Called by scales.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from igpt_ds.config import Recipe, get_recipe
from igpt_ds.errors import InputError
from igpt_ds.paper.published import FIGURE_3_STEPS
from igpt_ds.paper.system import Filtered, Images, Scale, System, Tuning

PRECISIONS = ("bf16", "fp32")
# Published numbers of images per split; val is split off train (docs/data.md).
_IMAGENET = {"train": 1_229_920, "val": 51_247, "test": 50_000}
_CIFAR = {"train": 45_000, "val": 5_000, "test": 10_000}
_STL10 = {"train": 4_500, "val": 500, "test": 8_000}
_WEB = {"train": 99_900_000, "val": 100_000}  # paper 3: 100 million; the share of val is ours
_CIFAR10, _BOTH = "cifar10_32", ("cifar10_32", "imagenet_32")
# Stored crops of each ImageNet image. The paper draws a fresh crop each time (3.1). Its random resize comes before the palette,
# so it cannot be drawn from tokens. A million batches of 128 are 104 passes over the images, so each of 8 crops is seen 13 times,
# and the shards take 8 times the disk. `make_shards.py --views 104` is the paper: a fresh crop in every pass, 104 times the disk.
VIEWS = 8
DROPOUT = 0.1  # 4.5 gives none; this is GPT-2's
SUBSETS = 5  # of few labels: 4.7
MASK_RATES = (0.2, 0.25, 0.3, 0.35)  # A.1


@dataclass(frozen=True)
class Full:
    """What a user chooses of scale full.

    precision: of trainings, features and likelihoods; bf16 has fp32 master weights, fp32 is the paper's (A.1).
    search_rates: search the learning rates of pre-training again, instead of taking those of Table 5.
    web: KIND:WHERE of web images for XL; None: XL sees only ImageNet.
    web_keep: share of the web images that is kept, those most like ImageNet; 1: all, which were filtered before.
    """

    precision: str = "bf16"
    search_rates: bool = False
    web: str | None = None
    web_keep: float = 1.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is unknown; known: {', '.join(PRECISIONS)}")
        if not 0 < self.web_keep <= 1 or (self.web_keep < 1 and not self.web):
            raise InputError(f"--web_keep {self.web_keep:g} must be above 0 and at most 1, and below 1 it needs --web")


def full(data: str, paper: Full) -> Scale:
    """The scale of the paper."""
    images, crops = _images(data, paper)

    def system(name: str, *probed: str, **more: object) -> System:
        recipe = get_recipe(name)
        made = System(recipe, (f"imagenet_{recipe.model.n_px}_views",), probed, section=_section(recipe))
        return replace(made, train_split="train+val", searched=paper.search_rates, **more)  # type: ignore[arg-type]

    points = FIGURE_3_STEPS[:-1]
    xl = system("igpt_xl_ar_64", "imagenet_64", variants=("concat",))
    if paper.web:
        xl = replace(xl, data=(*xl.data, "web_64"), section=f"3, {xl.section}")
    if paper.web_keep < 1:
        xl = replace(xl, filtered=Filtered("web_64", paper.web_keep, "igpt_s_ar_32", "web_32", "imagenet_32"))
    systems = (
        system("igpt_s_ar_32", *_BOTH, points=points),
        system("igpt_m_ar_32", *_BOTH, points=points),
        _large(system("igpt_l_ar_32", _CIFAR10, "cifar100_32", "stl10_32", "imagenet_32", points=points)),
        _large_48(system("igpt_l_ar_48", "imagenet_48")),
        xl,
        system("igpt_s_bert_32", _CIFAR10),
        system("igpt_m_bert_32", _CIFAR10),
        system("igpt_l_bert_32", *_BOTH, tunings=_searched((_CIFAR10, "imagenet_32_views"), "3.1, 4.6, Figure 4")),
    )
    changed = _changed(systems[0], systems[5], paper.precision)
    last = {"loss_split": "test", "palette_images": 50_000}
    return Scale("full", crops, 512, images, (*systems, *changed), "igpt_l_ar_32", precision=paper.precision, **last)  # type: ignore[arg-type]


def _images(data: str, paper: Full) -> tuple[tuple[Images, ...], Images]:
    """All data sets, and the one whose images determine the palette."""
    imagenet = f"imagenet:{data}/ILSVRC2012"
    final = functools.partial(Images, train_split="train+val", eval_split="test")  # a probe holds out a tenth of train+val
    crops = [
        Images("imagenet", imagenet, n_px, _IMAGENET, crop="random", views=VIEWS, eval_split="test") for n_px in (32, 48, 64)
    ]
    centres = [final("imagenet", imagenet, n_px, _IMAGENET, crop="center", sgd=True) for n_px in (32, 48, 64)]
    others = [final(name, f"{name}:{data}", 32, _CIFAR, augment=True) for name in ("cifar10", "cifar100")]
    others.append(final("stl10", f"stl10:{data}", 32, _STL10))
    plain = {"labels": "ignore", "probes": False, "crop": "center", "val_fraction": 0.001}  # not augmented: paper 3.1
    sizes = () if not paper.web else (64,) if paper.web_keep == 1 else (32, 64)
    counts = {split: round(n / paper.web_keep) for split, n in _WEB.items()}
    web = [Images("web", str(paper.web), n_px, counts, **plain) for n_px in sizes]  # type: ignore[arg-type]
    return (*crops, *centres, *others, *web), centres[0]


def _section(recipe: Recipe) -> str:
    return f"2.1, 3.1, 3.3, 3.4, {'4.6, ' if recipe.objective == 'bert' else ''}Table 5"


def _searched(ids: Sequence[str], section: str = "3.1, 4.5") -> tuple[Tuning, ...]:
    """Joint fine-tuning: the rate is searched (4.5), then validation images return to training (3.1)."""
    return tuple(Tuning(id, section=section, searched="finetuned", fold=True) for id in ids)


def _large(system: System) -> System:
    """L at 32x32: Table 3, and the comparisons of 2.3, 4.5 and 4.7 on CIFAR-10, at the rate of the search."""
    beside = functools.partial(Tuning, _CIFAR10, searched="finetuned")
    tunings = (
        *_searched((_CIFAR10, "cifar100_32"), "3.1, 4.5, Table 3"),
        *_searched(("imagenet_32_views",)),
        beside("clf", "2.3", knobs={"loss": "clf"}, fold=True),
        beside("best_layer", "4.5", best_layer=True, fold=True),
        beside("dropout", "4.5", knobs={"dropout": DROPOUT}, fold=True),
        beside("40_labels", "4.7", knobs={"labels": 40, "subsets": SUBSETS}),
    )
    return replace(system, variants=("untrained", "low_data"), tunings=tunings)


def _large_48(system: System) -> System:
    """L at 48x48: fine-tuned, and the class loss alone from fresh weights with its own rate (4.5)."""
    id = "imagenet_48_views"
    scratch = Tuning(
        id, "from_scratch", "4.5", True, searched="from_scratch", epochs=18, fold=True, knobs={"loss": "clf", "dropout": DROPOUT}
    )
    return replace(system, tunings=(*_searched((id,)), scratch))


def _changed(ar: System, bert: System, precision: str) -> tuple[System, ...]:
    """A.1: what the paper tried on S, each beside the S of Table 5; probed on CIFAR-10."""

    def system(of: System, name: str, changed: str, ds_config: str | None = None, **knobs: object) -> System:
        recipe = replace(of.recipe, name=f"{of.recipe.name}_{name}", **knobs)  # type: ignore[arg-type]
        made = replace(of, recipe=recipe, probed=(_CIFAR10,), points=(), searched=False, section="A.1")
        return replace(made, changed=changed, ds_config=ds_config)

    other = "bf16" if precision == "fp32" else "fp32"
    return (
        *(system(bert, f"mask_{100 * rate:.0f}", f"mask_prob {rate:g}", mask_prob=rate) for rate in MASK_RATES),
        system(ar, "weight_decay", "weight_decay 0.01", weight_decay=0.01),
        system(ar, "tied", "tied embeddings", model=replace(ar.recipe.model, tied_embeddings=True)),
        system(ar, "head", "head_std 0.02", head_std=0.02),  # GPT-2's
        *(system(ar, half, half, f"ds_configs/zero3_{half}.json") for half in ("fp16", other)),
    )
