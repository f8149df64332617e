"""A tiny world of every format on disk, and for each format what is damaged and how it is read.

The tools themselves make it, in a directory of its own: 48 images of 4x4, their palette and shards, a checkpoint of four training
steps, a model dir, features, results. Each reader returns its result as text, so that two readings can be compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.data.exclusion import ExclusionReason, read_exclusion, write_exclusion
from igpt_ds.data.palette import load_palette
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.streaming import ShardStream
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.probes.saved import load_probe
from igpt_ds.evaluate.probes.sgd_state import RateResults, SgdState, read_state, write_state
from igpt_ds.evaluate.report.results import read_results
from igpt_ds.json_files import write_json
from igpt_ds.launcher import RANK_VARIABLES
from igpt_ds.model.store import load_model, verified_info
from igpt_ds.ops.torture.trial import ROOT, run_one, tool
from igpt_ds.train.run_dir import read_run
from igpt_ds.train.safety.rollback import Rollback, read_rollbacks, write_rollbacks
from igpt_ds.train.sweep import Result, read_sweep, write_sweep

Read = Callable[[Path], str]
PROBE = {"what": "torture"}  # identity of the SGD probe
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_px=4, n_vocab=8)


@dataclass(frozen=True)
class Format:
    """A format on disk.

    parts: what a trial copies from the world; files: patterns of what is damaged; read: gives the result of reading a copy.
    ours: whether its files say their own sha256, so that no damage may change the result; every: 10 for each tenth turn alone;
    optional: whether a run may be without the file, so that a missing one is no damage.
    """

    name: str
    parts: tuple[str, ...]
    files: tuple[str, ...]
    read: Read
    ours: bool = True
    every: int = 1
    optional: bool = False
    seconds: float | None = None  # limit of a trial


def make_world(world: Path) -> None:
    """Makes the world in an empty directory. Takes about 15 seconds, most of them for DeepSpeed.

    Raises:
        ValueError: one of the tools failed.
    """
    _images(world / "images")
    for name, *words in (
        (
            "fit_palette",
            "--source",
            f"imagefolder:{world / 'images'}",
            "--n_px",
            4,
            "--n_colors",
            8,
            "--out",
            world / "palette.npy",
        ),
        make_shards(world, world / "shards"),
    ):
        _made(lambda place, name=name, words=words: _call(name, *words), world)  # type: ignore[misc]
    _train(world)
    probed = ("--out", world / "results.jsonl", "--save_probe", world / "probe.safetensors")
    for name, *words in (
        ("consolidate", "--run_dir", world / "run", "--out", world / "model"),
        ("extract_features", "--model", world / "model", "--data", world / "shards", "--out", world / "features"),
        ("linear_probe", "--features", world / "features", "--layers", 1, "--C_grid", 1, *probed),
        ("export_hf", "--model", world / "model", "--out", world / "hf"),
        ("paper_plan", "--scale", "tiny", "--out", world / "paper", "--commands"),
    ):
        _made(lambda place, name=name, words=words: _call(name, *words), world)  # type: ignore[misc]
    _made(lambda place: _small_files(world), world)
    load_model(world / "model")  # torch imports its compiler at the first one: once here, not for 1.6 s in each trial


def make_shards(world: Path, out: Path) -> tuple[object, ...]:
    """The words of the command that makes shards of the world's images."""
    source = f"imagefolder:{world / 'images'}"
    few = ("--val_fraction", 0.25, "--images_per_shard", 16, "--workers", 1)
    return ("make_shards", "--source", source, "--palette", world / "palette.npy", "--n_px", 4, "--out", out, *few)


def _call(name: str, *words: object) -> str:
    tool(name, *words)
    return ""


def _made(work: Read, world: Path) -> None:
    if (ended := run_one(work, world / "trials")).how != "ok":
        raise InputError(f"the world of the trials could not be made: {ended.how}: {ended.text}")


def _images(directory: Path) -> None:
    """Three class folders of 16 noisy images."""
    pixels = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (directory / name).mkdir(parents=True)
        for number in range(16):
            image = pixels.integers(0, 100, (4, 4, 3), dtype=np.uint8)
            image[..., channel] += 150
            (directory / name / f"{number:02d}.ppm").write_bytes(b"P6 4 4 255\n" + image.tobytes())


def _train(world: Path) -> None:
    recipe = Recipe("tiny", MODEL, batch_images=12, steps=4, lr=0.01, warmup_steps=1)
    write_json(world / "recipe.json", recipe_to_dict(recipe))
    write_json(world / "ds_config.json", {"zero_optimization": {"stage": 3}})
    if (done := _trained(world, world / "run")).returncode:
        raise InputError(f"the world of the trials could not be made: {done.stdout[-1000:]}{done.stderr[-2000:]}")


def _trained(world: Path, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    flags = {"config": world / "recipe.json", "data": world / "shards", "ds_config": world / "ds_config.json", "run_dir": run_dir}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "train.py"), *words, "--log_every", "1", *more]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=environment | {"DS_ACCELERATOR": "cpu"}
    )


def _small_files(world: Path) -> str:
    shards = ShardSet(world / "shards", "train")
    write_exclusion(world / "exclude.json", shards, np.array([1, 5]), ExclusionReason("torture"))
    write_rollbacks(world / "run", [Rollback(9, 8, 4, (48, 96), "torture")])
    write_sweep(world / "sweep.json", [Result(0.01, 1.5, None), Result(0.003, 1.25, None), Result(0.001, None, 7)])
    write_state(world / "probe.state", PROBE, SgdState({"group": RateResults([True, False], {"val": [0.5, 0.0]})}))
    return ""


def formats() -> list[Format]:
    """Every format that is damaged."""
    return [
        Format("shards", ("shards",), ("shards/*",), _shards),
        Format("shards, streamed", ("shards",), ("shards/index.json",), _stream),
        Format("checkpoint, resumed", ("run",), ("run/checkpoints/*/*",), _resume, ours=False, every=20, seconds=200.0),
        Format("palette", ("palette.npy", "palette.json", "shards"), ("palette.npy", "palette.json"), _palette),
        Format("checkpoint", ("run",), ("run/checkpoints/*/*",), _checkpoint),
        Format("model dir", ("model",), ("model/*",), _model),
        Format("features", ("features",), ("features/*.json", "features/*/*"), _features),
        Format("exclusion list", ("exclude.json", "shards"), ("exclude.json",), _exclusion),
        Format(
            "rollbacks.json",
            ("run/rollbacks.json",),
            ("run/rollbacks.json",),
            lambda here: repr(read_rollbacks(here / "run")),
            optional=True,
        ),
        Format("run.json", ("run/run.json",), ("run/run.json",), lambda here: json.dumps(read_run(here / "run"), sort_keys=True)),
        Format("state of an SGD probe", ("probe.state",), ("probe.state",), _state),
        Format("saved probe", ("probe.safetensors",), ("probe.safetensors",), _probe),
        Format("results", ("results.jsonl",), ("results.jsonl",), _results),
        Format("sweep", ("sweep.json",), ("sweep.json",), lambda here: repr(read_sweep(here / "sweep.json"))),
        Format("paper.json", ("paper",), ("paper/paper.json",), _paper),
        Format("status of a run", ("run",), ("run/run.json", "run/train.jsonl", "run/heartbeat/*"), _status, ours=False),
        Format("Hugging Face import", ("hf", "palette.npy", "palette.json"), ("hf/*",), _hugging_face, ours=False),
    ]


def damaged_file(random_: random.Random, here: Path, patterns: Iterable[str]) -> Path:
    """One of a format's files, each pattern as likely as the next."""
    found = [sorted(path for path in here.glob(pattern) if path.is_file()) for pattern in patterns]
    return random_.choice(random_.choice([some for some in found if some]))


def digest(*paths: Path) -> str:
    """The sha256 of all files under some paths, with their names; without what a killed writer left beside them."""
    sha = hashlib.sha256()
    for path in paths:
        for file in sorted([path] if path.is_file() else path.rglob("*")):
            if file.is_file() and file.suffix != ".partial":
                sha.update(f"{file.relative_to(path.parent)}\0".encode() + file.read_bytes())
    return sha.hexdigest()


def _text(*values: object) -> str:
    """Values as text, arrays by their bytes."""
    named = [
        hashlib.sha256(v.tobytes()).hexdigest() + f"{v.dtype}{v.shape}" if isinstance(v, np.ndarray) else repr(v) for v in values
    ]
    return "\n".join(named)


def _shards(here: Path) -> str:
    return read_shards(here / "shards")


def read_shards(path: Path) -> str:
    """What a dataset directory holds, after its shards were verified."""
    found: list[object] = []
    for split in ("train", "val"):
        shards = ShardSet(path, split)
        shards.verify()
        found += [*shards.read(np.arange(shards.n_images)), shards.classes, shards.palette_hash, shards.dataset_hash]
    return _text(*found)


def _stream(here: Path) -> str:
    shards = ShardStream(here / "shards", f"pipe:cat {here / 'shards'}/{{shard}}")
    images = [image for number in range(len(shards.shards)) for image in shards.read(number)]
    return _text(np.stack([tokens for tokens, _ in images]), [label for _, label in images])


def _palette(here: Path) -> str:
    return _text(load_palette(here / "palette.npy").colors)


def _checkpoint(here: Path) -> str:
    tool("consolidate", "--run_dir", here / "run", "--step", 4, "--out", here / "out")
    return digest(here / "out")


def _resume(here: Path) -> str:
    """What a run says that goes on from the checkpoint: the world's recipe has no step left."""
    world = Path(json.loads((here / "run" / "run.json").read_text(encoding="utf-8"))["data"]["datasets"][0]["path"]).parent
    done = _trained(world, here / "run", "--resume", "auto")
    sys.stderr.write("".join(line for line in done.stderr.splitlines(True) if "warn" not in line.lower()))
    if done.returncode:
        raise SystemExit(done.returncode)
    return ""


def _model(here: Path) -> str:
    model, info = load_model(here / "model")
    verified_info(here / "model")
    return _text(*(weight.numpy() for weight in model.state_dict().values()), str(info))


def _features(here: Path) -> str:
    found: list[object] = []
    for split in ("train", "val"):
        features = open_features(here / "features", split)
        found += [features.layers, features.kinds, features.classes, features.dataset_hash, np.asarray(features.labels)]
        found += [np.asarray(features.layer(layer, kind)) for layer in features.layers for kind in features.kinds]
    return _text(*found)


def _exclusion(here: Path) -> str:
    return _text(read_exclusion(here / "exclude.json", ShardSet(here / "shards", "train")))


def _state(here: Path) -> str:
    return repr(read_state(here / "probe.state", PROBE, "cpu"))


def _probe(here: Path) -> str:
    probe = load_probe(here / "probe.safetensors")
    return _text(probe.about, probe.weights, probe.intercepts, probe.mean, probe.scale)


def _results(here: Path) -> str:
    tool("tables", "--results", here / "results.jsonl")
    return repr(read_results(here / "results.jsonl"))


def _paper(here: Path) -> str:
    tool("paper_plan", "--scale", "tiny", "--out", here / "paper", "--commands")
    return (here / "paper" / "paper.json").read_text(encoding="utf-8")


def _status(here: Path) -> str:
    tool("status", here / "run", "--json")
    return ""


def _hugging_face(here: Path) -> str:
    tool("import_hf", "--hf", here / "hf", "--palette", here / "palette.npy", "--out", here / "out")
    return digest(here / "out")
