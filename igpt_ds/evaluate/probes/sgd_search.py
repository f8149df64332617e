"""The linear probe by SGD (paper 3.4, for ImageNet): momentum 0.9, a cosine, several learning rates at once.

In: a feature set, however much larger than memory. Out: an `SgdProbe`. Called by `tools/sgd_probe.py`.

All rates see the same images in the same order, so one product gives the logits of all rates and another their gradients. Rates
are tried from large to small, as in the paper, one group at a time. The search ends with the group whose best rate is not its
smallest. A share of the training images chooses the rate, by default 4 %, as the paper holds out of ImageNet (3.1). Then the best
rate is fitted on all training images, and then the reported split is read. Random numbers depend only on their place in the
stream (`evaluate/probes/rows.py`), so an interrupted probe continues from its state file to the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.probes.linear import check_labels, stratified_order, training_images
from igpt_ds.evaluate.probes.rows import BLOCK_BYTES, Blocks, FiniteRows, moments
from igpt_ds.evaluate.probes.settings import RateSearch, SgdSettings
from igpt_ds.evaluate.probes.sgd import MOMENTUM, RowSource, RowSubset, Sgd, cosine, predictions
from igpt_ds.evaluate.probes.sgd_records import SgdConcatProbe, SgdMaskVoteProbe, SgdProbe
from igpt_ds.evaluate.probes.sgd_state import RateResults, SgdState, StateFile, UnfinishedGroup, read_state, write_state
from igpt_ds.evaluate.probes.votes import check_masks, vote
from igpt_ds.threads import threads_for

MOST_EPOCHS = 10_000  # the paper's probes of ImageNet see it a hundred times
FORMAT, VERSION = "igpt_ds.sgd_probe", 2
_MADE_WITH = ("model_hash", "precision", "dtype", "mask_prob", "mask_seed")  # they decide the features of the same images


Counted = tuple[Sequence[RowSource], np.ndarray]  # the rows of each mask, whose predictions vote, and labels


class _Fitting:
    """The fits of one probe, one after another, and the file from which an interrupted probe continues.

    The file holds the accuracies of the finished groups of rates, and the weights of the unfinished one.
    """

    def __init__(
        self,
        train: FeatureSet,
        evaluated: FeatureSet,
        layers: Sequence[int],
        kind: str,
        settings: SgdSettings,
        held_out: float,
        file: StateFile | None,
    ) -> None:
        self.values, self.settings, self.file = FiniteRows(train, layers, kind), settings, file
        self.n_classes = len(train.classes)
        self.labels = torch.from_numpy(np.array(train.labels)).to(settings.device)
        layer = layers[0] if len(layers) == 1 else list(layers)
        where = {"labels": train.dataset_hash, "n_classes": self.n_classes, "layer": layer, "kind": kind, "held_out": held_out}
        where |= {f"features' {name}": getattr(train.manifest.origin, name) for name in _MADE_WITH}
        where |= {"eval_split": evaluated.split, "eval_split's hash": evaluated.dataset_hash}
        where |= {"mask_draws": [train.mask_draws, evaluated.mask_draws]}
        given = {name: value for name, value in asdict(settings).items() if value is not None}
        self.identity = {"format": FORMAT, "version": VERSION, **where, **given}
        self.state = read_state(file.path, self.identity, settings.device) if file and file.path.exists() else SgdState()

    def accuracies(
        self, name: str, rates: Sequence[float], keep: np.ndarray | None, counted: Mapping[str, Counted]
    ) -> RateResults:
        """Fits a group of rates on the kept rows and counts on each named set of rows. A finished group is not fitted again.

        Args:
            keep: bool [N], the rows to fit on; None: all.
            counted: rows [n, C] of each mask, or of whole images, and labels [n], by name.
        """
        name = f"{name} {list(rates)}"
        if (known := self.state.done.get(name)) is not None:
            if {what: len(shares) for what, shares in known.accuracies.items()} != dict.fromkeys(counted, len(known.finite)):
                raise InputError(f"{self.file and self.file.path} is damaged: accuracies are missing in {name!r}; remove it")
            return known
        settings, rows = self.settings, max(1, BLOCK_BYTES // (4 * self.values.shape[1]))
        standard = moments(self.values, keep, rows) if settings.standardise else None
        blocks = Blocks(self.values, keep, settings.seed, settings.window_bytes, standard)
        sgd = Sgd(self.values.shape[1], self.n_classes, rates, settings.device)
        step = self._resume(sgd, name)
        saved_at = step
        batches = blocks.batches(step, settings.steps, settings.batch_images, settings.device)
        what = f"layer {self.identity['layer']} {self.identity['kind']}, {name.split()[0]}, {len(rates)} rates"
        with threads_for(2.0 * settings.batch_images * self.values.shape[1] * self.n_classes * len(rates)):
            for x, ids in tqdm(batches, what, settings.steps, unit=" steps", initial=step, leave=False, disable=None):
                sgd.step(x, self.labels[ids], cosine(step, settings.steps))
                step += 1
                if self.file and step - saved_at >= self.file.save_every and step < settings.steps:
                    self._save(SgdState(self.state.done, UnfinishedGroup(name, step, sgd.state())))
                    saved_at = step
        finite, found = sgd.finite().tolist(), {}
        read: dict[int, np.ndarray] = {}  # by the identity of the rows: a mask counts alone and in the vote, and is read once
        for what, (masks, labels) in counted.items():
            for rows in masks:
                if id(rows) not in read:
                    read[id(rows)] = predictions(sgd, rows, standard, settings.device)
            predicted = np.stack([read[id(rows)] for rows in masks], axis=1)  # [R, M, N]
            voted = [vote(one, self.n_classes, settings.seed) if len(one) > 1 else one[0] for one in predicted]
            shares = [float((labels == one).mean()) for one in voted]
            found[what] = [share if good else 0.0 for share, good in zip(shares, finite, strict=True)]
        results = RateResults(finite, found)
        self._save(SgdState(self.state.done | {name: results}))
        return results

    def _resume(self, sgd: Sgd, name: str) -> int:
        """Loads the weights of an unfinished group, if it is this one; returns the number of steps that they had."""
        begun = self.state.begun
        if begun is None or begun.name != name:
            return 0
        shapes, found = ({k: list(v.shape) for k, v in weights.items()} for weights in (sgd.state(), begun.weights))
        if found != shapes or not 0 < begun.step < self.settings.steps:
            what = f"step {begun.step} with weights {found}, not weights {shapes}"
            raise InputError(f"{self.file and self.file.path} is damaged: it has {what}; remove it")
        sgd.load(begun.weights)
        return begun.step

    def forget(self) -> None:
        """Removes the file, at the end of a probe and after an error that would come again."""
        if self.file:
            self.file.path.unlink(missing_ok=True)

    def _save(self, state: SgdState) -> None:
        self.state = state
        if self.file:
            write_state(self.file.path, self.identity, state)


def held_out_rows(labels: np.ndarray, share: float, views: int, seed: int, single: int = 0) -> np.ndarray:
    """The rows of the images that choose the rate, bool [N]: classes in proportion, all views of an image together.

    Args:
        single: how many of the last rows are images with one view, as the validation images of train+val.

    Raises:
        ValueError: the share is out of range, or the rows are not a whole number of images.
    """
    if not 0 < share < 1:
        raise InputError(f"--held_out {share:g} must lie between 0 and 1")
    viewed = len(labels) - single
    if viewed % views:
        raise InputError(f"--views {views} does not divide the {viewed} rows of the training images")
    images = stratified_order(np.concatenate([labels[:viewed:views], labels[viewed:]]), seed)
    n = max(1, round(share * len(images)))
    if n == len(images):
        raise InputError(f"--held_out {share:g} of {len(images)} images leaves none to fit on")
    mask = np.zeros(len(images), dtype=bool)
    mask[images[:n]] = True
    return np.concatenate([np.repeat(mask[: viewed // views], views), mask[viewed // views :]])


def _check_length(settings: SgdSettings, n: int) -> None:
    """Refuses a fit on n images whose batch is larger than these, or that sees them absurdly often."""
    batch, epochs = settings.batch_images, settings.steps * settings.batch_images / n
    if batch > n:
        raise InputError(f"--batch_images {batch} is more than the {n} images that the probe is fitted on; choose at most {n}")
    if epochs > MOST_EPOCHS:
        what = f"--steps {settings.steps} of {batch} images are {epochs:,.0f} epochs of the {n} images of the fit"
        raise InputError(f"{what}, and at most {MOST_EPOCHS:,} are allowed; choose at most --steps {MOST_EPOCHS * n // batch}")


def sgd_probe(
    train: FeatureSet,
    evaluated: FeatureSet,
    layers: int | Sequence[int],
    kind: str,
    settings: SgdSettings,
    search: RateSearch | None = None,
    file: StateFile | None = None,
) -> SgdProbe:
    """Probes one layer, several layers side by side (an `SgdConcatProbe`), or masks that vote (an `SgdMaskVoteProbe`).

    Args:
        layers: a layer, or the rising numbers of several.
        search: None takes the paper's rates.
        file: where an interrupted probe continues; removed at the end, and if every rate diverges.

    Raises:
        ValueError: labels missing or all the same, features not finite, divergence, a share out of range, another probe's file.
    """
    search, layers = search or RateSearch(), (layers,) if isinstance(layers, int) else tuple(layers)
    training_images(train, None, settings.seed)  # checks the labels; all images are used
    check_labels(evaluated)
    check_masks(train, evaluated, settings.n_masks or 0)
    single = sum(len(part.labels) for part in train.parts if part.split != "train")  # make_shards.py stores one crop of each
    mask = held_out_rows(train.labels, search.held_out, settings.views, settings.seed, single)
    _check_length(settings, int((~mask).sum()))
    fitting = _Fitting(train, evaluated, layers, kind, settings, search.held_out, file)
    tried = _search_rates(fitting, search, ~mask, ([RowSubset(fitting.values, np.flatnonzero(mask))], train.labels[mask]))
    masks = [FiniteRows(evaluated, layers, kind, one) for one in range(settings.n_masks or 1)]
    everything: dict[str, Counted] = {"train": ([fitting.values], train.labels), "evaluated": (masks, evaluated.labels)}
    everything |= {f"mask {one}": ([rows], evaluated.labels) for one, rows in enumerate(masks) if settings.n_masks}
    last = fitting.accuracies("all", [tried.rate], None, everything)
    fitting.forget()
    if not last.finite[0]:
        raise InputError(f"rate {tried.rate:g} was the best and diverged on all images; omit it from --rates")
    probe = SgdProbe(
        layer=layers[len(layers) // 2],
        kind=kind,
        train_split=train.split,
        eval_split=evaluated.split,
        n_train=len(train.labels),
        n_eval=len(evaluated.labels),
        n_features=fitting.values.shape[1],
        n_classes=fitting.n_classes,
        rate=tried.rate,
        rates=tried.rates,
        grid_edge=tried.edge,
        diverged=[rate for rate, good in zip(tried.rates, tried.finite, strict=True) if not good],
        held_out_accuracies=tried.accuracies,
        held_out_accuracy=tried.accuracies[tried.best],
        train_accuracy=last.accuracies["train"][0],
        accuracy=last.accuracies["evaluated"][0],
        momentum=MOMENTUM,
        standardised=settings.standardise,
        held_out=search.held_out,
        **{name: getattr(settings, name) for name in ("steps", "batch_images", "views", "seed")},
    )
    if settings.n_masks:
        return _voted(probe, [last.accuracies[f"mask {one}"][0] for one in range(settings.n_masks)], evaluated)
    return probe if len(layers) == 1 else SgdConcatProbe(**vars(probe), layers=list(layers))


def _voted(probe: SgdProbe, each: list[float], evaluated: FeatureSet) -> SgdMaskVoteProbe:
    mean, mask_seed = float(np.mean(each)), evaluated.manifest.origin.mask_seed
    return SgdMaskVoteProbe(**vars(probe), n_masks=len(each), mask_seed=mask_seed, single_accuracy=mean, single_accuracies=each)


@dataclass(frozen=True)
class _Tried:
    """The rates that were tried, from large to small, and what each reached."""

    rates: list[float]
    accuracies: list[float]  # on the held-out images
    finite: list[bool]

    @property
    def best(self) -> int:
        """The place of the best rate; of equal ones, the largest."""
        return int(np.argmax(self.accuracies))

    @property
    def edge(self) -> str | None:
        """The end of the rates at which the best one stands; None if it is inside or the only one."""
        return None if len(self.rates) == 1 else {0: "high", len(self.rates) - 1: "low"}.get(self.best)

    @property
    def rate(self) -> float:
        """The best rate."""
        return self.rates[self.best]


def _search_rates(fitting: _Fitting, search: RateSearch, keep: np.ndarray, held_out: Counted) -> _Tried:
    falling, tried = sorted(set(search.rates), reverse=True), _Tried([], [], [])
    for first in range(0, len(falling), search.together):
        group = falling[first : first + search.together]
        found = fitting.accuracies("search", group, keep, {"held_out": held_out})
        tried = _Tried(tried.rates + group, tried.accuracies + found.accuracies["held_out"], tried.finite + found.finite)
        if tried.best < len(tried.rates) - 1 and tried.finite[tried.best]:
            break
    if not any(tried.finite):
        fitting.forget()
        raise InputError(f"every rate diverged, down to {tried.rates[-1]:g}; give smaller --rates, or --standardise")
    return tried
