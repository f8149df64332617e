"""The public API is frozen: its names, their parameters and defaults, and the attributes of what they return."""

from __future__ import annotations

import inspect

import igpt_ds

SIGNATURES = {
    "load": "(path, device=None, dtype=None)",
    "open_features": "(path, split=None)",
    "open_shards": "(path, split=None)",
    "Model.encode": "(self, images)",
    "Model.decode": "(self, tokens)",
    "Model.features": "(self, images, layer='best', kind='normed', batch=32, progress=False, mask_draws=None, seed=0)",
    "Model.best_layer": "(self, kind='normed')",
    "Model.nats": "(self, images, batch=32, mask_draws=None, seed=0, progress=False)",
    "Model.sample": "(self, n=1, seed=0, temperature=1.0, top_k=None, top_p=None, batch=64, progress=False)",
    "Model.complete": "(self, images, keep=0.5, n=1, seed=0, temperature=1.0, batch=64, progress=False)",
    "Model.predict": "(self, images, probe=None, mask_draws=None, batch=32, progress=False)",
    "Features.layer": "(self, layer, kind=None, mask=0)",
    "Shards.tokens": "(self)",
    "Shards.pixels": "(self)",
}
ATTRIBUTES = {
    "Model": {"path", "config", "info", "palette", "network", "device", "dtype"},
    "Features": {"path", "split", "splits", "labels", "classes", "keys", "layers", "kinds"},
    "Shards": {"path", "split", "splits", "labels", "classes", "name", "n_px", "palette"},
    "Prediction": {"labels", "probabilities", "classes", "names"},
    "ShardImages": {"tokens", "label", "key"},
}


def found(name: str) -> object:
    value: object = igpt_ds
    for part in name.split("."):
        value = getattr(value, part)
    return value


def plain(function: object) -> str:
    """A signature without its annotations."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_the_public_names() -> None:
    public = {name.split(".")[0] for name in SIGNATURES} | set(ATTRIBUTES) | {"InputError"}
    assert set(igpt_ds.__all__) == public
    assert set(igpt_ds.__all__) <= set(dir(igpt_ds))
    assert all(getattr(igpt_ds, name) is not None for name in igpt_ds.__all__)


def test_signatures_are_the_frozen_ones() -> None:
    assert {name: plain(found(name)) for name in SIGNATURES} == SIGNATURES


def test_methods_are_the_frozen_ones() -> None:
    hidden = {"Shards.check_fits"}  # for the model, which reads shards
    for kind in ATTRIBUTES:
        methods = {name for name, value in vars(found(kind)).items() if inspect.isfunction(value) and not name.startswith("_")}
        assert {f"{kind}.{name}" for name in methods} - hidden == {name for name in SIGNATURES if name.startswith(f"{kind}.")}


def test_attributes_are_the_frozen_ones(model_dir, tiny_dataset) -> None:
    model, shards = igpt_ds.load(model_dir), igpt_ds.open_shards(tiny_dataset)
    for instance in (model, shards, shards[0]):
        public = {name for name in dir(instance) if not name.startswith("_") and not callable(getattr(instance, name))}
        assert public - {"network"} == ATTRIBUTES[type(instance).__name__] - {"network"}
